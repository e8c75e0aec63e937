"""Every step and evaluation as one line of `metrics.jsonl` in the run directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftx import EvalReport, Observer, RunInfo, StartReport, StepReport, hookimpl


@dataclass(frozen=True, eq=False)
class JsonLines:
    """Writes metrics.jsonl: one line for each step (`event: step`) and each evaluation (`event: evaluate`)."""

    @hookimpl
    def sftx_observer(self, run: RunInfo) -> Observer:
        return _Writer(run.output_dir / "metrics.jsonl")


class _Writer(Observer):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._resumed_step: int | None = None

    def on_start(self, report: StartReport) -> None:
        """Start an empty file. A resumed run keeps the lines up to the step that it resumes from."""
        self._resumed_step, last_step = report.resumed_step, 0

        def belongs(line: Mapping[str, Any]) -> bool:
            # A smaller step than the last one is the final evaluation of an earlier best step.
            nonlocal last_step
            is_next = report.resumed_step is not None and last_step <= line["step"] <= report.resumed_step
            last_step = line["step"]
            return is_next

        self._cut(belongs)

    def on_step(self, report: StepReport) -> None:
        self._resumed_step = None
        values = dataclasses.asdict(report)
        metrics = values.pop("metrics")
        self._append({"event": "step", **values, **metrics, "tokens_per_second": report.tokens_per_second})

    def on_evaluate(self, report: EvalReport) -> None:
        if report.step == self._resumed_step:  # a process killed after the evaluation may have written it already
            repeated = ("evaluate", report.step)
            self._cut(lambda line: (line["event"], line["step"]) != repeated)
        self._append({"event": "evaluate", "step": report.step, **report.metrics, "seconds": report.seconds})

    def _cut(self, belongs: Callable[[Mapping[str, Any]], bool]) -> None:
        """Cut the file off before the first line that is incomplete or does not belong there."""
        with self._path.open("a+b") as file:
            file.seek(0)
            num_bytes = 0
            for line in file:
                try:
                    if not (line.endswith(b"\n") and belongs(json.loads(line))):
                        break
                except ValueError:
                    break
                num_bytes += len(line)
            file.truncate(num_bytes)

    def _append(self, values: Mapping[str, Any]) -> None:
        # The file is opened for each line, so that a killed run has written all that it reported.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
