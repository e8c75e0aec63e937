"""AlphaPO for sftx: learns from pairs of a better and a worse answer, with a reward whose shape is chosen by alpha.

@inproceedings{gupta2025alphapo,
    title = {AlphaPO: Reward Shape Matters for LLM Alignment},
    author = {Gupta, Tang, Song, Zhu, Hong, Saha, Gupta, Banerjee, Schneider and Keerthi}, year = 2025,
    url = {https://arxiv.org/abs/2501.03884}}

Dimensions: N positions of a batch, E examples, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final

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

__all__ = ["AlphaPO"]

SIDE: Final = "preference"
CHOSEN: Final = "chosen"
REJECTED: Final = "rejected"
"""An example's `extras[SIDE]` is CHOSEN or REJECTED, as that of examples that sftx's plugin `preference` reads."""
_PAIRS: Final = "alphapo_pairs_P2"
_LENGTHS: Final = "alphapo_lengths_E"
"""The keys of a batch's extras with the numbers of the two examples of each pair, and each example's label tokens."""


class PairParser:
    """Reads `{"prompt", "chosen", "rejected"}`, three texts; the plugin `preference` reads further forms."""

    fields: ClassVar[str] = "prompt, chosen, rejected"
    samples: ClassVar[Sequence[Record]] = (
        {"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "Some number."},
        {"prompt": "Name a fruit.", "chosen": "Pear.", "rejected": "There are many fruits, pears among them."},
        {"prompt": "土豆要煮多久？", "chosen": "大约二十分钟。", "rejected": "三分钟。"},
    )
    has_rejected: ClassVar[bool] = True

    def accepts(self, record: Record) -> bool:
        return {"prompt", CHOSEN, REJECTED} <= record.keys()

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        """Return the conversation with the chosen answer, then the one with the rejected. Raises DataError."""
        texts: dict[str, Any] = {name: record.get(name) for name in ("prompt", CHOSEN, REJECTED)}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise DataError(
                    f"{where}: {name} is {text!r:.40}, expected text; --plugin preference reads other forms"
                )
        if texts[CHOSEN] == texts[REJECTED]:
            raise DataError(f"{where}: chosen and rejected are the same answer; remove such rows")
        question = Message("user", texts["prompt"], trainable=False)
        return tuple(
            Conversation((question, Message("assistant", texts[side], trainable=True)), extras={SIDE: side})
            for side in (CHOSEN, REJECTED)
        )


class AlphaPOLoss:
    """Computes -log sigmoid(r(chosen) - r(rejected) - gamma) for each pair.

    The reward of an answer y of |y| tokens is r(y) = beta * (1 - p(y|x)^(-alpha / |y|)) / alpha. With alpha -> 0 it is
    beta * log p(y|x) / |y|, that of SimPO: a larger alpha moves unlikely answers more, a negative one likely ones.
    """

    answers_only: ClassVar[bool] = True
    shares_prefixes: ClassVar[bool] = True

    def __init__(self, alpha: float, beta: float, gamma: float) -> None:
        self._alpha, self._beta, self._gamma = alpha, beta, gamma

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        """Return which examples are pairs, and their lengths. Raises DataError for a row that is none."""
        import torch

        sides: dict[int, dict[object, int]] = {}
        for number, example in enumerate(batch.examples):
            sides.setdefault(example.group, {})[example.extras.get(SIDE)] = number
        for example in batch.examples:
            if set(sides[example.group]) != {CHOSEN, REJECTED}:
                raise DataError(f"{example.row_id}: is not a preference pair, and alphapo trains on nothing else")
        return {
            _PAIRS: torch.tensor([(own[CHOSEN], own[REJECTED]) for own in sides.values()]),
            _LENGTHS: torch.tensor([float(example.num_label_tokens) for example in batch.examples]),
        }

    def denominator(self, batch: Batch) -> float:
        """Return the number of pairs."""
        return float(batch.extras[_PAIRS].shape[0])

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        from torch.nn.functional import logsigmoid

        hidden = lm.hidden(batch)
        nll_N = lm.cross_entropy(
            hidden.hidden_BTD,
            batch.labels_BT,
            token_weights_BT=batch.token_weights_BT,
            num_valid=batch.num_label_tokens,
            reduction="none",
        ).loss
        rewards_E = self.rewards(-sum_by_example(batch, nll_N) / batch.extras[_LENGTHS])
        chosen_P, rejected_P = rewards_E[batch.extras[_PAIRS]].unbind(1)
        margins_P = chosen_P - rejected_P
        metrics = {
            "rewards/chosen": chosen_P.detach().sum(),
            "rewards/rejected": rejected_P.detach().sum(),
            "rewards/margins": margins_P.detach().sum(),
            "rewards/accuracies": (margins_P.detach() > 0).to(margins_P.dtype).sum(),
        }
        return LossSum(-logsigmoid(margins_P - self._gamma).sum(), hidden.aux_loss, metrics)

    def rewards(self, mean_log_probs: Tensor) -> Tensor:
        """Return the reward of each answer, given the mean log-probability of its tokens."""
        import torch

        if self._alpha == 0:
            return self._beta * mean_log_probs
        # 1 - p^-alpha = -(exp(-alpha log p) - 1): without cancellation where p^-alpha is close to 1.
        return -self._beta / self._alpha * torch.expm1(-self._alpha * mean_log_probs)


@dataclass(frozen=True, eq=False)
class AlphaPO:
    """Trains the model to prefer the chosen answer of a pair, with rewards whose shape alpha decides."""

    alpha: Annotated[float, Field(ge=-4, le=4, description="Shape of the reward; 0 is SimPO's, the logarithm.")] = 0.25
    beta: Annotated[float, Field(gt=0, description="Scale of the rewards.")] = 2.5
    gamma: Annotated[float, Field(ge=0, description="Margin by which the chosen answer's reward is to be larger.")] = (
        1.0
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return PairParser()

    @hookimpl
    def sftx_loss(self) -> Loss:
        return AlphaPOLoss(self.alpha, self.beta, self.gamma)
