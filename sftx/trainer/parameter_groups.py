"""Lists the trainable parameters of a model and makes parameter groups of them, with learning rate and weight decay.

Importing this module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sftx.errors import ConfigError, ModelError, PluginError
from sftx.types import TrainableParam

if TYPE_CHECKING:
    from torch import nn

    from sftx.config.options import TrainConfig
    from sftx.model.language_model import CausalLM


def trainable_params(lm: CausalLM, config: TrainConfig) -> list[TrainableParam]:
    """Return every trainable parameter, tied ones once. Raises ModelError when there is none; ConfigError, PluginError.

    The learning rate of embedding and head is `embedding_learning_rate` if it is set; otherwise each adapter may scale
    the rate of any parameter.
    """
    # By identity: rows of added tokens are a parametrization of these modules, and tied weights belong to both.
    embedding = {id(parameter) for parameter in lm.model.get_input_embeddings().parameters()}
    head = {id(parameter) for parameter in lm.model.get_output_embeddings().parameters()}
    params = []
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            is_embedding, is_head = id(parameter) in embedding, id(parameter) in head
            if (is_embedding or is_head) and config.embedding_learning_rate is not None:
                scale = config.embedding_learning_rate / config.learning_rate
            else:
                scale = _adapter_scale(lm, name)
            params.append(TrainableParam(name, parameter, scale, is_embedding, is_head))
    if not params:
        raise ModelError("nothing is left to train: no parameter of the model requires a gradient")
    if config.embedding_learning_rate is not None and not any(p.is_embedding or p.is_head for p in params):
        raise ConfigError(
            "option 'train.embedding_learning_rate': neither the embedding nor the head trains in this run; leave it "
            "out, or train them (with lora: modules_to_save, with freeze: extra_modules)"
        )
    return params


def _adapter_scale(lm: CausalLM, name: str) -> float:
    """Return the product of the factors that the adapters give the learning rate of a parameter."""
    scale = 1.0
    for adapter in lm.adapters.values():
        value: object = adapter.rate_scale(name.removeprefix("model."))
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise PluginError(f"{adapter}: rate_scale of {name} is {value!r}, expected a number above 0")
        scale *= value
    return scale


def parameter_groups(params: Iterable[TrainableParam], weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups as optimizers of torch take them: `params`, `scale` and `weight_decay`.

    Norm weights and biases, which are the vectors of a transformer, have a weight decay of 0.
    """
    by_options: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for param in params:
        by_options.setdefault((param.scale, param.parameter.ndim >= 2), []).append(param.parameter)
    return [
        {"params": parameters, "scale": scale, "weight_decay": weight_decay if is_matrix else 0.0}
        for (scale, is_matrix), parameters in by_options.items()
    ]
