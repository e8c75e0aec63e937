"""Times the steps of a trainer built on transformers' Trainer. It imports no sftx: other interpreters run it."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class Clock(TrainerCallback):  # type: ignore[misc]
    """Writes down when each step ended, the seconds it took and its loss."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append({"seconds": time.perf_counter() - self._start, "ended": time.time()})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.steps[-1]["loss"] = logs["loss"]
