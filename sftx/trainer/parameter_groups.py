"""What trains of a model becomes parameter groups: each with its share of the learning rate, with decay or without."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sftx.config.options import TrainConfig
from sftx.errors import ConfigError, ModelError, PluginError
from sftx.model.language_model import CausalLM


@dataclass(frozen=True)
class TrainableParam:
    """A parameter that trains, and what an optimizer must know of its place in the model."""

    name: str
    parameter: nn.Parameter
    scale: float
    """What the learning rate is multiplied with."""
    is_embedding: bool
    """Of the input embedding: it gets gradients in the rows of the batch's tokens only."""
    is_head: bool

    @property
    def is_matrix(self) -> bool:
        """Norm weights and biases are the vectors of a transformer, everything else has more dimensions."""
        return self.parameter.ndim >= 2


def trained(lm: CausalLM, config: TrainConfig) -> list[TrainableParam]:
    """Every parameter that trains, tied ones once. Raises ModelError when there is none, ConfigError, PluginError."""
    # By identity: rows of added tokens lie in a parametrisation of these modules, tied weights in both.
    embedding = {id(parameter) for parameter in lm.model.get_input_embeddings().parameters()}
    head = {id(parameter) for parameter in lm.model.get_output_embeddings().parameters()}
    found = [
        TrainableParam(name, p, _scale(lm, config, name, id(p) in embedding | head), id(p) in embedding, id(p) in head)
        for name, p in lm.named_parameters()
        if p.requires_grad
    ]
    if not found:
        raise ModelError("nothing is left to train: no parameter of the model requires a gradient")
    if config.embedding_learning_rate is not None and not any(one.is_embedding or one.is_head for one in found):
        raise ConfigError(
            "option 'train.embedding_learning_rate': neither the embedding nor the head trains in this run; leave it "
            "out, or train them (with lora: modules_to_save)"
        )
    return found


def _scale(lm: CausalLM, config: TrainConfig, name: str, is_end: bool) -> float:
    """The rate of embedding and head is the option's where it is given; else each adapter may scale its own."""
    if is_end and config.embedding_learning_rate is not None:
        return config.embedding_learning_rate / config.learning_rate
    scale = 1.0
    for adapter in lm.adapters.values():
        value: object = adapter.rate_scale(name.removeprefix("model."))
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise PluginError(f"{adapter}: rate_scale of {name} is {value!r}, expected a number above 0")
        scale *= value
    return scale


def groups(members: Iterable[TrainableParam], weight_decay: float) -> list[dict[str, Any]]:
    """Groups in torch's form, with `scale` beside `weight_decay`; norms and biases do not decay."""
    by_kind: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for one in members:
        by_kind.setdefault((one.scale, one.is_matrix), []).append(one.parameter)
    return [
        {"params": parameters, "scale": scale, "weight_decay": weight_decay if decays else 0.0}
        for (scale, decays), parameters in by_kind.items()
    ]
