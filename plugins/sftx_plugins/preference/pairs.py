"""The parts that losses share which compare the two answers of a pair.

Dimensions: B rows, T tokens, N = B*T, E examples of a batch, P pairs; P2: of each pair the chosen one and the rejected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Final

from sftx import Batch, DataError, Example, LossSum, RunInfo
from sftx_plugins.preference.records import CHOSEN, PREFERENCE, REJECTED

if TYPE_CHECKING:
    from torch import Tensor

    from sftx import HiddenOut, LanguageModel

PAIRS: Final = "preference_pairs_P2"
"""The key of a batch's extras with the numbers of the chosen and the rejected example of each pair: [P, 2] int64."""
LENGTHS: Final = "preference_lengths_E"
"""The key of a batch's extras with the number of label tokens of each example: [E] fp32."""


class PairLoss(ABC):
    """A sum over pairs, computed from the log-probability of each answer."""

    answers_only: ClassVar[bool] = True
    shares_prefixes: ClassVar[bool] = True

    def __init__(self, name: str, run: RunInfo) -> None:
        """`name`: of the plugin, for errors."""
        self._name = name
        # A stream has no end, so that its rows are checked as they come.
        self.prepare = None if run.config["data"]["streaming"] else self._check_rows

    def _check_rows(self, examples: Sequence[Example]) -> None:
        """Raise DataError for a row that is no pair, before the first step."""
        for example in examples:
            _side(example, self._name)

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        """Return which examples are pairs, and the length of each. Raises DataError for one without its other side."""
        import torch

        sides: dict[int, dict[str, int]] = {}
        for number, example in enumerate(batch.examples):
            sides.setdefault(example.group, {})[_side(example, self._name)] = number
        pairs = [(own[CHOSEN], own[REJECTED]) for own in sides.values() if len(own) == 2]
        if 2 * len(pairs) != len(batch.examples):
            alone = next(e for e in batch.examples if len(sides[e.group]) == 1)
            raise DataError(f"{alone.row_id}: {_not_a_pair(self._name)}")
        lengths = [float(example.num_label_tokens) for example in batch.examples]
        return {PAIRS: torch.tensor(pairs), LENGTHS: torch.tensor(lengths)}

    def denominator(self, batch: Batch) -> float:
        """Return the number of pairs."""
        return float(batch.extras[PAIRS].shape[0])

    @abstractmethod
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum: ...


def negative_log_probs(lm: LanguageModel, batch: Batch) -> tuple[Tensor, HiddenOut]:
    """Return the negative log-probability of each label in nats, times its weight: [N] fp32, and the forward's output.

    It is 0 where nothing is trained. The logits are never materialised.
    """
    hidden = lm.hidden(batch)
    nll_N = lm.cross_entropy(
        hidden.hidden_BTD,
        batch.labels_BT,
        token_weights_BT=batch.token_weights_BT,
        num_valid=batch.num_label_tokens,
        reduction="none",
    ).loss
    return nll_N, hidden


def pair_metrics(rewards_P2: Tensor, log_probs_P2: Tensor) -> Mapping[str, Tensor]:
    """Return the sums over pairs of TRL's metrics."""
    chosen_P, rejected_P = rewards_P2.detach().unbind(1)
    margins_P = chosen_P - rejected_P
    log_probs_2 = log_probs_P2.detach().sum(0)
    return {
        "rewards/chosen": chosen_P.sum(),
        "rewards/rejected": rejected_P.sum(),
        "rewards/margins": margins_P.sum(),
        "rewards/accuracies": (margins_P > 0).to(margins_P.dtype).sum(),
        "logps/chosen": log_probs_2[0],
        "logps/rejected": log_probs_2[1],
    }


def smoothed(margins_P: Tensor, label_smoothing: float) -> Tensor:
    """Return -log sigmoid(m) of each pair, where a share of the labels is taken for swapped (Mitchell 2023): [P].

    (1 - eps) * -log sigmoid(m) + eps * -log sigmoid(-m).
    """
    from torch.nn.functional import logsigmoid

    return -(1 - label_smoothing) * logsigmoid(margins_P) - label_smoothing * logsigmoid(-margins_P)


def _side(example: Example, loss: str) -> str:
    side = example.extras.get(PREFERENCE)
    if side not in (CHOSEN, REJECTED):
        raise DataError(f"{example.row_id}: {_not_a_pair(loss)}")
    return str(side)


def _not_a_pair(loss: str) -> str:
    return (
        f"is not a preference pair, and {loss} trains on nothing else; give it records with chosen and rejected, or "
        "train single answers that are labelled as good or bad with --plugin kto"
    )
