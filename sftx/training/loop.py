"""Steps of examples become optimizer updates.

Each micro-batch's loss is a sum; the whole step's denominator is known on the host before the first forward, so the
same examples give the same update however they are split into micro-batches.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sftx.config import TrainConfig
from sftx.errors import TrainingError
from sftx.model.language_model import LanguageModel
from sftx.reports import StepReport
from sftx.training import checked
from sftx.training.optimizer import RunOptimizer
from sftx.training.plan import Steps
from sftx.training.precision import Precision, peak_bytes
from sftx.training.schedule import learning_rate
from sftx.types import Batch, Collator, Example, Loss, LossSum, Step


class TrainStep(nn.Module):
    """One forward from a batch to its loss sum: what a wrapper for several devices wraps, the loss inside."""

    def __init__(self, lm: LanguageModel, loss: Loss) -> None:
        super().__init__()
        self.lm = lm
        self.loss = loss

    def forward(self, batch: Batch) -> LossSum:
        return self.loss(self.lm, batch)


@dataclass
class Trainer:
    """Runs steps on one model. `last_saved` is what an error tells the user to fall back on."""

    lm: LanguageModel
    loss: Loss
    collator: Collator
    config: TrainConfig
    precision: Precision
    num_steps: int
    last_saved: str = "none"
    check_stop: Callable[[], None] = lambda: None
    """Called between micro-batches; raises when the run is to stop, and the step that is under way is discarded."""
    optimizer: RunOptimizer = field(init=False)
    module: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.module = TrainStep(self.lm, self.loss)
        self.optimizer = RunOptimizer(self.lm, self.config)
        self.parameters = [p for p in self.lm.parameters() if p.requires_grad]
        if self.config.gradient_checkpointing:
            enable_checkpointing(self.lm.model)
        self.lm.train()

    def micro_batches(self, step: Step, examples: Sequence[Example]) -> list[Batch]:
        """The rows of a step, `per_device_train_batch_size` at a time, on the host."""
        size = self.config.per_device_train_batch_size
        batches = []
        for at in range(0, len(step), size):
            chosen = [examples[index] for row in step[at : at + size] for index in row]
            batches.append(checked.collate(self.collator, chosen))
        return batches

    def accumulate(self, batches: Sequence[Batch], number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradients of one step (counted from 0); returns its mean loss and what else was counted."""
        denominators = checked.denominators(self.loss, batches)
        total = sum(denominators)
        loss = torch.zeros((), device=self.lm.device)
        metrics: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.lm.device))
        for micro, (batch, share) in enumerate(zip(batches, denominators, strict=True)):
            self.check_stop()
            self._seed(number, micro)
            with self.precision.autocast():
                out: LossSum = checked.loss_sum(self.loss, self.module(batch.to(self.lm.device)))
            objective = out.sum / total
            if out.aux_loss is not None:
                objective = objective + out.aux_loss * (share / total)
                metrics["aux_loss"] += out.aux_loss.detach() * (share / total)
            objective.backward()
            loss += out.sum.detach() / total
            for name, value in out.metrics.items():
                metrics[name] += value.detach() / total
        return loss, metrics

    def step(self, number: int, epoch: float, batches: Sequence[Batch]) -> StepReport:
        """One optimizer step, counted from 1. Raises TrainingError when the loss or its gradient is not finite."""
        start = time.perf_counter()
        rate = learning_rate(self.config, number - 1, self.num_steps)
        self.optimizer.set_learning_rate(rate)
        self.optimizer.zero_grad()
        try:
            loss, metrics = self.accumulate(batches, number - 1)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise TrainingError(self._out_of_memory(number, batches)) from error
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        # The one wait for the device in a step: an update by a gradient that is not finite cannot be undone.
        loss_value, norm_value = torch.stack((loss, norm.to(loss))).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise TrainingError(self._not_finite(number, loss_value, norm_value, batches))
        counted = {name: value.item() for name, value in metrics.items()}
        reported = checked.means(self.loss, counted, f"step {number}")
        self.optimizer.step()
        return StepReport(
            step=number,
            num_steps=self.num_steps,
            epoch=epoch,
            loss=loss_value,
            grad_norm=norm_value,
            learning_rate=rate,
            num_tokens=sum(batch.num_tokens for batch in batches),
            num_real_tokens=sum(batch.num_real_tokens for batch in batches),
            seconds=time.perf_counter() - start,
            peak_bytes=peak_bytes(self.lm.device),
            metrics=reported,
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the next step depends on besides weights and data: tensors by name, and JSON values."""
        return self.optimizer.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave. Raises ModelError when it is of other parameters."""
        self.optimizer.load_state_dict(tensors, values)

    def _seed(self, number: int, micro: int) -> None:
        """Makes whatever is random in the coming forward a pure function of the run's seed and its place."""
        seed = random.Random(f"forward {self.config.seed} {number} {micro}").getrandbits(63)
        self.lm.seed.fill_(seed)
        torch.manual_seed(seed)

    def _out_of_memory(self, number: int, batches: Sequence[Batch]) -> str:
        largest = max(batches, key=lambda batch: batch.input_ids_BT.numel())
        rows, length = largest.input_ids_BT.shape
        return (
            f"step {number}: {self.lm.device} has not the memory for a micro-batch of {rows} rows of {length} tokens; "
            f"lower per_device_train_batch_size (now {self.config.per_device_train_batch_size}) and raise "
            "gradient_accumulation_steps by as much, which gives the same update; or set gradient_checkpointing, or "
            f"lower data.max_length; last saved: {self.last_saved}"
        )

    def _not_finite(self, number: int, loss: float, norm: float, batches: Sequence[Batch]) -> str:
        rows = [row for batch in batches for row in batch.row_ids]
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        return (
            f"step {number}: the loss is {loss:g} and the gradient's norm {norm:g}; no update was made; rows: {shown}; "
            f"last saved: {self.last_saved}; lower learning_rate, or look at these rows"
        )


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Under the name of this transformers: `activation_...` where it exists, `gradient_...` before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def train(trainer: Trainer, plan: Steps, done: int, after_step: Callable[[StepReport], bool]) -> None:
    """Runs the plan from where it stands, `done` steps after its beginning.

    `after_step` reports, saves and evaluates; it returns whether to go on.
    """
    for number, (epoch, step, examples) in enumerate(plan, done + 1):
        if not after_step(trainer.step(number, epoch, trainer.micro_batches(step, examples))):
            return
