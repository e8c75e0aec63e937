"""Binary classifier optimisation (Jung et al. 2024, https://arxiv.org/abs/2404.04656): answers that are good or bad.

The reward of an answer is beta * log(p(y|x) / p_ref(y|x)), where the reference is the model without its adapters. A
shift, the mean of the mean rewards of the good and of the bad answers of the step, makes both kinds equally hard.

Dimensions: E examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from sftx import (
    Batch,
    Conversation,
    DataError,
    LanguageModel,
    Location,
    Loss,
    LossSum,
    Message,
    Parser,
    Record,
    hookimpl,
    sum_by_example,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BCO"]


class BCOParser:
    """Reads `{"prompt", "completion", "label"}`."""

    fields: ClassVar[str] = "prompt, completion, label"
    samples: ClassVar[Sequence[Record]] = (
        {"prompt": "Say hello.", "completion": "Hello!", "label": True},
        {"prompt": "What time is it?", "completion": "No idea.", "label": False},
        {"prompt": "Name a fruit.", "completion": "An apple.", "label": True},
    )
    has_rejected: ClassVar[bool] = True

    def accepts(self, record: Record) -> bool:
        return {"prompt", "completion", "label"} <= record.keys()

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        label: Any = record.get("label")
        if not isinstance(label, bool):
            raise DataError(f"{where}: label is {label!r:.40}, expected true or false")
        texts: dict[str, Any] = {name: record.get(name) for name in ("prompt", "completion")}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise DataError(f"{where}: {name} is {text!r:.40}, expected text")
        messages = (Message("user", texts["prompt"], False), Message("assistant", texts["completion"], True))
        return (Conversation(messages, extras={"bco": label}),)


class BCOLoss:
    """Computes -log sigmoid(r - shift) for a good answer and -log sigmoid(shift - r) for a bad one."""

    needs_adapter = True
    answers_only = True

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        import torch

        labels = [example.extras.get("bco") for example in batch.examples]
        if any(not isinstance(label, bool) for label in labels):
            raise DataError(f"{batch.row_ids[0]}: is no record of bco")
        return {"bco_good_E": torch.tensor(labels)}

    def denominator(self, batch: Batch) -> float:
        return float(len(batch.examples))

    def statistics(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        rewards_E = self._rewards(lm, batch)[0]
        good_E = batch.extras["bco_good_E"].to(rewards_E)
        return {
            "good": (rewards_E * good_E).sum(),
            "num_good": good_E.sum(),
            "bad": (rewards_E * (1 - good_E)).sum(),
            "num_bad": (1 - good_E).sum(),
        }

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        import torch
        from torch.nn.functional import logsigmoid

        totals = batch.statistics
        shift = sum((totals[kind] / totals[f"num_{kind}"].clamp(min=1) for kind in ("good", "bad")), 0.0) / 2
        rewards_E, aux_loss = self._rewards(lm, batch)
        good_E = batch.extras["bco_good_E"]
        loss_E = -logsigmoid(torch.where(good_E, rewards_E - shift, shift - rewards_E))
        metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {"shift": shift * len(good_E)}
        for name, own_E in (("good", good_E), ("bad", ~good_E)):
            metrics[f"rewards/{name}"] = ((rewards_E.detach() * own_E).sum(), own_E.sum().to(rewards_E))
        return LossSum(loss_E.sum(), aux_loss, metrics)

    def _rewards(self, lm: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the reward of each answer: [E], and the auxiliary loss of the forward with the adapters."""
        import torch

        with torch.no_grad(), lm.without_adapters():
            reference_E = _log_probs(lm, batch)[0]
        log_probs_E, aux_loss = _log_probs(lm, batch)
        return self._beta * (log_probs_E - reference_E), aux_loss


def _log_probs(lm: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor | None]:
    hidden = lm.hidden(batch)
    nll_N = lm.cross_entropy(
        hidden.hidden_BTD,
        batch.labels_BT,
        token_weights_BT=batch.token_weights_BT,
        num_valid=batch.num_label_tokens,
        reduction="none",
    ).loss
    return -sum_by_example(batch, nll_N), hidden.aux_loss


@dataclass(frozen=True, eq=False)
class BCO:
    """Trains an adapter to make good answers more likely and bad ones less, relative to the base model."""

    beta: Annotated[float, Field(gt=0, description="How close the trained model stays to the reference.")] = 0.1

    @hookimpl
    def sftx_parser(self) -> Parser:
        return BCOParser()

    @hookimpl
    def sftx_loss(self) -> Loss:
        return BCOLoss(self.beta)
