"""This module replays the events of a run to an observer, in an empty directory and without training anything.

The observer sees what `sftx run` would send it, in the same order. Changes that it makes to the process are undone.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

from sftx.errors import TrainingError
from sftx.events import EvalReport, RunInfo, Sample, StartReport, StepReport
from sftx.testing.clauses import must_not_raise
from sftx.testing.kit import assembled, make_stage, run_info
from sftx.testing.process import PROCESS, process
from sftx.types import Observer

Event: TypeAlias = tuple[str, tuple[Any, ...]]
"""The name of a method of Observer, and its arguments."""

NUM_STEPS: Final = 2


# --- the events --------------------------------------------------------------------------------


def events(run: RunInfo, *, held_out: bool = True) -> list[Event]:
    """Return the events of a complete run that saves and evaluates after each step."""
    artefact, checkpoints = run.output_dir / "adapter", run.output_dir / "checkpoints"
    all_events: list[Event] = [("on_start", (_start(held_out=held_out),)), ("on_evaluate", (_evaluation(0),))]
    for step in range(1, NUM_STEPS + 1):
        all_events += [
            ("on_step", (_step(step),)),
            ("on_log", (_step(step),)),
            ("on_evaluate", (_evaluation(step),)),
            ("on_save", (step, checkpoints / f"step-{step}")),
        ]
    all_events += [
        ("on_save", (NUM_STEPS, artefact)),
        ("on_end", (summary(artefact, held_out=held_out),)),
        ("close", ()),
    ]
    return [event for event in all_events if held_out or event[0] != "on_evaluate"]


def interrupted(run: RunInfo, last: str | None) -> list[Event]:
    """Return the events of a run that failed after its first event `last`, or before it started (None)."""
    all_events = events(run)
    names = [name for name, _ in all_events]
    happened = all_events[: 0 if last is None else names.index(last) + 1]
    return [*happened, ("on_fail", (TrainingError("step 2: the loss is nan"),)), all_events[-1]]


def _start(*, held_out: bool) -> StartReport:
    return StartReport(
        providers=deepcopy(assembled()[1]),
        model="tiny",
        device="cpu",
        dtype="float32",
        num_parameters=40_000,
        num_trainable=4_000,
        num_rows=8,
        num_examples=7,
        num_label_tokens=90,
        num_input_tokens=200,
        num_eval_rows=2 if held_out else 0,
        formats={"messages": 8},
        ledger=("1 of 8 rows dropped: longer than data.max_length (rows.jsonl:3)",),
        num_steps=NUM_STEPS,
        tokens_per_step=45.0,
    )


def _step(number: int) -> StepReport:
    return StepReport(
        step=number,
        num_steps=NUM_STEPS,
        epoch=number / NUM_STEPS,
        loss=3.0 / number,
        grad_norm=1.5,
        learning_rate=1e-4,
        num_label_tokens=45,
        num_input_tokens=100,
        seconds=0.25,
        peak_bytes=500_000_000,
        metrics={"token_accuracy": 0.25 * number, "perplexity": 20.0 / number},
    )


def _evaluation(step: int) -> EvalReport:
    samples = (
        Sample("held-out.jsonl:1", "Name a [red] planet.", "Mars", "Mars" if step else "[/bold]"),
        Sample("held-out.jsonl:2", "你好", "你好！", ""),
    )
    return EvalReport(step, {"loss": 3.0 - step, "exact-match": 0.5 * bool(step)}, samples, 0.5)


def summary(artefact: Path, *, held_out: bool = True) -> dict[str, Any]:
    """Return the content of summary.json after these events."""
    values: dict[str, Any] = {
        "num_steps": NUM_STEPS,
        "loss": {"first": 3.0, "last": 1.5},
        "num_label_tokens": 90,
        "tokens_per_second": 400.0,
        "peak_bytes": 500_000_000,
        "wall_seconds": 1.5,
        "seconds": {"loading": 0.5, "training": 0.75, "other": 0.25},
        "artefact": str(artefact),
    }
    if held_out:
        before, after = _evaluation(0), _evaluation(NUM_STEPS)
        values["held_out"] = {"before": dict(before.metrics), "after": dict(after.metrics)}
        values["samples"] = [
            {
                "row": a.row_id,
                "prompt": a.prompt,
                "reference": a.reference,
                "before": a.prediction,
                "after": b.prediction,
            }
            for a, b in zip(before.samples, after.samples, strict=True)
        ]
    return values


# --- sending events ----------------------------------------------------------------------------


@dataclass
class Case:
    """One plugin, whose hook makes an observer for each clause."""

    plugin: object

    def observer(self, run: RunInfo) -> Observer:
        return cast(Observer, make_stage(self.plugin, "sftx_observer", run=run))

    def play(self, run: RunInfo, *, held_out: bool = True) -> dict[Path, bytes]:
        """Send a new observer all events of a run, and return the files of the run directory. Raises ClauseError."""
        observer = self.observer(run)
        for event in events(run, held_out=held_out):
            send(observer, event, run)
        return files(run.output_dir)

    @cached_property
    def first_run(self) -> dict[Path, bytes]:
        """The files that the first run of this process leaves in its directory."""
        with workplace() as directory:
            return self.play(run_info(directory))


def send(observer: Observer, event: Event, run: RunInfo) -> None:
    """Send an event, after writing the files that a run writes before it. Raises ClauseError when it fails."""
    name, arguments = event
    if name == "on_start":
        _write(run.output_dir, "run.yaml", "manifest.json", "ledger.jsonl")
    elif name == "on_save":
        _write(arguments[1], "adapter_config.json", "tokenizer.json")
    elif name == "on_end":
        _write(run.output_dir, "summary.json")
    with must_not_raise(name, "a run switches off an observer that raises, so handle any values that reports may hold"):
        getattr(observer, name)(*arguments)


_CONTENT: Final = "{}\n"


def _write(directory: Path, *names: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text(_CONTENT, encoding="utf-8")


def engine_files() -> dict[Path, bytes]:
    """Return the files that a complete run writes into its directory, by path."""
    names = ["run.yaml", "manifest.json", "ledger.jsonl", "summary.json"]
    for artefact in ("adapter", "checkpoints/step-1", "checkpoints/step-2"):
        names += [f"{artefact}/adapter_config.json", f"{artefact}/tokenizer.json"]
    return {Path(name): _CONTENT.encode() for name in names}


def files(directory: Path) -> dict[Path, bytes]:
    """Return the files below a directory by relative path."""
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


class _Screen(io.StringIO):
    """A text stream that says whether it is a terminal."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@contextlib.contextmanager
def workplace(*, terminal: bool = True) -> Iterator[Path]:
    """Enter an empty working directory and capture the output; the state of the process is restored afterwards."""
    before = process()
    with (
        tempfile.TemporaryDirectory(prefix="sftx-observer-", ignore_cleanup_errors=True) as directory,
        contextlib.redirect_stdout(_Screen(terminal=terminal)),
        contextlib.redirect_stderr(_Screen(terminal=terminal)),
        contextlib.chdir(directory),
    ):
        try:
            yield Path(directory)
        finally:
            for name, value in before.items():
                if PROCESS[name][0]() != value:
                    PROCESS[name][1](value)
