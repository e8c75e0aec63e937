"""Every step and evaluation as one line of `metrics.jsonl` in the run directory."""

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
        self._resumed_step = report.resumed_step
        kept, last_step = [], 0
        for line in self._read() if report.resumed_step is not None else ():
            # A smaller step than the last one is the final evaluation of an earlier best step.
            if line["step"] > report.resumed_step or line["step"] < last_step:
                break
            kept.append(line)
            last_step = line["step"]
        self._replace(kept)

    def on_step(self, report: StepReport) -> None:
        self._resumed_step = None
        values = dataclasses.asdict(report)
        metrics = values.pop("metrics")
        self._append({"event": "step", **values, **metrics, "tokens_per_second": report.tokens_per_second})

    def on_evaluate(self, report: EvalReport) -> None:
        if report.step == self._resumed_step:  # a process killed after the evaluation may have written it already
            repeated = ("evaluate", report.step)
            self._replace([line for line in self._read() if (line["event"], line["step"]) != repeated])
        self._append({"event": "evaluate", "step": report.step, **report.metrics, "seconds": report.seconds})

    def _read(self) -> list[dict[str, Any]]:
        """Return the lines of the file up to the first incomplete one."""
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        lines = []
        for line in text.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def _replace(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the file anew, atomically."""
        part = self._path.with_name(f".{self._path.name}.part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)

    def _append(self, values: Mapping[str, Any]) -> None:
        # The file is opened for each line, so that a killed run has written all that it reported.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
