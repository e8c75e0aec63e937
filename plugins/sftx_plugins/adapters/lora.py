"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = x W^T + (lora_alpha / r) * drop(x) A^T B^T.

This file holds the options and finds the modules; `_lora_layers` holds what needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sftx import Adapter, ConfigError, ModelSpec, hookimpl

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, eq=False)
class Lora:
    """Trains two low-rank matrices beside each chosen linear layer; writes what PEFT reads."""

    r: Annotated[int, Field(ge=1, description="Rank of the update.")] = 16
    lora_alpha: Annotated[float, Field(gt=0, description="The update is scaled by lora_alpha / r.")] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="Share of the update's inputs set to 0.")] = 0.0
    loraplus_lr_ratio: Annotated[
        float,
        Field(gt=0, description="LoRA+: the learning rate of lora_B, as a multiple of lora_A's; 16 is the authors'."),
    ] = 1.0
    target_modules: Annotated[
        str | tuple[str, ...],
        Field(
            description="all-linear (all but the output head), a list of module names, or a regular expression "
            "for the whole path."
        ),
    ] = ALL_LINEAR
    modules_to_save: Annotated[
        tuple[str, ...],
        Field(description="Modules trained and saved in full, such as lm_head and embed_tokens."),
    ] = ()

    @hookimpl
    def sftx_adapter(self, spec: ModelSpec) -> Adapter:
        from sftx_plugins.adapters.lora_layers import LoraAdapter

        targets, saved = self.find_targets(spec.skeleton), self.find_saved(spec.skeleton)
        return LoraAdapter(self, spec.name, targets, saved, spec.new_token_ids)

    def find_targets(self, model: PreTrainedModel) -> list[str]:
        """Paths of the linear layers to adapt. Raises ConfigError when there are none, or one is the head."""
        from torch import nn

        head = _name_of(model, model.get_output_embeddings())
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        body = [name for name in linear if name != head]
        if self.target_modules == ALL_LINEAR:
            return body
        if isinstance(self.target_modules, str):
            try:
                pattern = re.compile(self.target_modules)
            except re.error as error:
                raise ConfigError(f"target_modules {self.target_modules!r} is no regular expression: {error}") from None
            found = [name for name in linear if pattern.fullmatch(name)]
        else:
            found = [name for name in linear if _ends_with(name, self.target_modules)]
            idle = [t for t in self.target_modules if not any(_ends_with(name, (t,)) for name in linear)]
            if idle and found:
                raise ConfigError(f"target_modules {idle} match no linear layer; this model has {_kinds(body)}")
        if not found:
            wanted = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
            raise ConfigError(f"target_modules {wanted!r} match no linear layer; this model has {_kinds(body)}")
        if head in found:
            raise ConfigError(
                f"target_modules match the output head {head!r}, whose product is never formed; "
                f"leave it out, or train it in full with modules_to_save: [{head}]"
            )
        return found

    def find_saved(self, model: PreTrainedModel) -> list[str]:
        """Paths of the modules trained in full. Raises ConfigError when a name fits none, or splits tied weights."""
        modules = [name for name, module in model.named_modules() if next(module.parameters(), None) is not None]
        found = [name for name in modules if name and _ends_with(name, self.modules_to_save)]
        for wanted in self.modules_to_save:
            if not any(_ends_with(name, (wanted,)) for name in found):
                raise ConfigError(
                    f"modules_to_save {wanted!r} fits no module; this model has {_kinds([m for m in modules if m])}"
                )
        head = _name_of(model, model.get_output_embeddings())
        embedding = _name_of(model, model.get_input_embeddings())
        tied = bool(model.config.get_text_config().tie_word_embeddings)
        if tied and (head in found) != (embedding in found):
            raise ConfigError(
                f"modules_to_save {list(self.modules_to_save)} would split tied weights: {head} and {embedding} are "
                "one tensor in this model; name both to train it, or neither"
            )
        return found


def _ends_with(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[wanted]


def _kinds(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()))
