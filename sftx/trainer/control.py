"""Decide after each step whether the run evaluates, saves or stops, in the words of transformers' TrainerControl.

The options of the run decide, and control plugins, whose decisions are recorded in the run's state.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from sftx.assembly.stages.control_stage import ControlStage
from sftx.checkpoint.run_state import RunState
from sftx.config.options import TrainConfig
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import printable
from sftx.events import Decision

log = logging.getLogger(__name__)

_DEFAULT_SAVE_MINUTES: Final = 30.0
"""Minutes between two checkpoints of a run that sets neither save_steps nor save_minutes."""


class TrainerControl:
    """Answers what is due, from the options, the state of the run and the clock of rank 0."""

    def __init__(
        self,
        config: TrainConfig,
        num_steps: int,
        process_group: ProcessGroup,
        controls: Mapping[str, ControlStage],
        *,
        has_controls: bool,
    ) -> None:
        """`controls`: the control plugins on rank 0, none on the others, for which `has_controls` is the same."""
        self._config = config
        self.controls = controls
        self._has_controls = has_controls
        self._num_steps = num_steps
        self._process_group = process_group
        self.saved_at = time.monotonic()
        """time.monotonic() at the last checkpoint, or at the start."""

    def should_evaluate(self, state: RunState) -> bool:
        """Return whether `eval_steps` asks for an evaluation now; the last step is always evaluated, and none twice."""
        every = self._config.eval_steps
        is_done = state.latest is not None and state.latest.step >= state.step
        return not is_done and ((every is not None and state.step % every == 0) or self.should_stop(state))

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
        """Return whether all steps are done, or a control plugin has stopped the run."""
        return bool(state.stopped) or state.step >= self._num_steps

    def decide(self, state: RunState, ask: Callable[[ControlStage], Decision | None]) -> Decision:
        """Ask every control plugin on rank 0, record what they decide, and return it as one, the same on every rank."""

        def asked() -> list[tuple[str, Decision]]:
            made = ((name, ask(control)) for name, control in self.controls.items())
            return [(name, decision) for name, decision in made if decision is not None]

        if not self._has_controls:
            return Decision()
        decisions = self._process_group.run_on_rank0(asked)
        for name, decision in decisions:
            reason = " ".join(printable(decision.reason).split())
            why = f"{name}: {reason}" if reason else name
            if decision.rate_factor is not None and decision.rate_factor != state.rate_factors.get(name, 1.0):
                state.rate_factors[name] = decision.rate_factor
                log.info("step %d: the learning rate is multiplied by %g (%s)", state.step, decision.rate_factor, why)
            if decision.stop:
                state.stopped = state.stopped or why
        return Decision(
            evaluate=any(decision.evaluate for _, decision in decisions),
            save=any(decision.save for _, decision in decisions),
            stop=bool(state.stopped),
        )

    def record(self, state: RunState) -> None:
        """Put into the state what the control plugins remember, before it is saved."""
        if not self._has_controls:
            return
        state.controls = self._process_group.run_on_rank0(
            lambda: {name: control.state_dict() for name, control in self.controls.items()}
        )

    def restore(self, state: RunState) -> None:
        """Give the control plugins what they remembered when the state was saved."""
        for name, control in self.controls.items():
            if name in state.controls:
                control.load_state_dict(state.controls[name])
