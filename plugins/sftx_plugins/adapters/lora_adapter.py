"""LoraAdapter attaches, disables, saves, loads and merges LoRA layers, modules trained in full, and rows of tokens."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sftx import Adapter, LanguageModel, ModelError
from sftx_kernels import QuantizedLinear
from sftx_plugins.adapters import peft_files, token_rows
from sftx_plugins.adapters.lora_experts import LoraExperts, QuantizedExperts, by_module, peft_prefixes, stacked_weights
from sftx_plugins.adapters.lora_layers import LayerOptions, LoraEmbedding, LoraHead, LoraLayer, make_layer, share_inputs

_MATRICES = ("lora_A.weight", "lora_B.weight")
"""How the names of tensors end whose shapes have the rank."""


class BaseAdapter(NamedTuple):
    """An adapter that stands below the one that trains, as files of PEFT."""

    directory: Path
    targets: Mapping[str, LayerOptions]
    """Its options by the path of each module, or of each weight of stacked experts, that it adapts."""


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
        base_adapters: Sequence[BaseAdapter] = (),
    ) -> None:
        """Take the model's name, the paths of the modules to adapt, and those of the modules to train in full.

        A path of `targets` may also be that of a weight of stacked experts.
        `token_ids`: tokens whose rows are trained, by the path of the embedding or the head. `biases`: names of
        parameters that are trained too. `peft`: what is in adapter_config.json beside the model and its modules.
        `init_from`: directory of an adapter whose weights are the first ones. `base_adapters`: those that stay as they
        are, and are saved with this one, as one update.
        """
        self._base = base
        self._targets = dict(targets)
        self._saved = list(saved)
        self._token_ids = dict(token_ids or {})
        self._biases = list(biases)
        self._peft = dict(peft)
        self._loraplus_lr_ratio = loraplus_lr_ratio
        self._init_from = init_from
        self._base_adapters = list(base_adapters)
        self._layers: dict[str, LoraLayer] = {}
        self._token_rows: dict[str, token_rows.TokenRows] = {}
        self._full: dict[str, nn.Parameter] = {}
        """The parameters trained in full, by name."""
        self._originals: dict[str, Tensor] = {}
        """Their values before training. Tied weights are in `_full` under two names and here under one."""
        self._has_values = True
        self._frozen: set[str] = set()
        """The paths of the layers that only `base_adapters` adapt."""

    quantizer: Callable[[str, nn.Module], nn.Module | None] | None = None
    """What `quantize` returns, by a module's path; the plugin qlora sets it."""

    def quantize(self, name: str, module: nn.Module) -> nn.Module | None:
        return None if self.quantizer is None else self.quantizer(name, module)

    def attach(self, lm: LanguageModel) -> None:
        model = lm.model
        targets = [*self._targets, *(path for base in self._base_adapters for path in base.targets)]
        self._peft |= peft_files.target_entries(
            list(dict.fromkeys(targets)),
            [name for name, _ in model.named_modules()],
            [f"{path}.{name}" for path, module in model.named_modules() for name in stacked_weights(module)],
        )
        for path, options in by_module(model, self._targets).items():
            self._add_layer(path, options, lm)
        share_inputs(self._layers)
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
        parameter = next(iter(model.parameters()))
        self._has_values = not (parameter.is_meta or isinstance(parameter, FakeTensor))
        if self._init_from is not None:
            self._load(Path(self._init_from), ranks_are_known=True)
        for adapter in self._base_adapters:
            self._add_below(adapter, lm)

    def _add_layer(self, path: str, options: LayerOptions | Mapping[str, LayerOptions], lm: LanguageModel) -> LoraLayer:
        base, number = lm.model.get_submodule(path), len(self._layers)
        if isinstance(options, LayerOptions):
            layer = self.make_layer(path, base, options, lm=lm, number=number)
        else:
            layer = LoraExperts(base, options, run_seed=lm.seed, number=number, path=path)
        layer.install(lm.model, path)
        self._layers[path] = layer
        return layer

    def _add_below(self, adapter: BaseAdapter, lm: LanguageModel) -> None:
        """Add an adapter that does not train: to layers of this one, and as layers of its own."""
        modules = by_module(lm.model, adapter.targets)
        fresh = [path for path in modules if path not in self._layers]
        for path in fresh:
            self._add_layer(path, modules[path], lm)
        self._frozen.update(fresh)
        shapes = {f"{path}.{n}": t.shape for path in fresh for n, t in self._layers[path].tensors().items()}
        names = set(shapes)
        for path, options in modules.items():
            prefixes = list(peft_prefixes(self._layers[path], options).values()) if isinstance(options, dict) else [""]
            names |= {f"{path}.{prefix}{matrix}" for prefix in prefixes for matrix in _MATRICES}
        tensors = peft_files.read(adapter.directory, names, shapes, self._bases(), values=self._has_values)
        for path, options in modules.items():
            own = {name.removeprefix(f"{path}."): t for name, t in tensors.items() if name.startswith(f"{path}.")}
            with _names_the_file(adapter.directory, path):
                if path in fresh:
                    self._layers[path].load(own)
                    self._layers[path].freeze_update()
                else:
                    self._layers[path].add_below(own, options)

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
        layers = (layer for path, layer in self._layers.items() if path not in self._frozen)
        modules: list[LoraLayer | token_rows.TokenRows] = [*layers, *self._token_rows.values()]
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

    def load(self, directory: Path) -> None:
        self._load(directory, ranks_are_known=not self._base_adapters)

    @torch.no_grad()
    def _load(self, directory: Path, *, ranks_are_known: bool) -> None:
        """Load what was saved. Where its ranks are not known, what is beyond a layer's own is of adapters below it."""
        own = self._tensors()
        shapes = {name: t.shape for name, t in own.items() if ranks_are_known or not name.endswith(_MATRICES)}
        tensors = peft_files.read(directory, own, shapes, self._bases(), values=self._has_values)
        for path, layer in self._layers.items():
            of_layer = {name: tensors.pop(f"{path}.{name}") for name in layer.tensors()}
            with _names_the_file(directory, path):
                layer.load(of_layer)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def _bases(self) -> dict[str, Tensor]:
        """Return the weights of the model that PEFT may write into an adapter's file, by their names there."""
        return {
            f"{path}.base_layer.weight": layer.base_weight()
            for path, layer in self._layers.items()
            if isinstance(layer, LoraEmbedding | LoraHead)
        }

    def merge(self, lm: LanguageModel) -> None:
        for path, layer in self._layers.items():
            layer.merge(lm.model, path)
        quantised = [(n, m) for n, m in lm.model.named_modules() if isinstance(m, QuantizedLinear | QuantizedExperts)]
        for path, module in quantised:  # layers that no update has made dense
            lm.model.set_submodule(path, module.dequantized())
        token_rows.merge(lm.model)
        for name, original in self._originals.items():
            self._full[name].data = self._full[name].data.to(original.dtype)
            self._full[name].requires_grad_(False)
        self._layers, self._full, self._originals, self._token_rows = {}, {}, {}, {}
        self._frozen.clear()

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved under PEFT's names without their prefix."""
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
            "fan_in_fan_out": any(layer.fan_in_fan_out for layer in self._layers.values()),
            "ensure_weight_tying": len(self._full) > len(self._originals),
            "inference_mode": True,
            "modules_to_save": self._saved or None,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": rows or None,
        }
        if config["target_parameters"]:
            config["lora_dropout"] = 0.0  # PEFT has none for parameters, and refuses to load an adapter with it
        if self._base_adapters:
            config |= self._ranks()
        return dict(sorted(config.items()))

    def _ranks(self) -> dict[str, Any]:
        """Return the entries of adapter_config.json for layers whose ranks are those of several adapters together."""
        ranks = {
            f"{path}.{name}" if name else path: (r, scaling * r)
            for path, layer in self._layers.items()
            for name, (r, scaling) in layer.ranks().items()
        }
        (r, alpha), _ = Counter(ranks.values()).most_common(1)[0]

        def pattern(path: str) -> str:  # where experts are stacked, PEFT knows a linear layer by its weight
            return rf"{re.escape(path)}(\.weight)?"

        return {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": {pattern(path): own for path, (own, _) in ranks.items() if own != r},
            "alpha_pattern": {pattern(path): own for path, (_, own) in ranks.items() if own != alpha},
            "use_rslora": False,
        }


@contextlib.contextmanager
def _names_the_file(directory: Path, path: str) -> Iterator[None]:
    """Turn a ValueError about the tensors of a layer into a ModelError."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"{directory}: the adapter of {path} {error}; it was made for another model") from error
