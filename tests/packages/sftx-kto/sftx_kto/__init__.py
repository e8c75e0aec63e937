"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equations 7 and 8).

A record has a prompt, an answer, whether it is good, and the answer of another record, from which the distance to the
reference is estimated. Both answers are one group, and the reference is the model without its adapters.

Dimensions: B rows, T tokens, P records.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sftx import (
    Batch,
    Collator,
    Conversation,
    DataError,
    Example,
    LanguageModel,
    Location,
    Loss,
    LossSum,
    Message,
    Parser,
    Record,
    Row,
    Step,
    Window,
    hookimpl,
    pad,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KTO"]


class KTOParser:
    """Reads `{"prompt", "completion", "label", "other_completion"}`."""

    fields: ClassVar[str] = "prompt, completion, label, other_completion"
    samples: ClassVar[Sequence[Record]] = (
        {"prompt": "Say hello.", "completion": "Hello!", "label": True, "other_completion": "It is noon."},
        {"prompt": "What time is it?", "completion": "No idea.", "label": False, "other_completion": "Hello!"},
        {"prompt": "Name a fruit.", "completion": "An apple.", "label": True, "other_completion": "No idea."},
    )

    def accepts(self, record: Record) -> bool:
        return {"prompt", "completion", "label", "other_completion"} <= record.keys()

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        if not isinstance(record.get("label"), bool):
            raise DataError(f"{where}: label is {record.get('label')!r:.40}, expected true or false")
        answers = {}
        for name in ("prompt", "completion", "other_completion"):
            text = record.get(name)
            if not isinstance(text, str):
                raise DataError(f"{where}: {name} is {text!r:.40}, expected text")
            answers[name] = text
        question = Message("user", answers.pop("prompt"), trainable=False)
        return tuple(
            Conversation(
                (question, Message("assistant", text, trainable=True)),
                extras={"kto": "other" if name == "other_completion" else record.get("label")},
            )
            for name, text in answers.items()
        )


class KTOCollator:
    """Plans records as rows and pads; the batch says which rows are answers, and which of these are good."""

    def plan(self, window: Window) -> tuple[list[Step], Row]:
        members: dict[int, list[int]] = {}
        for index, group in enumerate(window.groups):
            members.setdefault(group, []).append(index)
        records = [tuple(indices) for indices in members.values()]
        random.Random(f"kto {window.seed} {window.epoch} {window.index}").shuffle(records)
        num_carried = 0 if window.is_last else len(records) % window.rows_per_step
        planned = records[: len(records) - num_carried]
        size = window.rows_per_step
        steps = [tuple(planned[at : at + size]) for at in range(0, len(planned), size)]
        return steps, tuple(index for record in records[len(planned) :] for index in record)

    def collate(self, examples: Sequence[Example]) -> Batch:
        import torch

        batch = pad(examples)
        kinds = [example.extras.get("kto") for example in examples]
        if any(not isinstance(kind, bool) and kind != "other" for kind in kinds):
            raise DataError(f"{examples[0].row_id}: is no record of kto")
        answers = [row for row, kind in enumerate(kinds) if kind != "other"]
        batch.extras["kto_answer_P"] = torch.tensor(answers)
        batch.extras["kto_other_P"] = torch.tensor([row for row, kind in enumerate(kinds) if kind == "other"])
        batch.extras["kto_good_P"] = torch.tensor([bool(kinds[row]) for row in answers])
        return batch


class KTOLoss:
    """1 - sigmoid(beta (r - z)) for a good answer and 1 - sigmoid(beta (z - r)) for a bad one.

    r is log p(y|x) - log p_ref(y|x), and z the mean of r over the other answers of the whole step, at least 0.
    """

    needs_adapter = True

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def denominator(self, batch: Batch) -> float:
        return float(batch.extras["kto_answer_P"].shape[0])

    def statistics(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        ratios_P = self._ratios(lm, batch)[batch.extras["kto_other_P"]]
        return {"kl": ratios_P.sum(), "count": ratios_P.new_tensor(float(ratios_P.shape[0]))}

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        import torch

        kl = (batch.statistics["kl"] / batch.statistics["count"]).clamp(min=0)
        ratios_P = self._ratios(lm, batch)[batch.extras["kto_answer_P"]]
        good_P = batch.extras["kto_good_P"]
        signs_P = torch.where(good_P, 1.0, -1.0).to(ratios_P.dtype)
        loss_P = 1 - torch.sigmoid(self._beta * signs_P * (ratios_P - kl))
        rewards_P = self._beta * ratios_P.detach()
        metrics = {
            "kl": (kl * len(good_P), torch.tensor(len(good_P))),
            "rewards/chosen": (rewards_P[good_P].sum(), good_P.sum()),
            "rewards/rejected": (rewards_P[~good_P].sum(), (~good_P).sum()),
        }
        return LossSum(loss_P.sum(), None, metrics)

    def _ratios(self, lm: LanguageModel, batch: Batch) -> Tensor:
        """Return log p(y|x) - log p_ref(y|x) of each row: [B]."""
        import torch

        with torch.no_grad(), lm.without_adapters():
            reference_B = _log_likelihoods(lm, batch)
        return _log_likelihoods(lm, batch) - reference_B


def _log_likelihoods(lm: LanguageModel, batch: Batch) -> Tensor:
    nll_N = lm.cross_entropy(
        lm.hidden(batch).hidden_BTD,
        batch.labels_BT,
        token_weights_BT=batch.token_weights_BT,
        num_valid=batch.num_label_tokens,
        reduction="none",
    ).loss
    return -nll_N.view_as(batch.labels_BT).sum(1)


@dataclass(frozen=True, eq=False)
class KTO:
    """Trains an adapter to make good answers more likely and bad ones less, relative to the base model."""

    beta: Annotated[float, Field(gt=0, description="How close the trained model stays to the reference.")] = 0.1

    @hookimpl
    def sftx_parser(self) -> Parser:
        return KTOParser()

    @hookimpl
    def sftx_collator(self) -> Collator:
        return KTOCollator()

    @hookimpl
    def sftx_loss(self) -> Loss:
        return KTOLoss(self.beta)
