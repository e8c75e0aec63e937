"""The layers of LoRA, and how they are saved, loaded and merged: in PEFT's files, under PEFT's names.

Dimensions: R rank, K in, O out.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sftx import Adapter, ConfigError, LanguageModel, ModelError
from sftx_kernels import lora_linear
from sftx_plugins.adapters import token_rows

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# PEFT takes a target module of such a name, in a model whose experts are stacked, for one of the experts, as they were
# before transformers 5 stacked them. It therefore gets these layers as `target_parameters`, which it takes as they are.
_NAMES_OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
# The dropout seeds of consecutive layers are this far apart: 2^63 divided by the golden ratio, made odd.
_SEED_STEP = 5700357409661598953


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank update. It replaces the linear layer; `weight` and `bias` keep their names."""

    def __init__(
        self, linear: nn.Linear, *, r: int, scaling: float, dropout_p: float, run_seed: Tensor, layer: int
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling = scaling
        self.dropout_p = dropout_p
        self.enabled = True
        self._run_seed = run_seed
        self._seed_offset = layer * _SEED_STEP % 2**63
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32, device=device))
        # As in PEFT: A is initialised like nn.Linear and B is zero, so the update is zero at first.
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
        """Return a plain linear layer that computes the same. The product B A is computed in fp32."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        update_OK = self.scaling * (self.lora_B @ self.lora_A)
        linear.weight = nn.Parameter((self.weight + update_OK).to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


class LoraAdapter(Adapter):
    """The LoRA layers of one model, the modules trained in full, and the trained rows of single tokens."""

    def __init__(
        self,
        base: str,
        targets: Sequence[str],
        saved: Sequence[str],
        token_ids: Sequence[int] = (),
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        loraplus_lr_ratio: float,
    ) -> None:
        """`base` is the model's name; `targets` and `saved` are paths of linear layers and of modules; `token_ids` are
        those of the tokens whose rows in the embedding and the head are trained.
        """
        self.r = r
        self._lora_alpha = lora_alpha
        self._lora_dropout = lora_dropout
        self._loraplus_lr_ratio = loraplus_lr_ratio
        self._base = base
        self._targets = list(targets)
        self._saved = list(saved)
        self._token_ids = list(token_ids)
        self._peft_targets: list[str] = []
        self._peft_parameters: list[str] = []
        self._layers: dict[str, LoraLinear] = {}
        self._token_rows: dict[str, token_rows.TokenRows] = {}
        self._full: dict[str, nn.Parameter] = {}
        """The parameters trained in full, by name."""
        self._originals: dict[str, Tensor] = {}
        """Their values before training. Tied weights are in `_full` under two names and here under one."""

    def attach(self, lm: LanguageModel) -> None:
        model = lm.model
        modules = [name for name, _ in model.named_modules()]
        has_stacked_experts = any(
            name.endswith(".gate_up_proj") and p.ndim == 3 for name, p in model.named_parameters()
        )
        confused = _NAMES_OF_EXPERTS if has_stacked_experts else frozenset()
        self._peft_parameters = [f"{name}.weight" for name in self._targets if name.rpartition(".")[2] in confused]
        named = [name for name in self._targets if f"{name}.weight" not in self._peft_parameters]
        self._peft_targets = _peft_targets(named, modules)
        for layer, name in enumerate(self._targets):
            linear = model.get_submodule(name)
            added = {key for key, _ in linear.named_parameters()} - {"weight", "bias"}
            if added or not isinstance(linear, nn.Linear):
                raise ConfigError(f"another adapter of this run has changed {name} already; leave one of the two out")
            self._layers[name] = LoraLinear(
                linear,
                r=self.r,
                scaling=self._lora_alpha / self.r,
                dropout_p=self._lora_dropout,
                run_seed=lm.seed,
                layer=layer,
            )
            model.set_submodule(name, self._layers[name])
        for name in self._saved:
            module = model.get_submodule(name)
            for key, parameter in module.named_parameters():
                # Tied weights are one parameter under two names and stay one.
                if not parameter.requires_grad:
                    self._originals[f"{name}.{key}"] = parameter.data
                    parameter.data = parameter.data.to(torch.float32, copy=True)
                    parameter.requires_grad_()
                self._full[f"{name}.{key}"] = parameter
        if self._token_ids:
            self._token_rows = token_rows.attach(model, self._token_ids)

    def rate_scale(self, name: str) -> float:
        """LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354) trains B with a higher learning rate than A."""
        path, _, last = name.rpartition(".")
        return self._loraplus_lr_ratio if last == "lora_B" and path in self._layers else 1.0

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        trained = {name: self._full[name].data for name in self._originals}
        modules: list[LoraLinear | token_rows.TokenRows] = [*self._layers.values(), *self._token_rows.values()]
        was_enabled = {module: module.enabled for module in modules}  # False inside another `disabled`
        try:
            for module in modules:
                module.enabled = False
            for name, original in self._originals.items():
                self._full[name].data = original
            yield
        finally:
            for module, enabled in was_enabled.items():
                module.enabled = enabled
            for name, value in trained.items():
                self._full[name].data = value

    def save(self, directory: Path) -> None:
        tensors = {f"{_PREFIX}{name}": t.detach().contiguous().cpu() for name, t in self._tensors().items()}
        # Tied weights are written twice: PEFT (0.21) loads no adapter that lacks one of the names, and safetensors
        # refuses two names for one memory.
        addresses: set[int] = set()
        for name, tensor in tensors.items():
            if tensor.data_ptr() in addresses:
                tensors[name] = tensor.clone()
            addresses.add(tensor.data_ptr())
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / CONFIG).write_text(json.dumps(self._config(), indent=2) + "\n", encoding="utf-8")

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        own = {f"{_PREFIX}{name}": tensor for name, tensor in self._tensors().items()}
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            if names != set(own):
                missing, extra = sorted(set(own) - names), sorted(names - set(own))
                raise ModelError(
                    f"{directory / WEIGHTS}: {len(missing)} tensors of this adapter are missing and {len(extra)} are "
                    f"not part of it (first: {(missing + extra)[0]}); the file was made with other target_modules or "
                    "for another model"
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

    def _tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors under PEFT's names without their prefix."""
        lora = {
            f"{name}.{matrix}.weight": getattr(layer, matrix)
            for name, layer in self._layers.items()
            for matrix in ("lora_A", "lora_B")
        }
        rows = {f"{name}.{token_rows.KEY}": rows.rows_AD for name, rows in self._token_rows.items()}
        return lora | self._full | rows

    def _config(self) -> dict[str, Any]:
        """Return adapter_config.json, without the entries that have PEFT's default."""
        alpha = self._lora_alpha
        return {
            "base_model_name_or_path": self._base,
            "bias": "none",
            "ensure_weight_tying": len(self._full) > len(self._originals),
            "inference_mode": True,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            # PEFT has no dropout for parameters, and refuses to load an adapter that asks for it.
            "lora_dropout": 0.0 if self._peft_parameters else self._lora_dropout,
            "modules_to_save": self._saved or None,
            "peft_type": "LORA",
            "r": self.r,
            "target_modules": self._peft_targets,
            "target_parameters": self._peft_parameters or None,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": {
                name.rpartition(".")[2]: rows.ids_A.tolist() for name, rows in self._token_rows.items()
            }
            or None,
        }


def _peft_targets(targets: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return the last names of the targets' paths, or the whole paths if the names would match other modules too.

    PEFT adapts every module whose path ends in a name.
    """
    names = sorted({target.rpartition(".")[2] for target in targets})
    matched = [module for module in modules if module.rpartition(".")[2] in names]
    return names if set(matched) == set(targets) else list(targets)
