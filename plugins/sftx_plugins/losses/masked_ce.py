"""Cross-entropy of the label tokens; the logits are never materialised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sftx import Batch, Loss, LossSum, hookimpl

if TYPE_CHECKING:
    from sftx import LanguageModel


@dataclass(frozen=True, eq=False)
class MaskedCE:
    """Next-token cross-entropy over the label tokens; head and loss are computed together, in chunks."""

    label_smoothing: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of the target that is spread over the vocabulary; in training only."),
    ] = 0.0
    z_loss: Annotated[
        float, Field(ge=0, description="Weight of log(sum(exp(logits)))^2, which keeps logits small; in training only.")
    ] = 0.0
    workspace_mb: Annotated[
        int | None,
        Field(ge=1, le=2**20, description="Largest chunk of logits, in MiB; by default a chunk is 256 rows on a CPU."),
    ] = None

    @hookimpl
    def sftx_loss(self) -> Loss:
        return self

    def denominator(self, batch: Batch) -> float:
        return float(batch.num_label_tokens)

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        import torch

        hidden = lm.hidden(batch)
        # Regularisation is not part of a held-out loss.
        evaluating = not torch.is_grad_enabled()
        out = lm.cross_entropy(
            hidden.hidden_BTD,
            batch.labels_BT,
            token_weights_BT=batch.token_weights_BT,
            num_valid=batch.num_label_tokens,
            label_smoothing=0.0 if evaluating else self.label_smoothing,
            z_loss=0.0 if evaluating else self.z_loss,
            workspace_bytes=None if self.workspace_mb is None else self.workspace_mb * 2**20,
            stats=evaluating,
        )
        metrics = {}
        if out.correct_N is not None:
            metrics = {"token_accuracy": out.correct_N.sum(), "nll": out.loss}
        return LossSum(out.loss, hidden.aux_loss, metrics)
