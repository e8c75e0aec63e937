"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = x W^T + (lora_alpha / r) * dropout(x) A^T B^T.

This module holds the options and finds the modules to adapt; `lora_adapter` and `lora_layers` need torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from sftx import Adapter, ConfigError, ModelSpec, hookimpl

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, eq=False)
class Lora:
    """Trains two low-rank matrices beside each chosen linear layer; the saved adapter can be loaded by PEFT."""

    r: Annotated[int, Field(ge=1, le=2**24, description="Rank of the update.")] = 16
    lora_alpha: Annotated[float, Field(gt=0, description="The update is scaled by lora_alpha / r.")] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout probability of the update's inputs.")] = 0.0
    loraplus_lr_ratio: Annotated[
        float,
        Field(
            gt=0,
            description="LoRA+: learning rate of lora_B as a multiple of that of lora_A; its authors recommend 16.",
        ),
    ] = 1.0
    target_modules: Annotated[
        str | tuple[str, ...],
        Field(
            description="all-linear (all linear layers except the output head), a list of module names, or a regular "
            "expression for the whole path."
        ),
    ] = ALL_LINEAR
    modules_to_save: Annotated[
        tuple[str, ...],
        Field(description="Modules trained and saved in full, such as lm_head and embed_tokens."),
    ] = ()
    trainable_token_indices: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(description="Ids of tokens whose rows in the embedding and the output head are trained too."),
    ] = ()

    @hookimpl
    def sftx_adapter(self, spec: ModelSpec) -> Adapter:
        from sftx_plugins.adapters.lora_adapter import LoraAdapter
        from sftx_plugins.adapters.lora_layers import LayerOptions

        saved = self.find_saved(spec.skeleton)
        # What trains in full needs no update beside it, and PEFT expects none there.
        targets = [path for path in self.find_targets(spec.skeleton) if not _is_within(path, saved)]
        if not targets:
            raise ConfigError(
                f"modules_to_save {list(self.modules_to_save)} hold every layer that target_modules match, so nothing "
                "is left to adapt; leave the modules out, or train the whole model without lora"
            )
        self._check_rank(spec.skeleton, targets)
        options = LayerOptions(self.r, self.lora_alpha, self.lora_dropout)
        return LoraAdapter(
            spec.name,
            dict.fromkeys(targets, options),
            saved,
            self.find_token_ids(spec),
            peft=self.peft_config(),
            loraplus_lr_ratio=self.loraplus_lr_ratio,
        )

    def peft_config(self) -> dict[str, Any]:
        """Return what adapter_config.json says of the options, in PEFT's names."""
        alpha = self.lora_alpha
        return {
            "bias": "none",
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self.lora_dropout,
            "peft_type": "LORA",
            "r": self.r,
        }

    def _check_rank(self, model: PreTrainedModel, targets: Iterable[str]) -> None:
        """Raise ConfigError for a rank above the full rank of every target, which would make an adapter of any size."""
        full = max(min(cast("nn.Linear", model.get_submodule(name)).weight.shape) for name in targets)
        if self.r > full:
            raise ConfigError(
                f"r={self.r} is more than the rank that a layer of this model can have, at most {full}: the update "
                f"would be larger than the layer itself; give an r of at most {full}, such as 16"
            )

    def find_targets(self, model: PreTrainedModel) -> list[str]:
        """Return the paths of the linear layers to adapt, all of them in the language model.

        Raises ConfigError if there are none, or one is the head.
        """
        from torch import nn

        head = _path_of(model, model.get_output_embeddings())
        language_model = [_path_of(model, model.get_decoder()), head]
        linear = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and _is_within(name, language_model)
        ]
        body = [name for name in linear if name != head]
        if not body:
            has_conv1d = any(type(module).__name__ == "Conv1D" for module in model.modules())
            what = "Conv1D of transformers, not nn.Linear" if has_conv1d else "no nn.Linear"
            raise ConfigError(
                f"{type(model).__name__} has no linear layer for lora: its layers are {what}; train the whole model "
                "instead (leave lora out)"
            )
        if self.target_modules == ALL_LINEAR:
            return body
        if isinstance(self.target_modules, str):
            try:
                pattern = re.compile(self.target_modules)
            except re.error as error:
                raise ConfigError(
                    f"target_modules {self.target_modules!r} is not a regular expression: {error}"
                ) from None
            targets = [name for name in linear if pattern.fullmatch(name)]
        else:
            targets = [name for name in linear if _ends_with(name, self.target_modules)]
            unused = [t for t in self.target_modules if not any(_ends_with(name, (t,)) for name in linear)]
            if unused and targets:
                raise ConfigError(f"target_modules {unused} match no linear layer; this model has {_last_names(body)}")
        if not targets:
            option = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
            raise ConfigError(f"target_modules {option!r} match no linear layer; this model has {_last_names(body)}")
        if head in targets:
            raise ConfigError(
                f"target_modules match the output head {head!r}, whose logits are never materialised; "
                f"leave it out, or train it in full with modules_to_save: [{head}]"
            )
        return targets

    def find_saved(self, model: PreTrainedModel) -> list[str]:
        """Return the paths of the modules trained in full.

        Raises ConfigError if a name matches no module, or if the modules hold only one of two tied weights.
        """
        parts = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
        language_model = [_path_of(model, part) for part in parts]
        modules = [
            name
            for name, module in model.named_modules()
            if _is_within(name, language_model) and any(True for _ in module.parameters())
        ]
        matched = [name for name in modules if _ends_with(name, self.modules_to_save)]
        for ending in self.modules_to_save:
            if not any(_ends_with(name, (ending,)) for name in matched):
                raise ConfigError(
                    f"modules_to_save {ending!r} matches no module of the language model; it has {_last_names(modules)}"
                )
        saved = [name for name in matched if not _is_within(name, [other for other in matched if other != name])]
        head = _path_of(model, model.get_output_embeddings())
        embedding = _path_of(model, model.get_input_embeddings())
        is_tied = bool(model.config.get_text_config().tie_word_embeddings)
        if is_tied and (head in saved) != (embedding in saved):
            raise ConfigError(
                f"modules_to_save {list(self.modules_to_save)} would split tied weights: {head} and {embedding} are "
                "one tensor in this model; name both to train it, or neither"
            )
        return saved

    def find_token_ids(self, spec: ModelSpec) -> list[int]:
        """Return the ids of the tokens whose rows are trained, ascending. Raises ConfigError for one without a row."""
        num_rows = cast(Any, spec.skeleton.get_input_embeddings()).weight.shape[0]
        for token_id in self.trainable_token_indices:
            if token_id >= num_rows and token_id not in spec.new_token_ids:
                raise ConfigError(
                    f"trainable_token_indices: {token_id} is beyond the embedding, which has {num_rows} rows"
                )
        return sorted({*spec.new_token_ids, *self.trainable_token_indices})


def _ends_with(path: str, endings: Iterable[str]) -> bool:
    return any(path == ending or path.endswith(f".{ending}") for ending in endings)


def _is_within(path: str, parents: Iterable[str]) -> bool:
    """Return whether a module's path is one of these, or below one of them."""
    return any(not parent or path == parent or path.startswith(f"{parent}.") for parent in parents)


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(str(path) for path, other in model.named_modules() if other is module)


def _last_names(paths: Iterable[str]) -> str:
    """Return the last names of the paths, each once, for an error message."""
    names = [path.rpartition(".")[2] for path in paths]
    return ", ".join(dict.fromkeys(name for name in names if not name.isdigit()))
