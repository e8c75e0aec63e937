"""Partial fine-tuning: some layers of the model train, all others are frozen, and the result is a full model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sftx import ConfigError, ModelSpec, RunInfo, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Name = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, eq=False)
class Freeze:
    """Trains some layers of the model, by default the last two, and freezes the others; the result is a full model."""

    trainable_layers: Annotated[
        int,
        Field(
            ge=-(10**6),
            le=10**6,
            description="How many of the last layers of the decoder train; -3 for the first three; 0 for none, when "
            "extra_modules say what trains.",
        ),
    ] = 2
    trainable_modules: Annotated[
        Name | tuple[Name, ...],
        Field(description="The modules of these layers that train, such as mlp or self_attn.q_proj; all by default."),
    ] = "all"
    extra_modules: Annotated[
        tuple[Name, ...],
        Field(
            description="Other modules or parameters that train: names, such as embed_tokens, norm or lm_head, or "
            "regular expressions of such names in a parameter's path."
        ),
    ] = ()

    @property
    def _modules(self) -> tuple[str, ...]:
        return (self.trainable_modules,) if isinstance(self.trainable_modules, str) else self.trainable_modules

    @hookimpl
    def sftx_validate(self, run: RunInfo) -> None:
        if self.trainable_layers == 0 and not self.extra_modules:
            raise ConfigError("trainable_layers: 0 and no extra_modules: nothing would train; give one of the two")
        if self.trainable_layers == 0 and self._modules != ("all",):
            raise ConfigError(
                "trainable_modules chooses within the trained layers, and trainable_layers is 0; leave it out"
            )
        if not self._modules:
            raise ConfigError("trainable_modules is empty; leave it out for all modules, or set trainable_layers to 0")
        for pattern in self.extra_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"extra_modules: {pattern!r} is not a regular expression: {error}") from None

    @hookimpl
    def sftx_trainable(self, spec: ModelSpec) -> Set[str]:
        names = spec.parameter_names
        chosen = set(self._in_layers(spec.skeleton, names)) if self.trainable_layers else set()
        for pattern in self.extra_modules:
            matching = [name for name in names if re.search(rf"(^|\.)(?:{pattern})(\.|$)", name)]
            if not matching:
                known = _parts(name for name in names if not re.search(r"\.\d+\.", name))
                raise ConfigError(
                    f"extra_modules: {pattern!r} matches no parameter of the language model; outside of its layers it "
                    f"has {known}"
                )
            chosen.update(matching)
        return chosen

    def _in_layers(self, model: PreTrainedModel, names: Iterable[str]) -> list[str]:
        """Return the names of the parameters that train in the last or the first layers. Raises ConfigError."""
        layers = _layers(model)
        if abs(self.trainable_layers) > len(layers):
            raise ConfigError(
                f"trainable_layers is {self.trainable_layers}, and the decoder of this model has {len(layers)} layers"
            )
        chosen = layers[-self.trainable_layers :] if self.trainable_layers > 0 else layers[: -self.trainable_layers]
        inside = {
            name: name.removeprefix(f"{layer}.") for layer in chosen for name in names if name.startswith(f"{layer}.")
        }
        if self._modules == ("all",):
            return list(inside)
        for module in self._modules:
            if not any(_has(path, module) for path in inside.values()):
                raise ConfigError(
                    f"trainable_modules: {module!r} matches nothing in the layers that train, which have "
                    f"{_parts(inside.values())}"
                )
        return [name for name, path in inside.items() if any(_has(path, module) for module in self._modules)]


def _layers(model: PreTrainedModel) -> list[str]:
    """Return the paths of the decoder's layers. Raises ConfigError where they are no list of the configured length."""
    from torch import nn

    num_layers = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and id(module) in inside
    ]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no list of {num_layers} layers; set trainable_layers to 0, and name what "
            "trains in extra_modules"
        )
    path = min(lists, key=lambda path: path.count("."))
    return [f"{path}.{number}" for number in range(num_layers)]


def _has(path: str, module: str) -> bool:
    """Return whether a parameter is one of that name, or in a module of that name."""
    return f".{module}." in f".{path}."


def _parts(paths: Iterable[str]) -> str:
    """Return the names in these paths, each once, for an error message."""
    return ", ".join(
        dict.fromkeys(part for path in paths for part in path.split(".") if part not in ("weight", "bias"))
    )
