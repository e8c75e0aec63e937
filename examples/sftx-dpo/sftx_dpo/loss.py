"""The loss of DPO (Rafailov et al. 2023, equation 7).

Dimensions: B rows, T tokens, N = B*T, D hidden, P pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftx import Batch, ConfigError, LossSum

from sftx_dpo.collator import CHOSEN_P, REJECTED_P

if TYPE_CHECKING:
    from sftx import HiddenOut, LanguageModel
    from torch import Tensor


class DPOLoss:
    """Computes -log sigmoid(m) for each pair, with the margin m = reward(chosen) - reward(rejected).

    The reward of an answer y to x is beta * log(p(y|x) / p_ref(y|x)), where p_ref is the model without its adapter.
    `label_smoothing` eps assumes that a share of the labels is wrong: (1 - eps) * -log sigmoid(m) + eps * -log
    sigmoid(-m) (conservative DPO, Mitchell 2023, https://ericmitchell.ai/cdpo.pdf). It describes the labels, so it
    applies to held-out pairs too.
    """

    answers_only = True

    def __init__(self, beta: float, label_smoothing: float) -> None:
        self._beta = beta
        self._label_smoothing = label_smoothing

    def denominator(self, batch: Batch) -> float:
        """Return the number of pairs."""
        return float(batch.extras[CHOSEN_P].shape[0])

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        """Run the model without its adapters, then with them. Raises ConfigError if there are none."""
        import torch
        from torch.nn.functional import logsigmoid

        if not lm.adapters:
            raise ConfigError(
                "the reference of dpo is the model without its adapters, so a run needs one; add --plugin lora"
            )
        with torch.no_grad(), lm.without_adapters():
            reference_B = log_likelihoods(lm, batch, lm.hidden(batch))
        hidden = lm.hidden(batch)
        rewards_B = self._beta * (log_likelihoods(lm, batch, hidden) - reference_B)
        chosen_P, rejected_P = rewards_B[batch.extras[CHOSEN_P]], rewards_B[batch.extras[REJECTED_P]]
        margins_P = chosen_P - rejected_P
        eps = self._label_smoothing
        loss_P = -(1 - eps) * logsigmoid(margins_P) - eps * logsigmoid(-margins_P)
        metrics = {
            "rewards/chosen": chosen_P.detach().sum(),
            "rewards/rejected": rejected_P.detach().sum(),
            "rewards/margins": margins_P.detach().sum(),
            "rewards/accuracies": (margins_P.detach() > 0).to(margins_P.dtype).sum(),
        }
        return LossSum(loss_P.sum(), hidden.aux_loss, metrics)


def log_likelihoods(lm: LanguageModel, batch: Batch, hidden: HiddenOut) -> Tensor:
    """Return the sum of the log-probabilities of each row's label tokens in nats: [B], fp32."""
    nll_N = lm.cross_entropy(
        hidden.hidden_BTD,
        batch.labels_BT,
        token_weights_BT=batch.token_weights_BT,
        num_valid=batch.num_label_tokens,
        reduction="none",
    ).loss
    return -nll_N.view_as(batch.labels_BT).sum(1)
