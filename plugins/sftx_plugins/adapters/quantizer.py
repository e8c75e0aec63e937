"""The quantised layers of QLoRA. `lora_layers` has the layers that add a low-rank update to one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sftx_kernels import QuantizedLinear, QuantizedWeight, quantize_int8, quantize_nf4, quantize_stack
from sftx_plugins.adapters.lora_experts import QuantizedExperts, stacked_weights
from sftx_plugins.adapters.lora_layers import QuantizedConv1D


class Quantizer:
    """Replaces layers by quantised ones: `Adapter.quantize` of QLoRA."""

    def __init__(self, paths: Sequence[str], *, eight_bits: bool, double: bool) -> None:
        """`paths`: of linear layers, of transformers' Conv1D, and of weights of stacked experts."""
        self._paths = frozenset(paths)
        self._eight_bits = eight_bits
        self._double = double

    def __call__(self, path: str, module: nn.Module) -> nn.Module | None:
        if path in self._paths and isinstance(module, nn.Linear | Conv1D):
            kind = QuantizedConv1D if isinstance(module, Conv1D) else QuantizedLinear
            weight_OK = module.weight.T.contiguous() if isinstance(module, Conv1D) else module.weight
            return kind(self._quantize(weight_OK), module.bias, weight_OK.dtype)
        names = [name for name in stacked_weights(module) if f"{path}.{name}" in self._paths]
        if not names:
            return None
        stacks = {name: quantize_stack(module.get_parameter(name), self._quantize) for name in names}
        return QuantizedExperts(module, stacks)

    def _quantize(self, weight_OK: Tensor) -> QuantizedWeight:
        return quantize_int8(weight_OK) if self._eight_bits else quantize_nf4(weight_OK, double=self._double)
