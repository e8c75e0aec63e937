"""Make the examples of a window: the rollout of the run asks the current policy, with everything that it needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from sftx.assembly.stages.data_stages import CollatorStage
from sftx.assembly.stages.rollout_stages import RewardStage, RolloutStage
from sftx.config.options import RunConfig
from sftx.data.sampler import to_json
from sftx.errors import PluginError
from sftx.phases import phase
from sftx.trainer.policy import ModelPolicy
from sftx.trainer.trainer import Trainer
from sftx.types import Question, Rollouts


@dataclass
class RolloutMaker:
    """Makes windows for a `RolloutSampler`. Every process calls it with the same arguments."""

    rollout: RolloutStage
    rewards: Mapping[str, RewardStage]
    trainer: Trainer
    collator: CollatorStage
    stop_ids: Sequence[int]
    config: RunConfig
    check_stop: Callable[[], None] = lambda: None
    """Called between batches, and by a single process between tokens too; it raises when the run is to stop."""
    write: Callable[[int, Rollouts], None] = lambda step, made: None
    """Called on rank 0 with each window, and the number of steps before it."""
    _is_prepared: bool = field(default=False, init=False)

    @property
    def rows_at_once(self) -> int:
        """Rows that fit into memory when they are trained, so that their keys and values do when they are answered."""
        return self.rollout.num_answers * self.config.train.micro_batch_size

    def __call__(self, questions: Sequence[Question], step: int) -> Rollouts:
        """Answer the questions after `step` steps. Raises PluginError, TrainingError."""
        trainer = self.trainer
        group, lm = trainer.process_group, trainer.lm
        if not self._is_prepared:
            with phase("loading", "what rewards need"):
                for reward in self.rewards.values():
                    group.all_or_raise(partial(reward.prepare, lm))
            self._is_prepared = True
        policy = ModelPolicy(
            lm=lm,
            step=step,
            seed=self.config.train.seed,
            rewards=self.rewards,
            reward_weights=self.rollout.reward_weights,
            stop_ids=self.stop_ids,
            generation_batch_size=self.config.generation.batch_size or self.rows_at_once,
            batch_size=self.rows_at_once,
            collator=self.collator,
            process_group=group,
            check_stop=self.check_stop,
        )
        lm.eval()
        try:
            with (
                phase("rollout", f"of step {step + 1}"),
                torch.no_grad(),
                trainer.precision.autocast(),
                group.detect_lost_peers(),
                trainer.strategy.summon_full_params(),
            ):
                made = self.rollout(policy, questions, self.config.train.rows_per_step)
        finally:
            lm.train()
        if group.world_size > 1:
            text = json.dumps([[to_json(example) for example in made.examples], made.metrics])
            if len(set(group.all_gather(hashlib.sha256(text.encode()).hexdigest()))) > 1:
                raise PluginError(
                    f"{self.rollout}: rollout returned other examples in one process than in another; draw random "
                    "numbers from a generator seeded by policy.step"
                )
        group.run_on_rank0(lambda: self.write(step, made))
        return made
