"""What collators and losses return, refused when it would make training or evaluation wrong in silence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from sftx.errors import PluginError
from sftx.events import EvalReport, StepReport
from sftx.types import Batch, Collator, Example, Loss, LossSum, Row, Step

OURS: Final = frozenset(
    {"event", "aux_loss", "loss_scale", "perplexity", "tokens_per_second"}
    | {field.name for report in (StepReport, EvalReport) for field in dataclasses.fields(report)}
)
"""What reports hold under these names is neither a loss's nor a metric's to set."""

_LARGEST_NLL: Final = 700.0  # whose exponential is still a number


def plan(
    collator: Collator,
    lengths: Sequence[int],
    groups: Sequence[int],
    *,
    seed: int,
    epoch: int,
    examples_per_step: int,
    final: bool,
    window: int = 0,
) -> tuple[list[Step], Row]:
    """The steps of one window, and what is carried over when it is not the `final` one.

    Raises PluginError when an example is lost or repeated, or a step is none.
    """
    planned = collator.plan(
        lengths, groups, seed=seed, epoch=epoch, window=window, examples_per_step=examples_per_step, final=final
    )
    try:
        given, carried = planned
        steps = [tuple(tuple(row) for row in step) for step in given]
        carried = tuple(carried)
        indices = sorted([*(index for step in steps for row in step for index in row), *carried])
        sizes = [len(step) for step in steps]
        filled = all(len(row) for step in steps for row in step)
    except (TypeError, ValueError):
        raise PluginError(f"{collator}: plan gave {planned!r:.100}, expected (steps of rows of indices, row)") from None
    if (carried and final) or indices != list(range(len(lengths))):
        raise PluginError(
            f"{collator}: plan lost or repeated examples: {len(indices) - len(carried)} planned and {len(carried)} "
            f"carried over of {len(lengths)}"
        )
    if not (filled and all(0 < size <= examples_per_step for size in sizes)):
        raise PluginError(f"{collator}: plan made a step that is empty or has over {examples_per_step} rows")
    return steps, carried


def collate(collator: Collator, examples: Sequence[Example]) -> Batch:
    """A batch in which every example is once. Raises PluginError when it is not."""
    batch = collator.collate(examples)
    ids: Any = batch.row_ids
    if not (isinstance(ids, tuple) and all(isinstance(row_id, str) for row_id in ids)):
        raise PluginError(f"{collator}: collate gave the row_ids {ids!r:.60}, expected a tuple of text")
    if sorted(ids) != sorted(example.row_id for example in examples):
        raise PluginError(
            f"{collator}: collate made a batch of {len(batch.row_ids)} examples of {len(examples)}; every example must "
            "be in it once"
        )
    if batch.cu_seqlens is not None:
        borders, num = batch.cu_seqlens.tolist(), batch.input_ids_BT.numel()
        if borders[:1] != [0] or borders[-1] != num or sorted(set(borders)) != borders:
            raise PluginError(
                f"{collator}: collate gave {num} tokens the cu_seqlens {borders!r:.60}, expected "
                "rising numbers from 0 to all of them"
            )
    return batch


def denominators(loss: Loss, batches: Sequence[Batch]) -> list[float]:
    """What the sums of these batches are of. Raises PluginError when they are no numbers to divide by."""
    found = [loss.denominator(batch) for batch in batches]
    if any(isinstance(value, bool) or not 0 <= value < math.inf for value in found):
        raise PluginError(f"{loss}: denominator gave {found}, expected numbers that are not below 0")
    return found


def total(loss: Loss, denominator: float) -> float:
    """What a step's sums are divided by. Raises PluginError when that is 0."""
    if not denominator > 0:
        raise PluginError(f"{loss}: denominator gave 0 for all of a step, expected more than 0")
    return denominator


def loss_sum(loss: Loss, out: LossSum) -> LossSum:
    """The same. Raises PluginError when a part of it is no scalar tensor, or a metric has a name of the engine's."""
    named: dict[str, Any] = {"sum": out.sum, **{f"metrics[{name!r}]": value for name, value in out.metrics.items()}}
    if out.aux_loss is not None:
        named["aux_loss"] = out.aux_loss
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.ndim:
            what = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PluginError(f"{loss}: {name} is {what}, expected a tensor without dimensions")
    if torch.is_grad_enabled() and not out.sum.requires_grad:
        raise PluginError(f"{loss}: sum has no gradient; do not detach it")
    taken = [name for name in out.metrics if name in OURS or not isinstance(name, str)]
    if taken:
        raise PluginError(f"{loss}: metrics has the name {taken[0]!r}, which is the engine's; choose another")
    return out


def means(loss: Loss, sums: Mapping[str, float], place: str) -> dict[str, float]:
    """Means as they are reported: the exponential of `nll` in its place. Raises PluginError when one is not finite."""
    if wrong := [name for name, value in sums.items() if not math.isfinite(value)]:
        raise PluginError(f"{loss}: metrics[{wrong[0]!r}] is {sums[wrong[0]]} in {place}")
    reported = {name: value for name, value in sums.items() if name != "nll"}
    if "nll" in sums and sums["nll"] < _LARGEST_NLL:
        reported["perplexity"] = math.exp(sums["nll"])
    return reported
