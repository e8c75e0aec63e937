"""LoraAdapter attaches, disables, saves, loads and merges LoRA layers, modules trained in full, and rows of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sftx import Adapter, LanguageModel
from sftx_plugins.adapters import peft_files, token_rows
from sftx_plugins.adapters.lora_experts import LoraExperts, by_module, stacked_weights
from sftx_plugins.adapters.lora_layers import LayerOptions, LoraConv1D, LoraEmbedding, LoraHead, LoraLayer, make_layer


class LoraAdapter(Adapter):
    """The LoRA layers of one model, the modules trained in full, and the trained rows of single tokens."""

    def __init__(
        self,
        base: str,
        targets: Mapping[str, LayerOptions],
        saved: Sequence[str],
        token_ids: Mapping[str, Sequence[int]] | None = None,
        *,
        biases: Sequence[str] = (),
        peft: Mapping[str, Any],
        loraplus_lr_ratio: float = 1.0,
        init_from: str | None = None,
    ) -> None:
        """Take the model's name, the paths of the modules to adapt, and those of the modules to train in full.

        A path of `targets` may also be that of a weight of stacked experts.
        `token_ids`: tokens whose rows are trained, by the path of the embedding or the head. `biases`: names of
        parameters that are trained too. `peft`: what is in adapter_config.json beside the model and its modules.
        `init_from`: directory of an adapter whose weights are the first ones.
        """
        self._base = base
        self._targets = dict(targets)
        self._saved = list(saved)
        self._token_ids = dict(token_ids or {})
        self._biases = list(biases)
        self._peft = dict(peft)
        self._loraplus_lr_ratio = loraplus_lr_ratio
        self._init_from = init_from
        self._layers: dict[str, LoraLayer] = {}
        self._token_rows: dict[str, token_rows.TokenRows] = {}
        self._full: dict[str, nn.Parameter] = {}
        """The parameters trained in full, by name."""
        self._originals: dict[str, Tensor] = {}
        """Their values before training. Tied weights are in `_full` under two names and here under one."""

    quantizer: Callable[[str, nn.Module], nn.Module | None] | None = None
    """What `quantize` returns, by a module's path; the plugin qlora sets it."""

    def quantize(self, name: str, module: nn.Module) -> nn.Module | None:
        return None if self.quantizer is None else self.quantizer(name, module)

    def attach(self, lm: LanguageModel) -> None:
        model = lm.model
        self._peft |= peft_files.target_entries(
            list(self._targets),
            [name for name, _ in model.named_modules()],
            [f"{path}.{name}" for path, module in model.named_modules() for name in stacked_weights(module)],
        )
        for number, (path, options) in enumerate(by_module(model, self._targets).items()):
            base = model.get_submodule(path)
            layer: LoraLayer
            if isinstance(options, dict):
                layer = LoraExperts(base, options, run_seed=lm.seed, number=number, path=path)
            else:
                layer = self.make_layer(path, base, options, lm=lm, number=number)
            layer.install(model, path)
            self._layers[path] = layer
        full = {f"{path}.{key}": p for path in self._saved for key, p in model.get_submodule(path).named_parameters()}
        for name, parameter in (full | {name: model.get_parameter(name) for name in self._biases}).items():
            # Tied weights are one parameter under two names and stay one.
            if not parameter.requires_grad:
                self._originals[name] = parameter.data
                parameter.data = parameter.data.to(torch.float32, copy=True)
                parameter.requires_grad_()
            self._full[name] = parameter
        if self._token_ids:
            self._token_rows = token_rows.attach(model, self._token_ids)
        if self._init_from is not None and next(iter(model.parameters())).device.type != "meta":
            self.load(Path(self._init_from))

    def make_layer(
        self, path: str, base: nn.Module, options: LayerOptions, *, lm: LanguageModel, number: int
    ) -> LoraLayer:
        """Return the layer that takes the place of a module. Subclasses return layers of another kind."""
        is_head = base is lm.model.get_output_embeddings()
        return make_layer(path, base, options, run_seed=lm.seed, number=number, is_head=is_head)

    def rate_scale(self, name: str) -> float:
        """LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354) trains B with a higher learning rate than A."""
        path, _, last = name.rpartition(".")
        is_layer = path.removesuffix(".parametrizations.weight.0") in self._layers
        return self._loraplus_lr_ratio if last.endswith("lora_B") and is_layer else 1.0

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        trained = {name: self._full[name].data for name in self._originals}
        modules: list[LoraLayer | token_rows.TokenRows] = [*self._layers.values(), *self._token_rows.values()]
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
        peft_files.write(directory, self._tensors(), self._config())

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        bases = {
            f"{path}.base_layer.weight": layer.base_weight()
            for path, layer in self._layers.items()
            if isinstance(layer, LoraEmbedding | LoraHead)
        }
        tensors = peft_files.read(directory, self._tensors(), bases)
        for path, layer in self._layers.items():
            layer.load({name: tensors.pop(f"{path}.{name}") for name in layer.tensors()})
        own = self._tensors()
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def merge(self, lm: LanguageModel) -> None:
        for path, layer in self._layers.items():
            layer.merge(lm.model, path)
        token_rows.merge(lm.model)
        for name, original in self._originals.items():
            self._full[name].data = self._full[name].data.to(original.dtype)
            self._full[name].requires_grad_(False)
        self._layers, self._full, self._originals, self._token_rows = {}, {}, {}, {}

    def _tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors under PEFT's names without their prefix."""
        layers = {f"{path}.{name}": t for path, layer in self._layers.items() for name, t in layer.tensors().items()}
        rows = {f"{path}.{token_rows.KEY}": rows.rows_AD for path, rows in self._token_rows.items()}
        full = {self._name_of_full(name): parameter for name, parameter in self._full.items()}
        return layers | full | rows

    def _name_of_full(self, name: str) -> str:
        """Return PEFT's name of a parameter that trains in full: within a LoRA layer that is its `base_layer`'s."""
        path, _, last = name.rpartition(".")
        return f"{path}.base_layer.{last}" if path in self._layers else name

    def _config(self) -> dict[str, Any]:
        """Return adapter_config.json, without the entries that have PEFT's default."""
        rows = {path.rpartition(".")[2]: rows.ids_A.tolist() for path, rows in self._token_rows.items()}
        config = {
            **self._peft,
            "base_model_name_or_path": self._base,
            # PEFT's word for a weight that is stored as [K, O], which it finds out by itself, with a warning.
            "fan_in_fan_out": any(isinstance(layer, LoraConv1D) for layer in self._layers.values()),
            "ensure_weight_tying": len(self._full) > len(self._originals),
            "inference_mode": True,
            "modules_to_save": self._saved or None,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": rows or None,
        }
        if config["target_parameters"]:
            config["lora_dropout"] = 0.0  # PEFT has none for parameters, and refuses to load an adapter with it
        return dict(sorted(config.items()))
