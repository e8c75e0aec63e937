"""What the observers of tracking tools share: a run's events become points by step, text and figures, named alike."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import random
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sftx import ConfigError, EvalReport, Observer, Provider, RunInfo, Sample, StartReport, StepReport

Scalar: TypeAlias = str | int | float | bool
Ending: TypeAlias = Literal["finished", "killed", "failed"]

GLOBAL_STEP = "train/global_step"


def library(module: str, extra: str) -> Any:
    """The module of a tool that not every run needs. Raises ConfigError with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"needs the library {extra}, which is not there ({error}); pip install 'sftx[{extra}]', or leave the "
            "plugin out"
        ) from error


class Tracker(Observer):
    """A run as a tracking tool has it. What is to be written, and when, stands here; how, in its subclasses."""

    def __init__(self, run: RunInfo) -> None:
        """Takes nothing that would have to be given back: not every observer that is made is told of a run."""
        self.run = run
        self._step = 0
        self._is_begun = self._is_over = False

    # --- what a tool has to do ------------------------------------------------------------------

    @abstractmethod
    def begin(self, report: StartReport) -> None:
        """Opens the tool's run, or that of the interrupted process again; writes options and the assembled table."""

    @abstractmethod
    def points(self, values: Mapping[str, float], step: int) -> None:
        """Writes a value of each name, at that step."""

    @abstractmethod
    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """Writes what the model answered at that step."""

    @abstractmethod
    def figures(self, figures: Mapping[str, Scalar], step: int) -> None:
        """Writes what the run came to, the artefact's path among it."""

    @abstractmethod
    def finish(self, ending: Ending) -> None:
        """Closes what `begin` opened. Within seconds: the process may be about to be killed."""

    # --- when -----------------------------------------------------------------------------------

    def on_start(self, report: StartReport) -> None:
        self._step = report.resumed_step or 0
        with _random_kept():
            self.begin(report)
        self._is_begun = True

    def on_step(self, report: StepReport) -> None:
        self._step = report.step
        with _random_kept():
            self.points(step_values(report), report.step)

    def on_evaluate(self, report: EvalReport) -> None:
        if report.step < self._step:
            return  # the best step once more, at the end: the same values stand at that step already
        shown = report.samples[: self.run.config["generation"]["num_samples"]]
        with _random_kept():
            self.points(evaluation_values(report), report.step)
            if shown:
                self.samples(shown, report.step)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        figures = {name: value for name, value in summary.items() if name != "samples"}
        with _random_kept():
            self.figures(flat({"summary": figures}, "/"), summary["num_steps"])
        self._is_over = True

    def close(self) -> None:
        if self._is_begun:
            self._is_begun = False
            # A run that ends otherwise is closed while its exception passes by; a signal is a KeyboardInterrupt.
            is_stopped = isinstance(sys.exc_info()[1], KeyboardInterrupt)
            with _random_kept():
                self.finish("finished" if self._is_over else "killed" if is_stopped else "failed")


@contextlib.contextmanager
def _random_kept() -> Iterator[None]:
    """What a tool draws, for an id or before it tries again, is not taken from the training's random numbers."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


# --- names and values --------------------------------------------------------------------------


def step_values(report: StepReport) -> dict[str, float]:
    """By the names that the integrations of transformers use, where they have one."""
    own = {
        "global_step": report.step,
        "epoch": report.epoch,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "num_label_tokens": report.num_label_tokens,
        "tokens_per_second": report.tokens_per_second,
        "peak_bytes": report.peak_bytes,
    }
    return {f"train/{clean(name)}": value for name, value in {**report.metrics, **own}.items()}


def evaluation_values(report: EvalReport) -> dict[str, float]:
    named = {f"eval/{clean(name)}": value for name, value in report.metrics.items()}
    return {GLOBAL_STEP: report.step, "eval/runtime": report.seconds, **named}


def derived(report: StartReport) -> dict[str, Scalar]:
    """What was found out of options, data and model: its numbers and names."""
    values = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    return {name: value for name, value in values.items() if isinstance(value, Scalar)}


def assembled(providers: Sequence[Provider]) -> list[dict[str, str]]:
    """The assembled table, row by row."""
    return [
        {
            "stage": provider.stage,
            "plugin": provider.plugin,
            "distribution": f"{provider.distribution} {provider.version}",
            "options": json.dumps(provider.options),
        }
        for provider in providers
    ]


def flat(values: Mapping[str, Any], separator: str = ".") -> dict[str, Scalar]:
    """Nested values by joined names; what is no text and no number as JSON, so that a plugin without options shows."""
    found: dict[str, Scalar] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            inner = flat(value, separator)
            found.update({f"{clean(name)}{separator}{rest}": leaf for rest, leaf in inner.items()})
        else:
            found[clean(name)] = value if isinstance(value, Scalar) else json.dumps(value)
    return found


def clean(text: str) -> str:
    """Text that UTF-8 can hold: JSON may bring halves of surrogate pairs, and a tool's protobuf refuses them."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


# --- the tool's run ----------------------------------------------------------------------------


def kept_id(run: RunInfo, tool: str, report: StartReport) -> str | None:
    """The id of the tool's run that the interrupted process wrote; None in a new run, or when it wrote none."""
    if report.resumed_step is None:
        return None
    path = _id_file(run, tool)
    return path.read_text(encoding="utf-8").strip() or None if path.exists() else None


def keep_id(run: RunInfo, tool: str, run_id: str) -> None:
    """Keeps the id of the tool's run in the run directory, for a process that goes on with it."""
    _id_file(run, tool).write_text(run_id + "\n", encoding="utf-8")


def _id_file(run: RunInfo, tool: str) -> Path:
    return run.output_dir / f"{tool}-run-id.txt"
