"""Odds Ratio Preference Optimization (Hong et al. 2024, https://arxiv.org/abs/2403.07691): SFT with a preference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sftx import Batch, Loss, LossSum, Parser, RunInfo, hookimpl, sum_by_example
from sftx_plugins.preference.pairs import LENGTHS, PAIRS, PairLoss, negative_log_probs, pair_metrics
from sftx_plugins.preference.records import PreferenceParser

if TYPE_CHECKING:
    from torch import Tensor

    from sftx import LanguageModel


@dataclass(frozen=True, eq=False)
class ORPO:
    """Trains on the chosen answer of a pair, and raises its odds over those of the rejected one; needs no reference."""

    beta: Annotated[
        float, Field(gt=0, description="Weight of the odds ratio beside the likelihood of the chosen answer (lambda).")
    ] = 0.1

    @hookimpl
    def sftx_parser(self) -> Parser:
        return PreferenceParser()

    @hookimpl
    def sftx_loss(self, run: RunInfo) -> Loss:
        return ORPOLoss(self.beta, run)


class ORPOLoss(PairLoss):
    """Computes -log p(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected)) for each pair.

    Equations 6 and 7: log p is the mean over the tokens of an answer, and odds = p / (1 - p). TRL takes the first term
    over the tokens of the prompt as well, and as a mean over those of a micro-batch; here it is the paper's.
    """

    def __init__(self, beta: float, run: RunInfo) -> None:
        super().__init__("orpo", run)
        self._beta = beta

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        from torch.nn.functional import logsigmoid

        nll_N, hidden = negative_log_probs(lm, batch)
        log_probs_P2 = (-sum_by_example(batch, nll_N) / batch.extras[LENGTHS])[batch.extras[PAIRS]]
        chosen_P = log_probs_P2[:, 0]
        log_odds_P2 = log_probs_P2 - _log1mexp(log_probs_P2)
        log_odds_P = log_odds_P2[:, 0] - log_odds_P2[:, 1]
        ratio_P = logsigmoid(log_odds_P)
        metrics = {
            **pair_metrics(self._beta * log_probs_P2, log_probs_P2),
            "nll_loss": -chosen_P.detach().sum(),
            "log_odds_ratio": ratio_P.detach().sum(),
            "log_odds_chosen": log_odds_P.detach().sum(),
        }
        return LossSum((-chosen_P - self._beta * ratio_P).sum(), hidden.aux_loss, metrics)


def _log1mexp(log_p: Tensor) -> Tensor:
    """Return log(1 - exp(log_p)) without cancellation (Mächler 2012); for a probability that rounds to 1, of 1 - 1e-7.

    Each branch is given only what is safe in it, so that neither has a gradient that is not finite.
    """
    import torch

    log_p = log_p.clamp(max=-1e-7)
    is_small = log_p < -0.6931471805599453
    small, large = (torch.where(chosen, log_p, -0.6931471805599453) for chosen in (is_small, ~is_small))
    return torch.where(is_small, torch.log1p(-small.exp()), torch.log(-torch.expm1(large)))
