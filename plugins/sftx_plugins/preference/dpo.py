"""Direct Preference Optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) and losses of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from sftx import Batch, ConfigError, Loss, LossSum, Parser, RunInfo, hookimpl, per_label, sum_by_example
from sftx_plugins.preference.pairs import LENGTHS, PAIRS, PairLoss, negative_log_probs, pair_metrics, smoothed
from sftx_plugins.preference.records import PreferenceParser
from sftx_plugins.preference.reference import Kind, Reference, check_reference, reference_of

if TYPE_CHECKING:
    from torch import Tensor

    from sftx import LanguageModel

_REFERENCE: Final = "reference_logps"
"""The key of a batch's extras with the reference's log-probability of each answer: [E]."""
_LD_WEIGHTS: Final = "dpo_ld_weights_BT"
"""The key of a batch's extras with the weight of each label in the length-desensitised log-probability: [B, T]."""


@dataclass(frozen=True, eq=False)
class DPO:
    """Trains the model to prefer the chosen answer of a pair over the rejected one, more than the reference does."""

    loss_type: Annotated[
        Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"],
        Field(
            description="Loss of a margin: sigmoid (DPO), hinge (SLiC), ipo, robust (to a share label_smoothing of "
            "swapped pairs, without bias), sigmoid_norm (DPO with rewards divided by the length of the answer)."
        ),
    ] = "sigmoid"
    beta: Annotated[
        float,
        Field(gt=0, description="How close the model stays to the reference; lower lets it move further. Tau of ipo."),
    ] = 0.1
    label_smoothing: Annotated[
        float,
        Field(ge=0, lt=0.5, description="Assumed share of pairs with swapped labels: of sigmoid (cDPO) and robust."),
    ] = 0.0
    ld_alpha: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="Weight of the tokens beyond the length of the shorter answer, so that length counts less "
            "(LD-DPO); by default 1.",
        ),
    ] = None
    rpo_alpha: Annotated[
        float | None,
        Field(gt=0, description="Weight of the chosen answer's mean negative log-likelihood, added to the loss (RPO)."),
    ] = None
    reference: Annotated[
        Kind | None,
        Field(
            description="adapters: a second forward of each step, without the adapters; precompute: the reference's "
            "log-probabilities are computed once, before the first step. By default adapters, where lora, qlora or "
            "vera is in the run, else precompute."
        ),
    ] = None
    reference_model: Annotated[
        str | None,
        Field(
            description="Directory or name of another model that is the reference; precomputed. By default the "
            "model itself, as it is before training."
        ),
    ] = None

    @hookimpl
    def sftx_validate(self) -> None:
        check_reference(self.reference, self.reference_model)
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise ConfigError(
                f"label_smoothing is for loss_type sigmoid and robust, and loss_type is {self.loss_type}; leave one out"
            )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return PreferenceParser()

    @hookimpl
    def sftx_loss(self, run: RunInfo) -> Loss:
        return DPOLoss(self, reference_of(self.reference, self.reference_model, run), run)


class DPOLoss(PairLoss):
    """Computes a loss of each pair's margin m = r(chosen) - r(rejected).

    The score r of an answer y to x is log(p(y|x) / p_ref(y|x)), and beta * r its reward. With eps = label_smoothing:

    - sigmoid: -log sigmoid(beta m), smoothed (Rafailov et al. 2023, equation 7; Mitchell 2023 for eps > 0);
    - hinge: max(0, 1 - beta m) (Zhao et al. 2023, https://arxiv.org/abs/2305.10425);
    - ipo: (m - 1 / (2 beta))^2, where r is divided by the length of the answer (Azar et al. 2023, equation 17,
      https://arxiv.org/abs/2310.12036; the length is TRL's reading, confirmed to them by the authors);
    - robust: ((1 - eps) -log sigmoid(beta m) - eps -log sigmoid(-beta m)) / (1 - 2 eps) (Chowdhury et al. 2024,
      https://arxiv.org/abs/2403.00409);
    - sigmoid_norm: sigmoid, where r is divided by the length of the answer.

    With `ld_alpha`, tokens beyond the shorter answer's length count so much in p and p_ref (Liu et al. 2024,
    https://arxiv.org/abs/2409.06411). `rpo_alpha` adds -log p(chosen) / length (Pang et al. 2024, equation 1,
    https://arxiv.org/abs/2404.19733): the mean over the tokens of each answer, so no pair depends on others.
    """

    def __init__(self, options: DPO, reference: Reference, run: RunInfo) -> None:
        super().__init__("dpo", run)
        self._options = options
        self._reference = reference
        self.needs_adapter = not reference.is_precomputed
        self.precompute = self._precompute if reference.is_precomputed else None

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        """Return pairs and lengths, and the weights of a length-desensitised log-probability."""
        extras = super().extras(batch)
        if self._options.ld_alpha is not None:
            extras[_LD_WEIGHTS] = _ld_weights(batch, extras[PAIRS].tolist(), self._options.ld_alpha)
        return extras

    def _precompute(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        return {_REFERENCE: self._reference_log_probs(lm, batch)}

    def _reference_log_probs(self, lm: LanguageModel, batch: Batch) -> Tensor:
        with self._reference.computing(lm) as reference:
            return self._log_probs(batch, negative_log_probs(reference, batch)[0])

    @staticmethod
    def _log_probs(batch: Batch, nll_N: Tensor) -> Tensor:
        """Return the log-probability of each answer, length-desensitised where the options say so: [E]."""
        weights_BT = batch.extras.get(_LD_WEIGHTS)
        return -sum_by_example(batch, nll_N if weights_BT is None else nll_N * weights_BT.flatten())

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        pairs_P2, options = batch.extras[PAIRS], self._options
        if self._reference.is_precomputed:
            self._reference.release()
            reference_E = batch.extras[_REFERENCE]
        else:
            reference_E = self._reference_log_probs(lm, batch)
        nll_N, hidden = negative_log_probs(lm, batch)
        log_probs_E = self._log_probs(batch, nll_N)
        lengths_P2 = batch.extras[LENGTHS][pairs_P2]
        scores_P2 = (log_probs_E - reference_E)[pairs_P2]
        metrics = dict(pair_metrics(options.beta * scores_P2, log_probs_E[pairs_P2]))
        loss = self._losses(scores_P2, lengths_P2).sum()
        if options.rpo_alpha is not None:
            nll_P = sum_by_example(batch, nll_N)[pairs_P2[:, 0]] / lengths_P2[:, 0]
            loss = loss + options.rpo_alpha * nll_P.sum()
            metrics["nll_loss"] = nll_P.detach().sum()
        return LossSum(loss, hidden.aux_loss, metrics)

    def _losses(self, scores_P2: Tensor, lengths_P2: Tensor) -> Tensor:
        """Return the loss of each pair by `loss_type`: [P]."""
        beta, eps, loss_type = self._options.beta, self._options.label_smoothing, self._options.loss_type
        if loss_type in ("ipo", "sigmoid_norm"):
            scores_P2 = scores_P2 / lengths_P2
        margins_P = scores_P2[:, 0] - scores_P2[:, 1]
        match loss_type:
            case "hinge":
                return (1 - beta * margins_P).relu()
            case "ipo":
                return (margins_P - 1 / (2 * beta)).square()
            case "robust":
                # The smoothed loss with eps of the other sign, so that swapped labels cancel in the mean.
                return smoothed(beta * margins_P, -eps / (1 - 2 * eps))
            case _:
                return smoothed(beta * margins_P, eps)


def _ld_weights(batch: Batch, pairs: Sequence[tuple[int, int]], alpha: float) -> Tensor:
    """Return 1 for the labels of each answer up to the length of the pair's shorter one, and `alpha` beyond: [B, T]."""
    import numpy as np

    weights: list[list[float]] = [[] for _ in batch.examples]
    for pair in pairs:
        shared = min(batch.examples[number].num_label_tokens for number in pair)
        for number in pair:
            mask_T = batch.examples[number].loss_mask
            ordinals_T = np.cumsum(mask_T) - mask_T[0]  # the first token is no label, whatever its mask says
            weights[number] = np.where(ordinals_T <= shared, 1.0, alpha).tolist()
    return per_label(batch, weights)
