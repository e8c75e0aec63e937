"""Train on planned steps: micro-batches, accumulation, clipping and the optimizer update.

Each micro-batch's loss is a sum. The denominator of the whole step, over all ranks, is known on the host before the
first forward, so that the same examples give the same update however they are split into micro-batches and among ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from sftx.assembly.stages.data_stages import CollatorStage
from sftx.assembly.stages.loss_stage import LossStage
from sftx.assembly.stages.optimizer_stages import OptimizerStage, ScheduleStage
from sftx.config.options import TrainConfig
from sftx.data.example_values import Values
from sftx.data.sampler import PlannedStep, Sampler, split_step
from sftx.distributed.dtensor import full_tensor
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import TrainingError, is_out_of_memory
from sftx.events import StepReport
from sftx.model.language_model import CausalLM
from sftx.trainer import memory_advice
from sftx.trainer.layers import prepare_layers
from sftx.trainer.optimizer import RunOptimizer
from sftx.trainer.parallel import ParallelStrategy, TrainStep, build_strategy
from sftx.trainer.parameter_groups import trainable_params
from sftx.trainer.precision import Precision, peak_bytes
from sftx.trainer.schedule import learning_rate
from sftx.types import Batch, LossSum

log = logging.getLogger(__name__)

_SCALER: Final = "grad_scaler"


@dataclass(frozen=True)
class MicroBatch:
    """A batch that this rank computes at once."""

    batch: Batch
    denominator: float
    """The number that its loss is a sum over."""
    is_counted: bool = True
    """False where this rank has no rows left while others have: it takes part in their collectives and adds nothing."""


@dataclass
class Trainer:
    """Runs optimizer steps on one model."""

    lm: CausalLM
    loss: LossStage
    collator: CollatorStage
    builder: OptimizerStage
    schedule: ScheduleStage
    config: TrainConfig
    precision: Precision
    num_steps: int
    process_group: ProcessGroup = field(default_factory=ProcessGroup)
    last_saved: str = "none"
    """The checkpoint that an error tells the user to fall back on."""
    check_stop: Callable[[], None] = lambda: None
    """Called between micro-batches. It raises when the run is to stop, and the current step is discarded."""
    needs_gradient: bool = True
    """False where a step may have no gradient: all answers of a rollout can have the same reward."""
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    """Factors of the learning rate that control plugins have decided on."""
    precomputed: Values | None = None
    """What the loss computed of every example before the first step."""
    strategy: ParallelStrategy = field(init=False)
    optimizer: RunOptimizer = field(init=False)

    def __post_init__(self) -> None:
        prepare_layers(self.lm.model, self.config)
        self.strategy = build_strategy(TrainStep(self.lm, self.loss), self.process_group, self.config, self.precision)
        # After sharding: its state is that of the shards.
        self.optimizer = RunOptimizer(trainable_params(self.lm, self.config), self.builder)
        self.parameters = [p for p in self.lm.parameters() if p.requires_grad]
        self.scaler = self.precision.grad_scaler()
        self.lm.train()

    def train(self, sampler: Sampler, done: int, after_step: Callable[[StepReport], bool]) -> None:
        """Train on the steps of the sampler, which continues after `done` steps of the run.

        `after_step` reports, evaluates and saves; it returns whether to continue.
        """
        steps = iter(sampler)

        def next_step() -> tuple[PlannedStep, list[MicroBatch]] | None:
            planned = next(steps, None)
            return None if planned is None else (planned, self.micro_batches(planned))

        number = done
        while True:
            start = time.perf_counter()
            sampler.prepare()
            # A source that is gone, or a collator that fails, may be so on one rank alone.
            step = self.process_group.all_or_raise(next_step)
            if step is None:
                return
            number += 1
            planned, micro_batches = step
            report = self.train_step(number, planned.epoch, micro_batches)
            seconds = time.perf_counter() - start
            if not after_step(
                dataclasses.replace(report, seconds=seconds, metrics={**planned.metrics, **report.metrics})
            ):
                return

    def micro_batches(self, planned: PlannedStep) -> list[MicroBatch]:
        """Collate this rank's micro-batches of a step, on the host. Examples of other ranks are not decoded."""
        rows, examples = planned.rows, planned.examples
        lengths = [int(planned.lengths[list(row)].sum()) for row in rows]
        shortest = min(range(len(rows)), key=lengths.__getitem__)
        micro_batches = []
        for shards in split_step(lengths, self.process_group.world_size, self.config.micro_batch_size):
            own = shards[self.process_group.rank]
            indices = [index for row in own or (shortest,) for index in rows[row]]
            chosen = [examples[index] for index in indices]
            batch = self.collator.collate(chosen)
            if self.precomputed is not None:
                batch = self.precomputed.add_to(batch, indices, chosen)
            if self.loss.has_extras:
                batch = self.loss.with_extras(batch)
            micro_batches.append(MicroBatch(batch, self.loss.denominator(batch) if own else 0.0, bool(own)))
        return micro_batches

    def train_step(self, number: int, epoch: float, micro_batches: Sequence[MicroBatch]) -> StepReport:
        """Run one optimizer step, counted from 1. Raises TrainingError when loss or gradient are not finite."""
        start = time.perf_counter()
        rate = learning_rate(self.schedule, self.config, number - 1, self.num_steps) * math.prod(
            self.rate_factors.values()
        )
        self.optimizer.set_learning_rate(rate)
        batches = [one.batch for one in micro_batches]
        counted = [one.batch for one in micro_batches if one.is_counted]
        denominator, num_label_tokens, num_input_tokens = self.process_group.all_reduce_sum(
            (
                sum(one.denominator for one in micro_batches),
                sum(batch.num_label_tokens for batch in counted),
                sum(batch.num_input_tokens for batch in counted),
            )
        )
        self.loss.check_total(denominator)
        with (
            self.process_group.detect_lost_peers(),
            self._explain_out_of_memory(number, lambda: memory_advice.step_advice(self.config, batches)),
        ):
            loss, norm, metrics = self._finite_gradients(number, micro_batches, denominator)
        if number == 1:
            self._check_gradients(norm)
        means = self.loss.metric_means({name: value.item() for name, value in metrics.items()}, denominator)
        reported = self.loss.report_means(means, f"step {number}")
        if self.scaler.is_enabled():
            reported["loss_scale"] = self.scaler.get_scale()
        with self._explain_out_of_memory(number, lambda: memory_advice.optimizer_advice(self.builder, self.parameters)):
            self.optimizer.step()
        self.scaler.update()
        return StepReport(
            step=number,
            num_steps=self.num_steps,
            epoch=epoch,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            num_label_tokens=int(num_label_tokens),
            num_input_tokens=int(num_input_tokens),
            seconds=time.perf_counter() - start,
            peak_bytes=int(self.process_group.all_reduce_max(peak_bytes(self.lm.device))),
            metrics=reported,
        )

    def _finite_gradients(
        self, number: int, micro_batches: Sequence[MicroBatch], denominator: float
    ) -> tuple[float, float, dict[str, Tensor]]:
        """Compute gradients; return the step's mean loss, the gradient norm before clipping, and the loss's metrics.

        When gradients overflow in float16, the same micro-batches are computed again with a smaller loss scale: no row
        goes without its update, and as the seeds depend on the place of a micro-batch, nothing else changes.
        """
        while True:
            self.optimizer.zero_grad()
            loss, metrics = self.accumulate(micro_batches, denominator, number - 1)
            for optimizer in self.optimizer.optimizers:
                self.scaler.unscale_(optimizer)
            norm = full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf))
            # The only synchronisation with the device in a step, but for metrics that a loss counts itself: an update
            # by a gradient that is not finite cannot be undone.
            loss_value, norm_value = torch.stack((loss, norm.to(loss))).tolist()
            if math.isfinite(loss_value) and math.isfinite(norm_value):
                return loss_value, norm_value, metrics
            if not (math.isfinite(loss_value) and self._lower_loss_scale(number)):
                own_rows = [row for one in micro_batches if one.is_counted for row in one.batch.row_ids]
                rows = [row for gathered in self.process_group.all_gather(own_rows) for row in gathered]
                shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
                error = TrainingError(
                    f"step {number}: the loss is {loss_value:g} and the gradient's norm {norm_value:g}; no update was "
                    f"made; rows: {shown}; last saved: {self.last_saved}; lower learning_rate, or look at these rows"
                )
                error.is_shared = True  # every rank has the same sums
                raise error

    def _check_gradients(self, norm: float) -> None:
        """Raise TrainingError when the first step would train nothing; warn of parameters that it leaves out."""
        trained = {name: p for name, p in self.lm.named_parameters() if p.requires_grad}
        without = [name for name, parameter in trained.items() if parameter.grad is None]
        if norm == 0 and not self.needs_gradient:
            log.warning("step 1: the gradient is 0: the answers to each question have the same reward")
        elif norm == 0:
            error = TrainingError(
                f"step 1: the gradient of all {len(trained)} trained tensors is 0, so nothing would be trained; the "
                "forward does not use them, or the loss does not depend on the model"
            )
            error.is_shared = True  # every rank has the same norm
            raise error
        if without:
            log.warning(
                "%d of %d trained tensors get no gradient and stay as they are (first: %s)",
                len(without), len(trained), without[0],
            )  # fmt: skip

    def accumulate(
        self, micro_batches: Sequence[MicroBatch], denominator: float, number: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up the gradients of one step, counted from 0; return its mean loss and its metrics as sums."""
        loss = torch.zeros((), device=self.lm.device)
        sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros_like(loss))

        def seed_forward(index: int) -> None:
            self.check_stop()
            # Randomness in a forward is a pure function of the run's seed and the place of the micro-batch.
            place = index * self.process_group.world_size + self.process_group.rank
            seed = random.Random(f"forward {self.config.seed} {number} {place}").getrandbits(63)
            self.lm.seed.fill_(seed)
            torch.manual_seed(seed)

        def seeded() -> Iterator[tuple[Batch, bool]]:
            for index, one in enumerate(micro_batches):
                seed_forward(index)
                yield one.batch, one.is_counted

        with self.precision.autocast():
            statistics = self.strategy.statistics(seeded())
        for index, one in enumerate(micro_batches):
            seed_forward(index)
            batch = dataclasses.replace(one.batch, statistics=statistics)
            with self.strategy.micro_batch_context(last=index == len(micro_batches) - 1):
                with self.precision.autocast():
                    out: LossSum = self.strategy.module(batch.to(self.lm.device))
                is_counted = float(one.is_counted)
                objective = out.sum * is_counted / denominator
                if out.aux_loss is not None:
                    objective = objective + out.aux_loss * (one.denominator / denominator)
                    sums["aux_loss"] += out.aux_loss.detach() * one.denominator
                self.scaler.scale(objective * self.strategy.gradient_scale).backward()
            loss += out.sum.detach() * is_counted / denominator
            for name, value in self.loss.metric_sums(out):
                sums[name] += value * is_counted
        self.strategy.sync_gradients()
        names = self.process_group.all_gather_names(sums)
        summed = self.strategy.all_reduce(torch.stack([loss, *(sums[name].to(loss) for name in names)]))
        return summed[0], dict(zip(names, summed[1:], strict=True))

    def _lower_loss_scale(self, number: int) -> bool:
        """Halve the loss scale; return False when there is none, overflow is not the reason, or it would be below 1."""
        before = self.scaler.get_scale()
        self.scaler.update()
        after = self.scaler.get_scale()
        if not 1 <= after < before:
            return False
        log.info("step %d: gradients overflowed at a loss scale of %g; computed again at %g", number, before, after)
        return True

    @contextlib.contextmanager
    def _explain_out_of_memory(self, number: int, advice: Callable[[], str]) -> Iterator[None]:
        """Turn an out-of-memory error into a TrainingError that says what was too large and what to lower."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"step {number}: {self.lm.device} has not enough memory for {advice()}; last saved: {self.last_saved}"
            ) from error

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the next step depends on besides weights and data: tensors by name, and JSON values."""
        tensors, values = self.optimizer.state_dict()
        return tensors, values | ({_SCALER: self.scaler.state_dict()} if self.scaler.is_enabled() else {})

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continue from a saved state. Raises ModelError when it belongs to other parameters."""
        self.optimizer.load_state_dict(tensors, {name: value for name, value in values.items() if name != _SCALER})
        if self.scaler.is_enabled() and _SCALER in values:
            self.scaler.load_state_dict(values[_SCALER])
