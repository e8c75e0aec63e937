"""Quantises layers while a model's weights are read, and reads weights that are quantised already.

transformers reads a checkpoint tensor by tensor, renames and merges what has to be, and offers each finished parameter
to an `HfQuantizer` before the next one is read. The quantiser here hands a module to the adapters as soon as it has all
of its parameters, so that no more than one layer is in memory in full.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sftx.errors import ModelError
from sftx.types import Adapter
from sftx_kernels import Int8Weight, NF4Weight, QuantizedLinear, QuantizedWeight, quantize_int8, quantize_nf4
from sftx_kernels.nf4 import LEVELS, nested_levels

log = logging.getLogger(__name__)

_METHOD: Final = "sftx"
_NF4_STATE: Final = "weight.quant_state.bitsandbytes__nf4"

Quantize = Callable[[str, nn.Module], nn.Module | None]
"""Returns the replacement of a module, by its path, or None to keep it."""


def quantize_of(adapters: Sequence[Adapter]) -> Quantize:
    """Return what asks the adapters in their order, and takes the first replacement."""

    def quantize(name: str, module: nn.Module) -> nn.Module | None:
        replacements = (adapter.quantize(name, module) for adapter in adapters)
        return next((replacement for replacement in replacements if replacement is not None), None)

    return quantize


def find_quantised(model: nn.Module, quantize: Quantize) -> dict[str, nn.Module]:
    """Return the replacement of each module that is quantised, by its path; parts of one are not looked at."""
    replacements: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not any(name.startswith(f"{path}.") for path in replacements):
            replacement = quantize(name, module)
            if replacement is not None:
                replacements[name] = replacement
    return replacements


def replace_quantised(model: nn.Module, quantize: Quantize) -> None:
    """Quantise the modules of a model that has its weights, or is on the meta device."""
    for name, replacement in find_quantised(model, quantize).items():
        model.set_submodule(name, replacement)


def num_weights(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many weights the parameters hold; one byte of codes of four bits holds two."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in parameters)


# --- while a checkpoint is read -------------------------------------------------------------------


class _Private(QuantizationConfigMixin):
    """A `quantization_config` of `from_pretrained` that transformers passes to `_Quantizer`."""

    def __init__(self) -> None:
        super().__init__(cast(Any, _METHOD))
        self.error: Exception | None = None
        """What was raised while a tensor was converted, which transformers would report as a traceback."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Private:
        return self  # transformers copies its arguments, and `error` is to be seen here


class LoadQuantised(_Private):
    """Asks transformers to quantise while it reads."""

    def __init__(self, quantize: Quantize, device: torch.device) -> None:
        """`device`: where a module is quantised, and stays."""
        super().__init__()
        self.quantize = quantize
        self.device = device


class ReadQuantised(_Private):
    """Asks transformers to read the layers that bitsandbytes quantised as `QuantizedLinear`."""

    def __init__(self, dtype: torch.dtype, stored: Mapping[str, Any]) -> None:
        """`dtype`: that of all other weights; `stored`: the `quantization_config` of config.json."""
        super().__init__()
        self.dtype = dtype
        self.stored = stored


class _Quantizer(HfQuantizer):
    """Connects `LoadQuantised` and `ReadQuantised` with transformers."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.options: LoadQuantised | ReadQuantised = quantization_config
        # What is quantised on the way is read one tensor after the other, without threads that read ahead. What is
        # quantised already must not be cast.
        self.pre_quantized = isinstance(self.options, ReadQuantised)
        self.waiting: dict[str, set[str]] = {}
        """The parameters that modules to quantise have yet to get, by the path of the module."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if isinstance(self.options, LoadQuantised):
            for path in find_quantised(model, self.options.quantize):
                module = model.get_submodule(path)
                self.waiting[path] = {f"{path}.{name}" for name, _ in module.named_parameters()}

    def owner_of(self, parameter: str) -> str | None:
        return next((path for path, names in self.waiting.items() if parameter in names), None)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self.owner_of(param_name) is not None

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not isinstance(self.options, ReadQuantised):
            return []
        if self.options.stored.get("load_in_8bit"):
            names = ["weight", "SCB", "weight_format"]
        else:
            parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            names = ["weight", *(f"weight.{part}" for part in parts), _NF4_STATE]
        return [WeightConverter(names, "weight", [_Read(self)])]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Leave a model that is quantised by its modules alone: transformers would refuse to move or save it."""
        for module in model.modules():
            if hasattr(module, "config") and getattr(module.config, "_is_quantized", False):
                module.config._is_quantized = False
        del model.config.quantization_config, model.hf_quantizer, model.quantization_method
        model.is_quantized = False

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


AUTO_QUANTIZER_MAPPING[_METHOD] = _Quantizer


class _Quantise(ConversionOps):
    """Puts a parameter into its module, and quantises the module when that was its last."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Any]:
        kept = {}
        for name, value in input_dict.items():
            tensor: Tensor = value[0] if isinstance(value, list) else value
            path = self.quantizer.owner_of(name)
            if path is None or tensor.shape != model.get_parameter(name).shape:
                if path is not None:
                    del self.quantizer.waiting[path]  # transformers reports the shape of what it is handed back
                kept[name] = value
                continue
            try:
                self.put(model, path, name, tensor)
            except Exception as error:
                self.quantizer.options.error = error
                raise
            missing_keys.discard(name)
        return kept

    def put(self, model: nn.Module, path: str, name: str, tensor: Tensor) -> None:
        options = self.quantizer.options
        assert isinstance(options, LoadQuantised)
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[last] = nn.Parameter(tensor.to(options.device), requires_grad=False)
        self.quantizer.waiting[path].remove(name)
        if not self.quantizer.waiting[path]:
            del self.quantizer.waiting[path]
            replacement = options.quantize(path, model.get_submodule(path))
            assert replacement is not None
            _mark_initialized(replacement)
            model.set_submodule(path, replacement)
            # GPT-2's blocks initialise the weights of their parts, which these have no more.
            model.get_submodule(path.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]


def forget_reading(model: PreTrainedModel) -> None:
    """Let transformers save a model whose quantised layers it has read, once they are dense: it would store them so."""
    conversions = getattr(model, "_weight_conversions", None) or []
    kept = [one for one in conversions if not any(isinstance(op, _Read) for op in getattr(one, "operations", ()))]
    model._weight_conversions = kept  # type: ignore[assignment]


class _Read(ConversionOps):
    """Makes a `QuantizedLinear` of what bitsandbytes stores for one."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.hf_quantizer = quantizer  # under this name transformers takes the tensors for what must not be cast

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        options = self.hf_quantizer.options
        assert isinstance(options, ReadQuantised)
        parts: dict[str, Tensor] = {n: v[0] if isinstance(v, list) else v for n, v in input_dict.items()}
        if len(parts) == 1:
            return {n: t.to(options.dtype) if t.is_floating_point() else t for n, t in parts.items()}
        path = full_layer_name.rpartition(".")[0]
        linear = cast(nn.Linear, model.get_submodule(path))
        try:
            weight = read_int8(parts) if "SCB" in parts else read_nf4(parts)
            expected = tuple(linear.weight.shape)
            if weight.shape != expected:
                raise ModelError(f"{full_layer_name} is {list(weight.shape)}, expected {list(expected)}")
        except Exception as error:
            options.error = error
            raise
        layer = QuantizedLinear(weight, linear.bias, options.dtype)
        _mark_initialized(layer)
        model.set_submodule(path, layer)
        missing_keys.discard(full_layer_name)
        return {}


def _mark_initialized(layer: nn.Module) -> None:
    """Keep transformers from initialising a layer that has its weights."""
    for module in layer.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


# --- weights that are quantised already -----------------------------------------------------------


def read_int8(parts: Mapping[str, Tensor]) -> Int8Weight:
    """Return a weight of LLM.int8() as bitsandbytes stores it."""
    if int(parts.get("weight_format", torch.tensor(0))) != 0:
        raise ModelError("its int8 weights are in a layout for one kind of GPU; store them anew with bitsandbytes 0.43")
    return Int8Weight(parts["weight"].contiguous(), parts["SCB"].float())


def read_nf4(parts: Mapping[str, Tensor]) -> NF4Weight:
    """Return an NF4 weight as bitsandbytes stores it. Raises ModelError for other levels than those of NF4."""
    state = json.loads(bytes(parts[_NF4_STATE].tolist()))
    codes = parts["weight"].flatten()
    shape = (int(state["shape"][0]), int(state["shape"][1]))
    levels = [(parts["weight.quant_map"], torch.tensor(LEVELS))]
    nested = "weight.nested_absmax" in parts
    if nested:
        levels.append((parts["weight.nested_quant_map"], nested_levels(torch.device("cpu"))))
    if any(not torch.equal(theirs.cpu(), ours) for theirs, ours in levels):
        raise ModelError("its four-bit weights have other levels than NF4")
    if not nested:
        return NF4Weight(codes, parts["weight.absmax"].float(), shape)
    offset = torch.tensor(float(state["nested_offset"]))
    return NF4Weight(codes, parts["weight.absmax"], shape, parts["weight.nested_absmax"], offset)


def stored_quantize(stored: Mapping[str, Any]) -> Quantize:
    """Return what replaces the layers that bitsandbytes has quantised, for a model without weights."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = list(stored.get("llm_int8_skip_modules") or ["lm_head"])

    def quantize(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) is not nn.Linear or not should_convert_module(name, skipped):
            return None
        if stored.get("load_in_8bit"):
            weight: QuantizedWeight = quantize_int8(module.weight)
        else:
            weight = quantize_nf4(module.weight, double=bool(stored.get("bnb_4bit_use_double_quant")))
        return QuantizedLinear(weight, module.bias, module.weight.dtype)

    return quantize
