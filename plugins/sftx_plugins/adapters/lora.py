"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = x W^T + (lora_alpha / r) * dropout(x) A^T B^T.

This module holds the options; `targets` chooses the modules, `lora_adapter` and `lora_layers` need torch.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from sftx import Adapter, ConfigError, ModelSpec, RunInfo, hookimpl
from sftx_plugins.adapters.targets import (
    EMBEDDING,
    Targets,
    ends_with,
    find_token_rows,
    is_within,
    path_of,
    read_peft,
    weight_at,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sftx_plugins.adapters.lora_adapter import BaseAdapter
    from sftx_plugins.adapters.lora_layers import LayerOptions

log = logging.getLogger(__name__)

_IGNORED = frozenset(
    {"init_lora_weights", "target_parameters", "fan_in_fan_out", "megatron_core", "eva_config"}
    | {"qalora_group_size", "runtime_config", "ensure_weight_tying"}
)
"""The keys of PEFT's LoraConfig that are read elsewhere, or change nothing in what a loaded adapter computes."""

Rank = Annotated[int, Field(ge=1, le=2**24)]
Alpha = Annotated[float, Field(gt=0)]
TokenId = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, eq=False)
class Lora(Targets):
    """Trains two low-rank matrices beside each chosen linear layer; the saved adapter can be loaded by PEFT."""

    adapts_ends: ClassVar[bool] = True
    adapts_others: ClassVar[bool] = True

    target_parameters: Annotated[
        tuple[str, ...],
        Field(
            description="Weights of stacked experts that are adapted beside target_modules, such as "
            "experts.gate_up_proj; all-linear has them all."
        ),
    ] = ()
    r: Annotated[Rank, Field(description="Rank of the update.")] = 16
    lora_alpha: Annotated[
        Alpha, Field(description="The update is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with use_rslora.")
    ] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout probability of the update's inputs.")] = 0.0
    use_rslora: Annotated[
        bool, Field(description="Scale the update by lora_alpha / sqrt(r), for high ranks (arXiv:2312.03732).")
    ] = False
    use_dora: Annotated[
        bool, Field(description="Train the norm of each row of the weight beside its direction (arXiv:2402.09353).")
    ] = False
    init_lora_weights: Annotated[
        Literal[True] | Annotated[str, Field(pattern=r"^(gaussian|orthogonal|olora|pissa|pissa_niter_[1-9]\d*)$")],
        Field(
            description="How A and B begin. true or gaussian: A drawn, B zero; orthogonal; pissa or pissa_niter_N: "
            "from the weight's largest singular values, found exactly or with N iterations; olora: from its QR "
            "decomposition. The base keeps its weights in all of them."
        ),
    ] = True
    rank_pattern: Annotated[
        Mapping[str, Rank],
        Field(description="Other ranks than r by the module's name or a regular expression for the end of its path."),
    ] = field(default_factory=dict)
    alpha_pattern: Annotated[
        Mapping[str, Alpha], Field(description="Other values than lora_alpha, in the same way.")
    ] = field(default_factory=dict)
    bias: Annotated[
        Literal["none", "all", "lora_only"],
        Field(description="Biases that are trained too: none, all of the decoder, or those of adapted layers."),
    ] = "none"
    lora_bias: Annotated[bool, Field(description="Train a bias of lora_B too, in layers that have a bias.")] = False
    loraplus_lr_ratio: Annotated[
        float,
        Field(
            gt=0,
            description="LoRA+: learning rate of lora_B as a multiple of that of lora_A; its authors recommend 16.",
        ),
    ] = 1.0
    trainable_token_indices: Annotated[
        tuple[TokenId, ...] | Mapping[str, tuple[TokenId, ...]],
        Field(
            description="Ids of tokens whose rows in the embedding and the output head are trained too; or ids by the "
            "name of one of the two, such as embed_tokens."
        ),
    ] = ()

    base_adapters: Annotated[
        tuple[str, ...],
        Field(
            description="Directories of LoRA adapters, ours or PEFT's, that stand below the one that trains and stay "
            "as they are. What is saved holds them too."
        ),
    ] = ()

    @hookimpl
    def sftx_validate(self, run: RunInfo) -> None:
        if self.init_lora_weights == "orthogonal" and (
            odd := [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        ):
            raise ConfigError(f"init_lora_weights: orthogonal needs an even rank, got {odd[0]}")
        if self.base_adapters and self.use_dora:
            raise ConfigError(
                "base_adapters: goes not with use_dora, whose norms are those of one weight; merge the adapters into "
                "the model (sftx export), or leave use_dora out"
            )
        if self.lora_bias and (self.use_dora or self.init_lora_weights is not True):
            raise ConfigError("lora_bias: goes neither with use_dora nor with init_lora_weights; leave one of them out")
        for option, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"{option} {pattern!r} is not a regular expression: {error}") from None

    @classmethod
    def options_of_peft(cls, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return the options for PEFT's adapter_config.json, and the keys of it that no option stands for."""
        options, others = read_peft(config, cls, _IGNORED)
        # However A and B began, the file has what they became; but these have changed the base model's weights as well.
        if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "lora_ga", "mica")):
            others.append(
                f"init_lora_weights {config['init_lora_weights']} (unless it was saved with "
                "path_initial_model_for_weight_conversion)"
            )
        # PEFT's list of tokens is for the embedding alone.
        if isinstance(options.get("trainable_token_indices"), list):
            options["trainable_token_indices"] = {EMBEDDING: options["trainable_token_indices"]}
        # A parameter that is the weight of a linear layer is adapted like that layer; others are those of experts.
        parameters: list[str] = config.get("target_parameters") or []
        linear = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
        targets = config["target_modules"]
        if linear and isinstance(targets, str):
            others.append("target_parameters")
        elif parameters:
            options["target_modules"] = targets if isinstance(targets, str) else [*(targets or ()), *linear]
            options["target_parameters"] = [name for name in parameters if not name.endswith(".weight")]
        return options, others

    @hookimpl
    def sftx_adapter(self, spec: ModelSpec) -> Adapter:
        from sftx_plugins.adapters.lora_adapter import LoraAdapter

        model = spec.skeleton
        targets, saved = self.find(model)
        layers = self.layer_options(targets)
        token_ids = find_token_rows(spec, self.trainable_token_indices)
        self._check_ranks(model, layers)
        self._check_ends_with_options(model, targets, token_ids)
        self._check_experts_with_options(model, targets)
        below = [self._read_base(Path(directory), spec, saved) for directory in self.base_adapters]
        return LoraAdapter(
            spec.name,
            layers,
            saved,
            token_ids,
            biases=self.find_biases(model, targets, saved),
            peft=self.peft_config(),
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            init_from=self.init_from,
            base_adapters=below,
        )

    def _read_base(self, directory: Path, spec: ModelSpec, saved: Sequence[str]) -> BaseAdapter:
        """Return an adapter of `base_adapters`. Raises ConfigError for one that cannot stand below another."""
        from sftx_plugins.adapters.lora_adapter import BaseAdapter

        path = directory.expanduser() / "adapter_config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            options, others = Lora.options_of_peft(config)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"base_adapters: {path} cannot be read as an adapter's configuration ({error}); put it back, or name "
                "another directory"
            ) from error
        plain = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
        others += [name for name in plain if options.get(name)]
        others += ["bias"] if options.get("bias", "none") != "none" else []
        advice = "merge it into its base model (sftx export) and give the result as the model"
        if others or config.get("peft_type") != "LORA":
            what = ", ".join(others) or f"peft_type {config.get('peft_type')}"
            raise ConfigError(f"base_adapters: {directory} has {what}, which cannot stand below another one; {advice}")
        options["init_lora_weights"] = True
        targets, _ = Lora(**options).find(spec.skeleton)
        model = spec.skeleton
        if path_of(model, model.get_input_embeddings()) in targets:
            raise ConfigError(
                f"base_adapters: {directory} adapts the embedding, which cannot stand below another one; {advice}"
            )
        if inside := [target for target in targets if is_within(target, saved)]:
            raise ConfigError(
                f"modules_to_save {list(self.modules_to_save)} train {inside[0]} in full, which {directory} of "
                f"base_adapters adapts; leave it out, or {advice}"
            )
        for option in ("rank_pattern", "alpha_pattern"):  # a dry run's model may have fewer layers
            patterns = options.get(option, {}).items()
            options[option] = {key: value for key, value in patterns if any(_matches(key, path) for path in targets)}
        layers = Lora(**options).layer_options(targets)
        if self.lora_dropout and any(weight_at(model, target).ndim == 3 for target in targets):
            raise ConfigError(
                f"lora_dropout: drops inputs of stacked experts, which {directory} of base_adapters adapts too; set "
                f"it to 0, or {advice}"
            )
        if (base := config.get("base_model_name_or_path")) != spec.name:
            log.warning("base_adapters: %s was trained on %s, and this run trains on %s", directory, base, spec.name)
        return BaseAdapter(path.parent, layers)

    def layer_options(self, targets: Sequence[str]) -> dict[str, LayerOptions]:
        """Return the options of each layer, by its path. Raises ConfigError for a pattern that matches none."""
        from sftx_plugins.adapters.lora_layers import LayerOptions

        for option, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                if not any(_matches(pattern, path) for path in targets):
                    raise ConfigError(f"{option} {pattern!r} matches none of the layers that target_modules match")
        return {
            path: LayerOptions(
                r=next((r for pattern, r in self.rank_pattern.items() if _matches(pattern, path)), self.r),
                lora_alpha=next(
                    (alpha for pattern, alpha in self.alpha_pattern.items() if _matches(pattern, path)), self.lora_alpha
                ),
                lora_dropout=self.lora_dropout,
                use_rslora=self.use_rslora,
                use_dora=self.use_dora,
                lora_bias=self.lora_bias,
                init_lora_weights=self.init_lora_weights,
            )
            for path in targets
        }

    def peft_config(self) -> dict[str, Any]:
        """Return what adapter_config.json says of the options, in PEFT's names and with its rank of the update.

        The update of PiSSA and OLoRA is the difference of two of rank r, which is one of twice the rank.
        """
        is_difference = self.init_lora_weights in ("olora",) or str(self.init_lora_weights).startswith("pissa")
        ranks = 2 if is_difference else 1
        alphas = math.sqrt(ranks) if self.use_rslora else ranks

        def alpha(value: float) -> float:
            return int(value) if value == int(value) else value

        return {
            "alpha_pattern": {pattern: alpha(alphas * value) for pattern, value in self.alpha_pattern.items()},
            "bias": self.bias,
            "lora_alpha": alpha(alphas * self.lora_alpha),
            "lora_bias": self.lora_bias,
            "lora_dropout": self.lora_dropout,
            "peft_type": "LORA",
            "r": ranks * self.r,
            "rank_pattern": {pattern: ranks * value for pattern, value in self.rank_pattern.items()},
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        }

    def _check_ranks(self, model: PreTrainedModel, layers: Mapping[str, LayerOptions]) -> None:
        """Raise ConfigError for a rank above the full rank of every layer, which would make an adapter of any size.

        A layer that begins in its weight (PiSSA, OLoRA) cannot have more than its own full rank.
        """
        ranks = {path: min(weight_at(model, path).shape[-2:]) for path in layers}
        full = max(ranks.values())
        if self.r > full:
            raise ConfigError(
                f"r={self.r} is more than the rank that a layer of this model can have, at most {full}: the update "
                f"would be larger than the layer itself; give an r of at most {full}, such as 16"
            )
        for path, options in layers.items():
            if options.begins_in_the_weight and options.r > ranks[path]:
                raise ConfigError(
                    f"init_lora_weights: {self.init_lora_weights} needs a rank of at most {ranks[path]} for {path}, "
                    f"got {options.r}; give it another one in rank_pattern"
                )

    def _check_ends_with_options(
        self, model: PreTrainedModel, targets: Sequence[str], token_ids: Mapping[str, Sequence[int]]
    ) -> None:
        """Raise ConfigError when the embedding or the head is adapted, and an option cannot hold for it."""
        head, embedding = path_of(model, model.get_output_embeddings()), path_of(model, model.get_input_embeddings())
        ends = [path for path in (embedding, head) if path in targets]
        if ends and token_ids:
            raise ConfigError(
                f"target_modules match {ends[0]!r}, some of whose rows are trained by themselves (added tokens, or "
                "trainable_token_indices); leave it out, or train it in full with modules_to_save"
            )
        if head in ends and self.lora_dropout:
            raise ConfigError(
                f"target_modules match the output head {head!r}, whose update is added to its weight, where "
                "lora_dropout cannot drop inputs; set lora_dropout to 0, or leave the head out"
            )
        if head in ends and self.lora_bias:
            raise ConfigError(f"lora_bias: the output head {head!r} cannot have one; leave one of the two out")
        plain = not (self.use_dora or self.lora_bias) and self.init_lora_weights is True
        if embedding in ends and not plain:
            raise ConfigError(
                f"target_modules match the embedding {embedding!r}, for which there is neither use_dora nor lora_bias "
                "nor another init_lora_weights; leave it out, or these options"
            )

    def _check_experts_with_options(self, model: PreTrainedModel, targets: Sequence[str]) -> None:
        """Raise ConfigError when stacked experts are adapted, and an option cannot hold for them."""
        experts = [path for path in targets if weight_at(model, path).ndim == 3]
        if experts and (self.use_dora or self.lora_bias or self.init_lora_weights is not True):
            raise ConfigError(
                f"{experts[0]!r} is a weight of stacked experts, for which there is neither use_dora nor lora_bias nor "
                "another init_lora_weights; leave these options out, or the experts (exclude_modules: "
                f"{sorted({'.'.join(path.split('.')[-2:]) for path in experts})})"
            )

    def named_parameters(self, stacked: Sequence[str]) -> list[str]:
        if unused := [t for t in self.target_parameters if not any(ends_with(path, (t,)) for path in stacked)]:
            names = ", ".join(sorted({path.rpartition(".")[2] for path in stacked}))
            has = f"these are {names}" if stacked else "this model has none"
            raise ConfigError(f"target_parameters {unused} match no weight of stacked experts; {has}")
        return [path for path in stacked if ends_with(path, self.target_parameters)]

    def find_biases(self, model: PreTrainedModel, targets: Sequence[str], saved: Sequence[str]) -> list[str]:
        """Return the names of the biases to train beside the layers. Raises ConfigError when there is none."""
        if self.bias == "none":
            return []
        language_model = [path_of(model, model.get_decoder()), path_of(model, model.get_output_embeddings())]
        biases = [
            name
            for name, _ in model.named_parameters()
            if ends_with(name, ("bias",)) and is_within(name, language_model) and not is_within(name, saved)
        ]
        if self.bias == "lora_only":
            biases = [name for name in biases if name.removesuffix(".bias") in targets]
        if not biases:
            raise ConfigError(f"bias: {self.bias} trains nothing, since no such layer of this model has a bias")
        return biases


def _matches(pattern: str, path: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern holds for a module, by PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None
