"""The parameters that train become AdamW with its groups."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from sftx.config import TrainConfig
from sftx.errors import ModelError


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) over what requires grad; norms and biases do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError("nothing is left to train: no parameter of the model requires a gradient")
    # Norm weights and biases are the vectors of a transformer, everything else is a matrix.
    decayed = [parameter for parameter in trained if parameter.ndim >= 2]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
