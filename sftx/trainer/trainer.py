"""Steps of examples become optimizer updates.

Each micro-batch's loss is a sum; the whole step's denominator, of all processes, is known on the host before the first
forward, so the same examples give the same update however they are split into micro-batches and among processes.
"""

from __future__ import annotations

import contextlib
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

from sftx.assembly import training_checks
from sftx.config.options import TrainConfig
from sftx.data.balance import deal
from sftx.data.sampler import Steps
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import TrainingError, is_out_of_memory
from sftx.events import StepReport
from sftx.model.language_model import LanguageModel
from sftx.trainer import memory_advice
from sftx.trainer.layers import prepare_layers
from sftx.trainer.optimizer import RunOptimizer
from sftx.trainer.parallel import Engine, TrainStep, engine, whole
from sftx.trainer.precision import Precision, peak_bytes
from sftx.trainer.schedule import learning_rate
from sftx.types import Batch, Collator, Example, Loss, Step

log = logging.getLogger(__name__)

_SCALER: Final = "grad_scaler"


@dataclass(frozen=True)
class MicroBatch:
    """What this process computes at one time."""

    batch: Batch
    counts: bool = True
    """False where this process has no rows left while others have: it computes along, and adds nothing."""


@dataclass(frozen=True)
class Counted:
    """What the micro-batches of a step hold, over all processes."""

    shares: list[float]
    """Of each micro-batch here, its denominator."""
    total: float
    num_label_tokens: int
    num_input_tokens: int


@dataclass
class Trainer:
    """Runs steps on one model. `last_saved` is what an error tells the user to fall back on."""

    lm: LanguageModel
    loss: Loss
    collator: Collator
    config: TrainConfig
    precision: Precision
    num_steps: int
    process_group: ProcessGroup = field(default_factory=ProcessGroup)
    last_saved: str = "none"
    check_stop: Callable[[], None] = lambda: None
    """Called between micro-batches; raises when the run is to stop, and the step that is under way is discarded."""
    engine: Engine = field(init=False)
    optimizer: RunOptimizer = field(init=False)

    def __post_init__(self) -> None:
        prepare_layers(self.lm.model, self.config)
        self.engine = engine(TrainStep(self.lm, self.loss), self.process_group, self.config, self.precision)
        self.optimizer = RunOptimizer(self.lm, self.config)  # of shares, where there are
        self.parameters = [p for p in self.lm.parameters() if p.requires_grad]
        self.scaler = self.precision.grad_scaler()
        self.lm.train()

    def micro_batches(self, step: Step, examples: Sequence[Example]) -> list[MicroBatch]:
        """This process's share of a step, `per_device_train_batch_size` rows at a time, on the host."""
        lengths = [sum(len(examples[index].token_ids) for index in row) for row in step]
        rounds = deal(lengths, self.process_group.world_size, self.config.per_device_train_batch_size)
        shortest = min(range(len(step)), key=lengths.__getitem__)
        micro_batches = []
        for shares in rounds:
            rows = shares[self.process_group.rank]
            chosen = [examples[index] for row in rows or (shortest,) for index in step[row]]
            micro_batches.append(MicroBatch(training_checks.collate(self.collator, chosen), counts=bool(rows)))
        return micro_batches

    def count(self, micro_batches: Sequence[MicroBatch]) -> Counted:
        ours = [one.batch for one in micro_batches if one.counts]
        found = iter(training_checks.denominators(self.loss, ours))
        shares = [next(found) if one.counts else 0.0 for one in micro_batches]
        sums = (
            sum(shares),
            sum(batch.num_label_tokens for batch in ours),
            sum(batch.num_input_tokens for batch in ours),
        )
        total, num_label_tokens, num_input_tokens = self.process_group.all_reduce_sum(sums)
        return Counted(shares, training_checks.total(self.loss, total), int(num_label_tokens), int(num_input_tokens))

    def accumulate(
        self, micro_batches: Sequence[MicroBatch], counted: Counted, number: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradients of one step (counted from 0); returns its mean loss and what else was counted."""
        total = counted.total
        loss = torch.zeros((), device=self.lm.device)
        metrics: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros_like(loss))
        for micro, (one, share) in enumerate(zip(micro_batches, counted.shares, strict=True)):
            self.check_stop()
            self._seed(number, micro * self.process_group.world_size + self.process_group.rank)
            with self.engine.micro_batch_context(last=micro == len(micro_batches) - 1):
                with self.precision.autocast():
                    out = training_checks.loss_sum(self.loss, self.engine(one.batch.to(self.lm.device)))
                counts = float(one.counts)
                objective = out.sum * counts / total
                if out.aux_loss is not None:
                    objective = objective + out.aux_loss * (share / total)
                    metrics["aux_loss"] += out.aux_loss.detach() * (share / total)
                self.scaler.scale(objective * self.engine.gradient_scale).backward()
            loss += out.sum.detach() * counts / total
            for name, value in out.metrics.items():
                metrics[name] += value.detach() * counts / total
        self.engine.sync_gradients()
        names = self.process_group.all_gather_names(metrics)
        added = self.engine.all_reduce(torch.stack([loss, *(metrics[name].to(loss) for name in names)]))
        return added[0], dict(zip(names, added[1:], strict=True))

    def step(self, number: int, epoch: float, micro_batches: Sequence[MicroBatch]) -> StepReport:
        """One optimizer step, counted from 1. Raises TrainingError when the loss or its gradient is not finite."""
        start = time.perf_counter()
        rate = learning_rate(self.config, number - 1, self.num_steps)
        self.optimizer.set_learning_rate(rate)
        counted = self.count(micro_batches)
        batches = [one.batch for one in micro_batches]
        with (
            self.process_group.detect_lost_peers(),
            self._memory_explained(number, lambda: memory_advice.of_step(self.config, batches)),
        ):
            loss, norm, metrics = self._finite_gradients(number, micro_batches, counted)
        means = {name: value.item() for name, value in metrics.items()}
        reported = training_checks.means(self.loss, means, f"step {number}")
        if self.scaler.is_enabled():
            reported["loss_scale"] = self.scaler.get_scale()
        with self._memory_explained(number, lambda: memory_advice.of_optimizer(self.config, self.parameters)):
            self.optimizer.step()
        self.scaler.update()
        return StepReport(
            step=number,
            num_steps=self.num_steps,
            epoch=epoch,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            num_label_tokens=counted.num_label_tokens,
            num_input_tokens=counted.num_input_tokens,
            seconds=time.perf_counter() - start,
            peak_bytes=int(self.process_group.all_reduce_max(peak_bytes(self.lm.device))),
            metrics=reported,
        )

    def _finite_gradients(
        self, number: int, micro_batches: Sequence[MicroBatch], counted: Counted
    ) -> tuple[float, float, dict[str, Tensor]]:
        """A step's mean loss, the norm of its clipped gradients before clipping, and what else was counted.

        Where float16 was too narrow for the gradients, the same micro-batches are computed again with a smaller loss
        scale: no row goes without its update, and as seeds stand for their place, nothing else changes.
        """
        while True:
            self.optimizer.zero_grad()
            loss, metrics = self.accumulate(micro_batches, counted, number - 1)
            for optimizer in self.optimizer.optimizers:
                self.scaler.unscale_(optimizer)
            norm = whole(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf))
            # The one wait for the device in a step: an update by a gradient that is not finite cannot be undone.
            loss_value, norm_value = torch.stack((loss, norm.to(loss))).tolist()
            if math.isfinite(loss_value) and math.isfinite(norm_value):
                return loss_value, norm_value, metrics
            if not (math.isfinite(loss_value) and self._lower_scale(number)):
                ours = [row for one in micro_batches if one.counts for row in one.batch.row_ids]
                rows = [row for rows in self.process_group.all_gather(ours) for row in rows]
                error = TrainingError(self._not_finite(number, loss_value, norm_value, rows))
                error.is_shared = True  # the sums are everybody's
                raise error

    def _lower_scale(self, number: int) -> bool:
        """Halves the loss scale; returns whether there is one, the gradients asked for it, and it is 1 at least."""
        before = self.scaler.get_scale()
        self.scaler.update()
        after = self.scaler.get_scale()
        if not 1 <= after < before:
            return False
        log.info("step %d: gradients overflowed at a loss scale of %g; computed again at %g", number, before, after)
        return True

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the next step depends on besides weights and data: tensors by name, and JSON values."""
        tensors, values = self.optimizer.state_dict()
        return tensors, values | ({_SCALER: self.scaler.state_dict()} if self.scaler.is_enabled() else {})

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave. Raises ModelError when it is of other parameters."""
        self.optimizer.load_state_dict(tensors, {name: value for name, value in values.items() if name != _SCALER})
        if self.scaler.is_enabled() and _SCALER in values:
            self.scaler.load_state_dict(values[_SCALER])

    def _seed(self, number: int, micro: int) -> None:
        """Makes whatever is random in the coming forward a pure function of the run's seed and its place."""
        seed = random.Random(f"forward {self.config.seed} {number} {micro}").getrandbits(63)
        self.lm.seed.fill_(seed)
        torch.manual_seed(seed)

    @contextlib.contextmanager
    def _memory_explained(self, number: int, what: Callable[[], str]) -> Iterator[None]:
        """Raises TrainingError when memory runs out within: for `what`, and what to do."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"step {number}: {self.lm.device} has not the memory for {what()}; last saved: {self.last_saved}"
            ) from error

    def _not_finite(self, number: int, loss: float, norm: float, rows: Sequence[str]) -> str:
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        return (
            f"step {number}: the loss is {loss:g} and the gradient's norm {norm:g}; no update was made; rows: {shown}; "
            f"last saved: {self.last_saved}; lower learning_rate, or look at these rows"
        )


def train(trainer: Trainer, plan: Steps, done: int, after_step: Callable[[StepReport], bool]) -> None:
    """Runs the plan from where it stands, `done` steps after its beginning.

    `after_step` reports, saves and evaluates; it returns whether to go on.
    """
    steps = iter(plan)

    def read() -> tuple[float, list[MicroBatch]] | None:
        planned = next(steps, None)
        return None if planned is None else (planned[0], trainer.micro_batches(*planned[1:]))

    number = done
    # A source that is gone, or a collator that fails, may be so in one process alone.
    while (found := trainer.process_group.all_or_raise(read)) is not None:
        number += 1
        if not after_step(trainer.step(number, *found)):
            return
