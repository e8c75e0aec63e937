"""Every step and evaluation as a line of `metrics.jsonl` in the run directory."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftx import EvalReport, Observer, RunInfo, StartReport, StepReport, hookimpl


@dataclass(frozen=True, eq=False)
class JsonLines:
    """Writes metrics.jsonl: a line a step (`event: step`) and an evaluation (`event: evaluate`)."""

    @hookimpl
    def sftx_observer(self, run: RunInfo) -> Observer:
        return _Writer(run.output_dir / "metrics.jsonl")


class _Writer(Observer):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._resumed_step: int | None = None

    def on_start(self, report: StartReport) -> None:
        """Begins the file anew; in a run that goes on, with what was told up to the step that it goes on from."""
        self._resumed_step = report.resumed_step
        kept, last = [], 0
        for line in self._lines() if report.resumed_step is not None else ():
            if line["step"] > report.resumed_step or line["step"] < last:  # later, or of the end: of the best step
                break
            kept.append(line)
            last = line["step"]
        self._replace(kept)

    def on_step(self, report: StepReport) -> None:
        self._resumed_step = None
        values = dataclasses.asdict(report)
        metrics = values.pop("metrics")
        self._write({"event": "step", **values, **metrics, "tokens_per_second": report.tokens_per_second})

    def on_evaluate(self, report: EvalReport) -> None:
        if report.step == self._resumed_step:  # told before, perhaps, by a process that was killed afterwards
            told = ("evaluate", report.step)
            self._replace([line for line in self._lines() if (line["event"], line["step"]) != told])
        self._write({"event": "evaluate", "step": report.step, **report.metrics, "seconds": report.seconds})

    def _lines(self) -> list[dict[str, Any]]:
        """What is there, up to a line that was cut off in the middle."""
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def _replace(self, lines: Sequence[Mapping[str, Any]]) -> None:
        part = self._path.with_name(f".{self._path.name}.part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)

    def _write(self, values: Mapping[str, Any]) -> None:
        # Opened anew for each line, so that a run that is killed has written all that it reported.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
