"""Dynamic fine-tuning (Wu et al. 2025, https://arxiv.org/abs/2508.05629): -p log p of each token, with p detached.

Dimensions: B rows, T tokens, N = B*T.
"""

from __future__ import annotations

from dataclasses import dataclass

from sftx import Batch, LanguageModel, Loss, LossSum, hookimpl

__all__ = ["DFT"]


class DFTLoss:
    """Cross-entropy in which each token counts with its own probability, which gets no gradient."""

    detached = True

    def denominator(self, batch: Batch) -> float:
        return float(batch.num_label_tokens)

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        hidden = lm.hidden(batch)
        nll_N = lm.cross_entropy(
            hidden.hidden_BTD, batch.labels_BT, num_valid=batch.num_label_tokens, reduction="none"
        ).loss
        loss_N = nll_N * (-nll_N.detach()).exp()
        if batch.token_weights_BT is not None:
            loss_N = loss_N * batch.token_weights_BT.flatten()
        return LossSum(loss_N.sum(), hidden.aux_loss, {"nll": nll_N.detach().sum()})


@dataclass(frozen=True, eq=False)
class DFT:
    """Trains unlikely tokens less, so that a few of them do not dominate the update."""

    @hookimpl
    def sftx_loss(self) -> Loss:
        return DFTLoss()
