"""The loss as a stage, and the names under which only the trainer reports values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Final

from sftx.assembly.stages.stage import Stage
from sftx.events import EvalReport, StepReport
from sftx.types import Batch, Example, LanguageModel, Loss, LossSum

if TYPE_CHECKING:
    from torch import Tensor, nn


RESERVED_METRICS: Final = frozenset(
    {"event", "aux_loss", "loss_scale", "perplexity", "tokens_per_second"}
    | {field.name for report in (StepReport, EvalReport) for field in fields(report)}
)

"""Names of what the trainer reports itself: neither a loss nor a metric may report a value under one of them."""

_OWN_COUNT: Final = " (count)"

"""What follows a metric's name where its own count is added up."""

_LARGEST_NLL: Final = 700.0  # the largest one whose exponential is a finite number


class LossStage(Stage):
    """Computes the loss, and checks that it is a scalar with a gradient and that its denominator can be divided by."""

    def __init__(self, plugin: str, loss: Loss) -> None:
        super().__init__(plugin)
        self._loss = loss
        self.answers_only = self._declares("answers_only")
        self.batch_statistic = self._declares("batch_statistic")
        self.needs_adapter = self._declares("needs_adapter")
        self.shares_prefixes = self._declares("shares_prefixes")
        self.has_statistics = getattr(loss, "statistics", None) is not None
        self.has_extras = getattr(loss, "extras", None) is not None
        self.has_module = getattr(loss, "module", None) is not None
        self.has_precompute = getattr(loss, "precompute", None) is not None
        self.has_prepare = getattr(loss, "prepare", None) is not None
        self._precomputed_names: list[str] | None = None
        self._statistic_names: list[str] | None = None

    def denominator(self, batch: Batch) -> float:
        with self._attribute("denominator"):
            value: Any = self._loss.denominator(batch)
        if not isinstance(value, int | float):
            raise self._refuse(f"denominator returned {type(value).__name__}, expected a float")
        if isinstance(value, bool) or not 0 <= value < math.inf:
            raise self._refuse(f"denominator gave [{value}], expected numbers that are not below 0")
        return value

    def prepare(self, examples: Sequence[Example]) -> None:
        """Show the loss all examples of a split before the first step, where it asks for that."""
        if self.has_prepare and len(examples):
            loss: Any = self._loss
            with self._attribute("prepare"):
                loss.prepare(examples)

    def precompute(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        """Return what the loss computes of a batch before training: by name, the same names for every batch, [E]."""
        import torch

        loss: Any = self._loss
        with self._attribute(f"precompute of {batch.row_ids[0]}"):
            values: Any = loss.precompute(lm, batch)
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise self._refuse(f"precompute returned {type(values).__name__}, expected a dict of tensors by name")
        self._precomputed_names = names = self._precomputed_names or sorted(values)
        if sorted(values) != names:
            raise self._refuse(f"precompute has the names {sorted(values)}, and had {names} for another batch")
        num = len(batch.row_ids)
        for name, value in values.items():
            shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            if shape != [num]:
                raise self._refuse(f"precompute[{name!r}] is {shape}, expected a tensor of [{num}]: one an example")
        return {name: values[name].detach().float() for name in names}

    def with_extras(self, batch: Batch) -> Batch:
        """Return the batch, on the host, with what the loss adds to its extras. Raises PluginError for a wrong name."""
        from torch import Tensor

        if not self.has_extras:
            return batch
        loss: Any = self._loss
        with self._attribute(f"extras of {batch.row_ids[0]}"):
            extras: Any = loss.extras(batch)
        if not isinstance(extras, dict):
            raise self._refuse(f"extras returned {type(extras).__name__}, expected a dict of tensors by name")
        for name, value in extras.items():
            if not isinstance(value, Tensor) or not isinstance(name, str):
                raise self._refuse(f"extras[{name!r}] is {type(value).__name__}, expected a tensor by its name")
            if name in batch.extras:
                raise self._refuse(f"extras has the name {name!r}, which batch.extras has already; choose another")
        return replace(batch, extras={**batch.extras, **extras})

    def _declares(self, name: str) -> bool:
        with self._attribute(name):
            value: Any = getattr(self._loss, name, False)
        if not isinstance(value, bool):
            raise self._refuse(f"{name} is {value!r:.40}, expected True or False")
        return value

    def module(self, lm: LanguageModel) -> nn.Module:
        """Return the module whose parameters the loss trains beside the model's; only where `has_module`."""
        import torch

        loss: Any = self._loss
        with self._attribute("module"):
            made: Any = loss.module(lm)
        if not isinstance(made, torch.nn.Module):
            raise self._refuse(f"module returned {type(made).__name__}, expected a torch.nn.Module")
        if wrong := [name for name, p in made.named_parameters() if p.dtype != torch.float32 or not p.requires_grad]:
            raise self._refuse(
                f"module has the parameter {wrong[0]}, expected all to be fp32 and to require a gradient"
            )
        if next(made.parameters(), None) is None or next(made.buffers(), None) is not None:
            raise self._refuse("module has no parameters, or has buffers, expected parameters alone")
        return made

    def statistics(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        """Return the batch's share of the statistics of its step, the same names for every batch."""
        loss: Any = self._loss
        with self._attribute("statistics"):
            values: Any = loss.statistics(lm, batch)
        if not isinstance(values, dict) or not values:
            raise self._refuse(f"statistics returned {type(values).__name__}, expected a dict of tensors by name")
        for name, value in values.items():
            self._check_scalar(f"statistics[{name!r}]", value)
        self._statistic_names = names = self._statistic_names or sorted(values)
        if sorted(values) != names:
            raise self._refuse(f"statistics has the names {sorted(values)}, and had {names} for another batch")
        return {name: values[name].detach() for name in names}

    def _check_scalar(self, name: str, value: Any) -> None:
        import torch

        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor or value.ndim:
            what = f"a tensor of shape {list(value.shape)}" if is_tensor else type(value).__name__
            raise self._refuse(f"{name} is {what}, expected a tensor without dimensions")

    def check_total(self, denominator: float) -> float:
        """Return the denominator of a whole step. Raises PluginError when it is 0."""
        if not denominator > 0:
            raise self._refuse("denominator gave 0 for all of a step, expected more than 0")
        return denominator

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        import torch

        with self._attribute("loss"):
            out: Any = self._loss(lm, batch)
        if not isinstance(out, LossSum):
            raise self._refuse(f"loss returned {type(out).__name__}, expected a LossSum")
        self._check_scalar("sum", out.sum)
        if out.aux_loss is not None:
            self._check_scalar("aux_loss", out.aux_loss)
        for name, value in out.metrics.items():
            for part in value if isinstance(value, tuple) and len(value) == 2 else (value,):
                self._check_scalar(f"metrics[{name!r}]", part)
        if torch.is_grad_enabled() and not out.sum.requires_grad:
            raise self._refuse(
                "sum has no gradient: it is detached, or the forward uses no trained parameter (see the adapter)"
            )
        taken: list[Any] = [name for name in out.metrics if name in RESERVED_METRICS or not isinstance(name, str)]
        if taken:
            raise self._refuse(f"metrics has the name {taken[0]!r}, which the trainer reports itself; choose another")
        return out

    @staticmethod
    def metric_sums(out: LossSum) -> Iterator[tuple[str, Tensor]]:
        """Yield what adds up over micro-batches by name: each metric's sum, and the count of one that has its own."""
        for name, value in out.metrics.items():
            if isinstance(value, tuple):
                yield name, value[0].detach()
                yield f"{name}{_OWN_COUNT}", value[1].detach()
            else:
                yield name, value.detach()

    @staticmethod
    def metric_means(sums: Mapping[str, float], denominator: float) -> dict[str, float]:
        """Return the means of what `metric_sums` added up to; a metric whose own count is 0 has none."""
        divisors = {
            name: sums.get(f"{name}{_OWN_COUNT}", denominator) for name in sums if not name.endswith(_OWN_COUNT)
        }
        return {name: sums[name] / divisor for name, divisor in divisors.items() if divisor}

    def report_means(self, means: Mapping[str, float], place: str) -> dict[str, float]:
        """Return the means as they are reported: `perplexity` in place of `nll`. Raises PluginError unless finite."""
        if wrong := [name for name, value in means.items() if not math.isfinite(value)]:
            raise self._refuse(f"metrics[{wrong[0]!r}] is {means[wrong[0]]} in {place}")
        reported = {name: value for name, value in means.items() if name != "nll"}
        if "nll" in means and means["nll"] < _LARGEST_NLL:
            reported["perplexity"] = math.exp(means["nll"])
        return reported
