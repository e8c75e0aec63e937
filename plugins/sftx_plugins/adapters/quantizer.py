"""The quantised layers of QLoRA. `lora_layers` has the layer that adds a low-rank update to one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sftx_kernels import QuantizedLinear, QuantizedWeight, quantize_int8, quantize_nf4


class Quantizer:
    """Replaces the linear layers of these paths by quantised ones: `Adapter.quantize` of QLoRA."""

    def __init__(self, paths: Sequence[str], *, eight_bits: bool, double: bool) -> None:
        self._paths = frozenset(paths)
        self._eight_bits = eight_bits
        self._double = double

    def __call__(self, path: str, module: nn.Module) -> nn.Module | None:
        if path not in self._paths or not isinstance(module, nn.Linear):
            return None
        weight_OK = module.weight
        if self._eight_bits:
            weight: QuantizedWeight = quantize_int8(weight_OK)
        else:
            weight = quantize_nf4(weight_OK, double=self._double)
        return QuantizedLinear(weight, module.bias, weight_OK.dtype)
