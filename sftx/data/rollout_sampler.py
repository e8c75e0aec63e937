"""The steps of a run with a rollout: windows of questions, whose examples come from the current policy.

The questions of a window are pure in the seed and the epoch; its examples depend on the model as well. So a checkpoint
within a window has its examples.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sftx.assembly.stages.data_stages import CollatorStage
from sftx.assembly.stages.rollout_stages import RolloutStage
from sftx.config.options import TrainConfig
from sftx.data.dataset import Examples
from sftx.data.sampler import Draw, PlannedScope, PlannedStep, from_json, lengths_and_groups, to_json
from sftx.types import Example, Question, Rollouts, Step, Window


class RolloutSampler:
    """The steps of a run whose rows are questions.

    An epoch takes each question once, in a random order. A window has the questions of `steps_per_rollout` steps; its
    steps are trained `num_iterations` times, then the next window is made.
    """

    def __init__(
        self,
        examples: Examples,
        questions: Sequence[Question],
        collator: CollatorStage,
        config: TrainConfig,
        rollout: RolloutStage,
        draw: Draw,
    ) -> None:
        """`examples`: the prompts of the questions; `draw` chooses those of an epoch."""
        assert len(examples) == len(questions)
        self.examples: Sequence[Example] = examples
        self._questions = questions
        self._collator = collator
        self._config = config
        self._rollout = rollout
        self._draw = draw
        self.make: Callable[[Sequence[Question], int], Rollouts] | None = None
        """Makes the examples of questions after so many steps. Every process calls it; set when the model is there."""
        self._epoch, self._window = 0, 0
        """The current epoch, and the number of the window within it."""
        self._before = 0
        """Steps before the current window."""
        self._next = 0
        """Steps that are not yielded any more."""
        self._order: tuple[int, list[int]] | None = None
        self._made: Rollouts | None = None
        self._state_before: dict[str, Any] = {}
        """What the rollout remembered before it made the current window."""
        self._steps: list[Step] = []
        first = self._order_of(0)
        per_epoch = math.ceil(len(first) / config.rows_per_step) * rollout.num_iterations
        self.num_steps = config.max_steps or max(1, round(config.num_train_epochs * per_epoch))
        lengths = examples.lengths[first]
        self.scope = PlannedScope(
            num_examples=len(first),
            num_label_tokens=0,
            num_input_tokens=int(lengths.sum()),
            num_steps=per_epoch,
            longest=int(lengths.max(initial=0)) + rollout.max_new_tokens,
            largest_id=examples.largest_id,
        )

    def _order_of(self, epoch: int) -> list[int]:
        """Return the questions of an epoch in their order."""
        if self._order is None or self._order[0] != epoch:
            order = self._draw(epoch)[0].tolist()
            random.Random(f"questions {self._config.seed} {epoch}").shuffle(order)
            self._order = epoch, order
        return self._order[1]

    def _window_questions(self) -> list[int]:
        size = self._config.rows_per_step * self._rollout.steps_per_rollout
        return self._order_of(self._epoch)[self._window * size : (self._window + 1) * size]

    @property
    def _window_steps(self) -> int:
        """Return the optimizer steps of the current window."""
        return math.ceil(len(self._window_questions()) / self._config.rows_per_step) * self._rollout.num_iterations

    def prepare(self) -> None:
        """Make the examples of the next step's window, unless they are there. Every process calls it."""
        assert self.make is not None
        if self._next >= self.num_steps:
            return
        if self._next - self._before >= self._window_steps:
            self._before, self._window, self._made = self._next, self._window + 1, None
            if not self._window_questions():
                self._epoch, self._window = self._epoch + 1, 0
        if self._made is None:
            self._state_before = self._rollout.state_dict()
            self._use(self.make([self._questions[number] for number in self._window_questions()], self._before))

    def _use(self, made: Rollouts) -> None:
        """Plan the steps of a window. Each has the examples of its own questions, in rows that the collator chooses."""
        self._made = made
        self._lengths, groups = lengths_and_groups(made.examples)
        self._steps = []
        for number in range(self._window_steps // self._rollout.num_iterations):
            members = np.flatnonzero(groups // self._config.rows_per_step == number)
            rows_per_step = len(set(groups[members].tolist()))
            planned, _ = self._collator.plan(
                Window(
                    lengths=self._lengths[members].tolist(),
                    groups=groups[members].tolist(),
                    rows_per_step=rows_per_step,
                    seed=self._config.seed,
                    epoch=self._epoch,
                    index=self._before + number,
                )
            )
            # As many rows as questions fit into one step; a collator that makes several still trains them together.
            rows = (row for step in planned for row in step)
            self._steps.append(tuple(tuple(int(members[at]) for at in row) for row in rows))

    def __iter__(self) -> Iterator[PlannedStep]:
        per_epoch = math.ceil(len(self._order_of(self._epoch)) / self._config.rows_per_step)
        size = self._rollout.steps_per_rollout * self._rollout.num_iterations
        while self._next < self.num_steps:
            self.prepare()
            assert self._made is not None
            at = self._next - self._before
            self._next += 1
            in_epoch = self._window * size + at + 1
            yield PlannedStep(
                epoch=self._epoch + in_epoch / (per_epoch * self._rollout.num_iterations),
                rows=self._steps[at % len(self._steps)],
                examples=self._made.examples,
                lengths=self._lengths,
                metrics=self._made.metrics,
            )

    def state_dict(self, done: int) -> dict[str, Any]:
        """Return the place in the questions, and the window's examples where some of its steps are still to come.

        A window of which no step is done is made again.
        """
        is_within = self._made is not None and self._before < done < self._before + self._window_steps
        made = self._made if is_within else None
        is_new = self._made is not None and done == self._before
        return {
            "epoch": self._epoch,
            "window": self._window,
            "steps_before": self._before,
            "done": done,
            "examples": None if made is None else [to_json(example) for example in made.examples],
            "metrics": None if made is None else dict(made.metrics),
            "rollout": self._state_before if is_new else self._rollout.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._window = state["epoch"], state["window"]
        self._before, self._next = state["steps_before"], state["done"]
        self._made = None
        self._rollout.load_state_dict(state["rollout"])
        if state["examples"] is not None:
            self._use(Rollouts([from_json(example) for example in state["examples"]], (), state["metrics"]))


def with_room_for_answers(examples: Sequence[Example], rollout: RolloutStage) -> list[Example]:
    """Return examples as long as those that a rollout may make of these prompts: to plan memory, not to train on."""
    longest = []
    for example in examples:
        length, answer = len(example.token_ids), rollout.max_new_tokens
        one = dataclasses.replace(
            example,
            token_ids=np.append(example.token_ids, np.full(answer, example.token_ids[-1])),
            loss_mask=np.append(np.zeros(length, np.bool_), np.ones(answer, np.bool_)),
        )
        longest += [one] * rollout.num_answers
    return longest
