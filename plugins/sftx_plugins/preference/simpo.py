"""Simple Preference Optimization (Meng et al. 2024, https://arxiv.org/abs/2405.14734): a margin without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sftx import Batch, Loss, LossSum, Parser, RunInfo, hookimpl, sum_by_example
from sftx_plugins.preference.pairs import LENGTHS, PAIRS, PairLoss, negative_log_probs, pair_metrics, smoothed
from sftx_plugins.preference.records import PreferenceParser

if TYPE_CHECKING:
    from sftx import LanguageModel


@dataclass(frozen=True, eq=False)
class SimPO:
    """Trains the model to give each token of the chosen answer more probability than those of the rejected one."""

    beta: Annotated[float, Field(gt=0, description="Scale of the rewards, the mean log-probabilities of answers.")] = (
        2.0
    )
    gamma: Annotated[float, Field(ge=0, description="Margin by which the chosen answer's reward is to be larger.")] = (
        1.0
    )
    label_smoothing: Annotated[
        float, Field(ge=0, lt=0.5, description="Assumed share of pairs with swapped labels.")
    ] = 0.0
    cpo_alpha: Annotated[
        float,
        Field(ge=0, description="Weight of the chosen answer's mean negative log-likelihood, added to the loss (CPO)."),
    ] = 0.0

    @hookimpl
    def sftx_parser(self) -> Parser:
        return PreferenceParser()

    @hookimpl
    def sftx_loss(self, run: RunInfo) -> Loss:
        return SimPOLoss(self, run)


class SimPOLoss(PairLoss):
    """Computes -log sigmoid(r(chosen) - r(rejected) - gamma) for each pair (equation 6), where r is an answer's reward.

    The reward is beta times the mean log-probability of the answer's tokens. `cpo_alpha` adds -log p(chosen) / length,
    the behaviour cloning of CPO (Xu et al. 2024, https://arxiv.org/abs/2401.08417) with a mean over each answer's
    tokens; TRL's is over those of a micro-batch.
    """

    def __init__(self, options: SimPO, run: RunInfo) -> None:
        super().__init__("simpo", run)
        self._options = options

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        options = self._options
        nll_N, hidden = negative_log_probs(lm, batch)
        log_probs_P2 = (-sum_by_example(batch, nll_N) / batch.extras[LENGTHS])[batch.extras[PAIRS]]
        rewards_P2 = options.beta * log_probs_P2
        chosen_P = log_probs_P2[:, 0]
        metrics = dict(pair_metrics(rewards_P2, log_probs_P2))
        loss = smoothed(rewards_P2[:, 0] - rewards_P2[:, 1] - options.gamma, options.label_smoothing).sum()
        if options.cpo_alpha:
            loss = loss - options.cpo_alpha * chosen_P.sum()
            metrics["nll_loss"] = -chosen_P.detach().sum()
        return LossSum(loss, hidden.aux_loss, metrics)
