"""Decide after each step whether the run evaluates, saves or stops, in the words of transformers' TrainerControl."""

from __future__ import annotations

import time
from typing import Final

from sftx.checkpoint.run_state import RunState
from sftx.config.options import TrainConfig
from sftx.distributed.process_group import ProcessGroup

_DEFAULT_SAVE_MINUTES: Final = 30.0
"""Minutes between two checkpoints of a run that sets neither save_steps nor save_minutes."""


class TrainerControl:
    """Answers what is due, from the options, the state of the run and the clock of rank 0."""

    def __init__(self, config: TrainConfig, num_steps: int, process_group: ProcessGroup) -> None:
        self._config = config
        self._num_steps = num_steps
        self._process_group = process_group
        self.saved_at = time.monotonic()
        """time.monotonic() at the last checkpoint, or at the start."""

    def should_evaluate(self, state: RunState) -> bool:
        """Return whether `eval_steps` asks for an evaluation now; the last step is always evaluated, and none twice."""
        every = self._config.eval_steps
        is_done = state.latest is not None and state.latest.step >= state.step
        return not is_done and ((every is not None and state.step % every == 0) or state.step == self._num_steps)

    def should_save(self, state: RunState) -> bool:
        """Return whether a checkpoint is due by the number of steps or by the clock."""
        every, minutes = self._config.save_steps, self._config.save_minutes
        if every is not None and state.step % every == 0:
            return True
        minutes = _DEFAULT_SAVE_MINUTES if every is None and minutes is None else minutes
        if minutes is None:
            return False
        return self._process_group.run_on_rank0(lambda: time.monotonic() - self.saved_at >= 60 * minutes)

    def should_stop(self, state: RunState) -> bool:
        """Return whether all steps are done, or the metric was no better for `early_stopping_patience` evaluations."""
        patience = self._config.early_stopping_patience
        is_stopped_early = patience is not None and state.num_worse >= patience
        return is_stopped_early or state.step >= self._num_steps
