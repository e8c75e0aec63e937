"""Layers that read one tensor, such as q, k and v, are computed together when the first of them is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)

# The names, in transformers, of children of one module that are called with one tensor.
_NAMES: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharedInput:
    """Computes the outputs of several layers when the first is called, and hands each layer its own.

    If a layer is called with another tensor than the first one, or not at all, all are computed alone from then on.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._input: Tensor | None = None
        self._version = 0
        self._outputs: dict[nn.Module, Tensor] = {}

    def output_of(
        self, layer: nn.Module, x: Tensor, compute: Callable[[Sequence[Any], Tensor], Sequence[Tensor]]
    ) -> Tensor | None:
        """Return the output of one of the layers for x; None where it has to be computed alone.

        `compute` returns the outputs of these layers for x.
        """
        if self._layers and layer is self._layers[0] and not self._outputs:
            self._outputs = dict(zip(self._layers, compute(self._layers, x), strict=True))
            self._input, self._version = x, x._version
        if x is not self._input or x._version != self._version or layer not in self._outputs:
            self._layers, self._outputs, self._input = (), {}, None
            return None
        output = self._outputs.pop(layer)
        if not self._outputs:
            self._input = None
        return output


def groups(layers: Mapping[str, Layer]) -> list[list[Layer]]:
    """Return those of these layers, given by their paths in the model, that are called with one tensor."""
    found = []
    for path in layers:
        parent, _, name = path.rpartition(".")
        for names in _NAMES:
            members = [layers[f"{parent}.{one}"] for one in names if f"{parent}.{one}" in layers]
            if name == names[0] and len(members) > 1:
                found.append(members)
    return found
