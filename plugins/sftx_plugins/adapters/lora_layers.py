"""The layers of LoRA. A layer takes the place of the module that it adapts, whose tensors keep their names in it.

Dimensions: R rank, K in, O out.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sftx import ConfigError
from sftx_kernels import NF4Weight, lora_linear

# The dropout seeds of consecutive layers are this far apart: 2^63 divided by the golden ratio, made odd.
_SEED_STEP = 5700357409661598953


@dataclass(frozen=True)
class LayerOptions:
    """What sets one LoRA layer of an adapter apart."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r


class LoraLayer(nn.Module):
    """A module that computes what another one did, plus a low-rank update. `LoraAdapter` knows no more of it.

    A subclass for another kind of module names it in `adapts`; importing the subclass makes it known to `make_layer`.
    """

    adapts: ClassVar[type[nn.Module]]
    """The class of modules that this class of layers can replace."""
    kinds: ClassVar[list[type[LoraLayer]]] = []
    """The classes of layers, most special kind of module first."""
    enabled: bool
    """Whether the update is added; False inside `Adapter.disabled`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "adapts" in vars(cls):
            LoraLayer.kinds.insert(0, cls)

    def __init__(self, base: nn.Module, options: LayerOptions, *, run_seed: Tensor, number: int) -> None:
        """`run_seed`: `LanguageModel.seed`; `number`: of this layer among those of the adapter."""
        nn.Module.__init__(self)  # that of a subclass such as nn.Linear would allocate a weight
        for name, parameter in base.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in base.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in base._non_persistent_buffers_set)
        self.enabled = True
        self.options = options
        self.scaling = options.scaling
        self._run_seed = run_seed
        self._seed_offset = number * _SEED_STEP % 2**63

    def dropout_seed(self) -> Tensor:
        """Return the seed of this layer's dropout in the coming forward, 0-d int64."""
        return self._run_seed + self._seed_offset

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved, by PEFT's names relative to the layer's path, such as `lora_A.weight`."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """Return a plain module that computes the same, with the base's class and the names of its tensors."""


def make_layer(path: str, base: nn.Module, options: LayerOptions, *, run_seed: Tensor, number: int) -> LoraLayer:
    """Return the LoRA layer for a module. Raises ConfigError for one that has no kind, or is changed already."""
    kind = next((kind for kind in LoraLayer.kinds if isinstance(base, kind.adapts)), None)
    added = {name for name, _ in base.named_parameters()} - {"weight", "bias"}
    if kind is None or added or isinstance(base, LoraLayer):
        raise ConfigError(f"another adapter of this run has changed {path} already; leave one of the two out")
    return kind(base, options, run_seed=run_seed, number=number)


class LoraLinear(LoraLayer, nn.Linear):
    """A linear layer with a low-rank update. Subclasses hold their weight in another form (see `base_weight`)."""

    adapts = nn.Linear

    def __init__(self, base: nn.Module, options: LayerOptions, *, run_seed: Tensor, number: int) -> None:
        super().__init__(base, options, run_seed=run_seed, number=number)
        self.register_parameter("bias", getattr(base, "bias", None))
        weight = self.base_weight()
        self.out_features, self.in_features = weight.shape
        r, device = options.r, self.weight_device()
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32, device=device))
        # As in PEFT: A is initialised like nn.Linear and B is zero, so the update is zero at first.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def base_weight(self) -> Tensor | NF4Weight:
        """Return the frozen weight, [O, K], as `lora_linear` takes it."""
        return self.weight

    def weight_device(self) -> torch.device:
        return self.weight.device

    def base_forward(self, x: Tensor) -> Tensor:
        """Compute what the module did before it was adapted."""
        return nn.functional.linear(x, self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if not self.enabled:
            return self.base_forward(input)
        dropout_p = self.options.lora_dropout if self.training else 0.0
        return lora_linear(
            input,
            self.base_weight(),
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            dropout_p=dropout_p,
            seed=self.dropout_seed() if dropout_p else None,
            bias=self.bias,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the weight with the update, [O, K] in fp32 or the weight's own wider dtype."""
        return self.weight + self.scaling * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.merged_weight().to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear
