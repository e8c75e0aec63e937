"""The base class of the observers that write to a tracking tool, and the names and values that they share."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from sftx import ConfigError, EvalReport, Observer, Provider, RunInfo, Sample, StartReport, StepReport

Scalar: TypeAlias = str | int | float | bool
ExitStatus: TypeAlias = Literal["finished", "killed", "failed"]

GLOBAL_STEP = "train/global_step"


def import_library(module: str, extra: str) -> Any:
    """Return the module of an optional library. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"needs the library {extra}, which cannot be imported ({error}); pip install 'sftx[{extra}]', or leave the "
            "plugin out"
        ) from error


class Tracker(Observer):
    """An observer that writes to a run of a tracking tool.

    This class decides what is written and when; a subclass writes it. Its constructor must not open anything, because
    `close` undoes only what `begin` opened.
    """

    tool: ClassVar[str]
    """The name of the tool, in the name of the file that keeps the id of its run."""

    def __init__(self, run: RunInfo) -> None:
        self.run = run
        self._step = 0
        self._is_open = False
        self._outcome: ExitStatus = "failed"

    # --- what a subclass implements -------------------------------------------------------------

    @abstractmethod
    def begin(self, report: StartReport) -> None:
        """Open the tool's run, or the one of the interrupted process; write the options and the assembled table."""

    @abstractmethod
    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """Write one value for each name at this step."""

    @abstractmethod
    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Write the answers that the model generated at this step."""

    @abstractmethod
    def log_summary(self, summary: Mapping[str, Scalar], step: int) -> None:
        """Write the results of the run, including the path of the artefact."""

    @abstractmethod
    def finish(self, status: ExitStatus) -> None:
        """Close the tool's run within seconds: the process may be about to be killed."""

    # --- the events of a run --------------------------------------------------------------------

    def on_start(self, report: StartReport) -> None:
        self._step = report.resumed_step or 0
        with _random_state_kept():
            self.begin(report)
        self._is_open = True

    def on_step(self, report: StepReport) -> None:
        self._step = report.step

    def on_log(self, report: StepReport) -> None:
        with _random_state_kept():
            self.log_values(step_values(report), report.step)

    def on_evaluate(self, report: EvalReport) -> None:
        if report.step < self._step:
            return  # the final evaluation of an earlier best step repeats values that were written at that step
        samples = report.samples[: self.run.config["generation"]["num_samples"]]
        with _random_state_kept():
            self.log_values(evaluation_values(report), report.step)
            if samples:
                self.log_samples(samples, report.step)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        values = {name: value for name, value in summary.items() if name != "samples"}
        with _random_state_kept():
            self.log_summary(flatten({"summary": values}, "/"), summary["num_steps"])

        self._outcome = "finished"

    def on_fail(self, error: BaseException) -> None:
        self._outcome = "killed" if isinstance(error, KeyboardInterrupt) else "failed"

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            with _random_state_kept():
                self.finish(self._outcome)

    # --- the id of the tool's run, kept in the run directory for a process that resumes it --------

    def load_run_id(self, report: StartReport) -> str | None:
        """Return the id that the interrupted process saved; None for a new run, or if there is none."""
        path = self._id_file()
        if report.resumed_step is None or not path.exists():
            return None
        return path.read_text(encoding="utf-8").strip() or None

    def save_run_id(self, run_id: str) -> None:
        self._id_file().write_text(run_id + "\n", encoding="utf-8")

    def _id_file(self) -> Path:
        return self.run.output_dir / f"{self.tool}-run-id.txt"


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the state of `random`, from which tools draw ids and waiting times, so that training stays the same."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


# --- names and values --------------------------------------------------------------------------


def step_values(report: StepReport) -> dict[str, float]:
    """Return the values of the steps since the last log, under the names that transformers' integrations use."""
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
    return {f"train/{replace_surrogates(name)}": value for name, value in {**report.metrics, **own}.items()}


def evaluation_values(report: EvalReport) -> dict[str, float]:
    metrics = {f"eval/{replace_surrogates(name)}": value for name, value in report.metrics.items()}
    return {GLOBAL_STEP: report.step, "eval/runtime": report.seconds, **metrics}


def start_values(report: StartReport) -> dict[str, Scalar]:
    """Return the numbers and names of the start report, such as the number of parameters."""
    values = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    return {name: value for name, value in values.items() if isinstance(value, Scalar)}


def assembled_table(providers: Sequence[Provider]) -> list[dict[str, str]]:
    """Return the table of stages, plugins and options as one dict for each row."""
    return [
        {
            "stage": provider.stage,
            "plugin": provider.plugin,
            "distribution": f"{provider.distribution} {provider.version}",
            "options": json.dumps(provider.options),
        }
        for provider in providers
    ]


def sample_rows(samples: Sequence[Sample]) -> list[dict[str, str]]:
    """Return the shown texts of each sample."""
    return [
        {
            "row": replace_surrogates(sample.row_id),
            "prompt": replace_surrogates(sample.prompt),
            "reference": replace_surrogates(sample.reference),
            "prediction": replace_surrogates(sample.prediction),
        }
        for sample in samples
    ]


def flatten(values: Mapping[str, Any], separator: str = ".") -> dict[str, Scalar]:
    """Return nested values under joined names. Lists, nulls and empty mappings become JSON text, so they are shown."""
    flat: dict[str, Scalar] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            inner = flatten(value, separator)
            flat.update({f"{replace_surrogates(name)}{separator}{rest}": leaf for rest, leaf in inner.items()})
        else:
            flat[replace_surrogates(name)] = value if isinstance(value, Scalar) else json.dumps(value)
    return flat


def replace_surrogates(text: str) -> str:
    """Return text that UTF-8 can encode. JSON may hold lone surrogates, which the tools' protobuf refuses."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
