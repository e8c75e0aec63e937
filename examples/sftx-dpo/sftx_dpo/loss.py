"""The loss of DPO, Rafailov et al. 2023, equation 7: how much more the chosen answer gained than the rejected one.

Dimensions: B rows, T tokens, N = B*T, D hidden, P pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftx import Batch, ConfigError, LossSum

from sftx_dpo.collator import CHOSEN_P, REJECTED_P

if TYPE_CHECKING:
    from sftx import HiddenOut, LanguageModel  # need torch, which options are checked before
    from torch import Tensor


class DPOLoss:
    """-log sigmoid(m) for each pair, where m, its margin, is the reward of the chosen answer less the rejected one's.

    The reward of an answer y to x is beta * log(p(y|x) / p_ref(y|x)): what the adapter changed, in nats times beta.
    `label_smoothing` eps takes a share of the labels for wrong: (1 - eps) * -log sigmoid(m) + eps * -log sigmoid(-m)
    (conservative DPO, Mitchell 2023, https://ericmitchell.ai/cdpo.pdf). That is what the labels are believed to say,
    so that it holds for held-out pairs too.
    """

    def __init__(self, beta: float, label_smoothing: float) -> None:
        self._beta = beta
        self._label_smoothing = label_smoothing

    def denominator(self, batch: Batch) -> float:
        """Pairs."""
        return float(batch.extras[CHOSEN_P].shape[0])

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        """Two forwards: the model without its adapters, then with them. Raises ConfigError when there are none."""
        import torch
        from torch.nn.functional import logsigmoid

        if not lm.adapters:
            raise ConfigError(
                "it compares the model with itself before training, which needs an adapter to switch off; "
                "add --plugin lora"
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
    """[B] fp32: the sum of the log-probabilities of each row's trained tokens, in nats."""
    nll_N = lm.cross_entropy(
        hidden.hidden_BTD,
        batch.labels_BT,
        token_weights_BT=batch.token_weights_BT,
        num_valid=batch.num_label_tokens,
        reduction="none",
    ).loss
    return -nll_N.view_as(batch.labels_BT).sum(1)
