"""Every step and evaluation as a line of `metrics.jsonl` in the run directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
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

    def on_start(self, report: StartReport) -> None:
        self._path.touch()

    def on_step(self, report: StepReport) -> None:
        values = dataclasses.asdict(report)
        metrics = values.pop("metrics")
        self._write({"event": "step", **values, **metrics, "tokens_per_second": report.tokens_per_second})

    def on_evaluate(self, report: EvalReport) -> None:
        self._write({"event": "evaluate", "step": report.step, **report.metrics, "seconds": report.seconds})

    def _write(self, values: Mapping[str, Any]) -> None:
        # Opened anew for each line, so that a run that is killed has written all that it reported.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
