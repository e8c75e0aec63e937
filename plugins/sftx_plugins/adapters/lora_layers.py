"""The layers of LoRA, and how they are saved, loaded and merged: in PEFT's files, under PEFT's names.

Dimensions: R rank, K in, O out.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sftx import Adapter, ConfigError, LanguageModel, ModelError
from sftx_kernels import lora_linear
from sftx_plugins.adapters import token_rows

if TYPE_CHECKING:
    from sftx_plugins.adapters.lora import Lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# Layers of one forward draw from seeds this far apart: 2^63 divided by the golden ratio, the usual odd step.
_SEED_STEP = 5700357409661598953


class LoraLinear(nn.Linear):
    """A linear layer and its low-rank update, in the linear layer's place: `weight` and `bias` keep their names."""

    def __init__(self, linear: nn.Linear, options: Lora, *, run_seed: Tensor, layer: int) -> None:
        nn.Module.__init__(self)  # not nn.Linear's own, which would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling = options.lora_alpha / options.r
        self.dropout_p = options.lora_dropout
        self.enabled = True
        self._run_seed = run_seed
        self._seed_offset = layer * _SEED_STEP % 2**63
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(options.r, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, options.r, dtype=torch.float32, device=device))
        # PEFT's choice: A as nn.Linear is initialised, B zero, so that the update begins as nothing.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        if not self.enabled:
            return super().forward(input)
        dropout_p = self.dropout_p if self.training else 0.0
        return lora_linear(
            input,
            self.weight,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            dropout_p=dropout_p,
            seed=self._run_seed + self._seed_offset if dropout_p else None,
            bias=self.bias,
        )

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer that computes the same; the product is formed in fp32."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        update_OK = self.scaling * (self.lora_B @ self.lora_A)
        linear.weight = nn.Parameter((self.weight + update_OK).to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


class LoraAdapter(Adapter):
    """The LoRA layers of one model, and what is trained in full beside them: modules, and rows of added tokens."""

    def __init__(
        self, options: Lora, base: str, targets: Sequence[str], saved: Sequence[str], new_token_ids: Sequence[int] = ()
    ) -> None:
        self.options = options
        self._base = base
        self._targets = list(targets)
        self._saved = list(saved)
        self._new_token_ids = list(new_token_ids)
        self._token_rows: dict[str, token_rows.TokenRows] = {}
        self._shown_targets: list[str] = []
        self._layers: dict[str, LoraLinear] = {}
        self._full: dict[str, nn.Parameter] = {}
        self._originals: dict[str, Tensor] = {}

    def attach(self, lm: LanguageModel) -> None:
        model = lm.model
        self._shown_targets = _endings(self._targets, [name for name, _ in model.named_modules()])
        for layer, name in enumerate(self._targets):
            linear = model.get_submodule(name)
            added = {key for key, _ in linear.named_parameters()} - {"weight", "bias"}
            if added or not isinstance(linear, nn.Linear):
                raise ConfigError(f"another adapter of this run has changed {name} already; leave one of the two out")
            self._layers[name] = LoraLinear(linear, self.options, run_seed=lm.seed, layer=layer)
            model.set_submodule(name, self._layers[name])
        for name in self._saved:
            module = model.get_submodule(name)
            for key, parameter in module.named_parameters():
                # Tied weights are one parameter under two names, and stay one.
                if not parameter.requires_grad:
                    self._originals[f"{name}.{key}"] = parameter.data
                    parameter.data = parameter.data.to(torch.float32, copy=True)
                    parameter.requires_grad_()
                self._full[f"{name}.{key}"] = parameter
        if self._new_token_ids:
            self._token_rows = token_rows.attach(model, self._new_token_ids)

    def rate_scale(self, name: str) -> float:
        """LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354): B learns faster than A."""
        path, _, which = name.rpartition(".")
        return self.options.loraplus_lr_ratio if which == "lora_B" and path in self._layers else 1.0

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        trained = {name: self._full[name].data for name in self._originals}
        parts: list[LoraLinear | token_rows.TokenRows] = [*self._layers.values(), *self._token_rows.values()]
        enabled = {part: part.enabled for part in parts}  # not, within another `disabled`
        try:
            for part in parts:
                part.enabled = False
            for name, original in self._originals.items():
                self._full[name].data = original
            yield
        finally:
            for part, was in enabled.items():
                part.enabled = was
            for name, value in trained.items():
                self._full[name].data = value

    def save(self, directory: Path) -> None:
        tensors = {f"{_PREFIX}{name}": t.detach().contiguous().cpu() for name, t in self._named().items()}
        # safetensors refuses two names of one memory: tied weights are written twice, as PEFT expects them.
        seen: set[int] = set()
        for name, tensor in tensors.items():
            if tensor.data_ptr() in seen:
                tensors[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / CONFIG).write_text(json.dumps(self._config(), indent=2) + "\n", encoding="utf-8")

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        own = {f"{_PREFIX}{name}": tensor for name, tensor in self._named().items()}
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            if names != set(own):
                missing, extra = sorted(set(own) - names), sorted(names - set(own))
                raise ModelError(
                    f"{directory / WEIGHTS}: {len(missing)} tensors of this adapter are missing and {len(extra)} are "
                    f"not of it (first: {(missing + extra)[0]}); it was made for other target_modules or another model"
                )
            for name, tensor in own.items():
                value = file.get_tensor(name)
                if value.shape != tensor.shape:
                    got, expected = list(value.shape), list(tensor.shape)
                    raise ModelError(f"{directory / WEIGHTS}: {name} has the shape {got}, expected {expected}")
                tensor.copy_(value)

    def merge(self, lm: LanguageModel) -> None:
        for name, layer in self._layers.items():
            lm.model.set_submodule(name, layer.merged())
        token_rows.merge(lm.model)
        for name, original in self._originals.items():
            self._full[name].data = self._full[name].data.to(original.dtype)
            self._full[name].requires_grad_(False)
        self._layers, self._full, self._originals, self._token_rows = {}, {}, {}, {}

    def _named(self) -> dict[str, Tensor]:
        """What is trained, under PEFT's names without their prefix."""
        lora = {
            f"{name}.{which}.weight": getattr(layer, which)
            for name, layer in self._layers.items()
            for which in ("lora_A", "lora_B")
        }
        rows = {f"{name}.{token_rows.KEY}": rows.rows_AD for name, rows in self._token_rows.items()}
        return lora | self._full | rows

    def _config(self) -> dict[str, Any]:
        """adapter_config.json, as far as PEFT does not take its default."""
        return {
            "base_model_name_or_path": self._base,
            "bias": "none",
            "ensure_weight_tying": len(self._full) > len(self._originals),
            "inference_mode": True,
            "lora_alpha": _whole(self.options.lora_alpha),
            "lora_dropout": self.options.lora_dropout,
            "modules_to_save": self._saved or None,
            "peft_type": "LORA",
            "r": self.options.r,
            "target_modules": self._shown_targets,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": {
                name.rpartition(".")[2]: rows.ids_A.tolist() for name, rows in self._token_rows.items()
            }
            or None,
        }


def _endings(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """The last words of the targets' paths where PEFT, which matches endings, finds just these; else whole paths."""
    words = sorted({target.rpartition(".")[2] for target in targets})
    matched = [name for name in names if name.rpartition(".")[2] in words]
    return words if set(matched) == set(targets) else list(targets)


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value
