"""The layers of LoRA. A layer takes the place of the module that it adapts, whose tensors keep their names in it.

Dimensions: R rank, K in, O out, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from sftx import ConfigError
from sftx_kernels import (
    Int8Weight,
    NF4Weight,
    QuantizedLinear,
    QuantizedWeight,
    dequantize,
    lora_linear,
    lora_linears,
    quantized_linear,
    seeded_dropout,
    squared_row_norms,
    updated_row_norms,
)
from sftx_plugins.adapters import shared_input
from sftx_plugins.adapters.shared_input import SharedInput

# The dropout seeds of consecutive layers are this far apart: 2^63 divided by the golden ratio, made odd.
_SEED_STEP = 5700357409661598953


@dataclass(frozen=True)
class LayerOptions:
    """The options of one LoRA layer, which may differ between the layers of an adapter."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def begins_in_the_weight(self) -> bool:
        """Return whether the update begins as a part of the weight, which is then taken off it (PiSSA, OLoRA)."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))


class LoraLayer(nn.Module):
    """A module that computes what another one did, plus a low-rank update. `LoraAdapter` knows no more of it.

    A subclass for another kind of module names it in `adapts`; importing the subclass makes it known to `make_layer`.
    """

    adapts: ClassVar[type[nn.Module]]
    """The class of modules that this class of layers can replace."""
    kinds: ClassVar[list[type[LoraLayer]]] = []
    """The classes of layers, most special kind of module first."""
    fan_in_fan_out: ClassVar[bool] = False
    """Whether the model's module has a weight [K, O], in PEFT's words."""
    enabled: bool
    """Whether the trained update is added; False inside `Adapter.disabled`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "adapts" in vars(cls):
            LoraLayer.kinds.insert(0, cls)

    def __init__(self, base: nn.Module, options: LayerOptions, *, run_seed: Tensor, number: int) -> None:
        """`run_seed`: `LanguageModel.seed`; `number`: of this layer among those of the adapter."""
        nn.Module.__init__(self)  # that of a subclass such as nn.Linear would allocate a weight
        for name, parameter in base._parameters.items():
            self.register_parameter(name, parameter)
            base._parameters[name] = None  # or the whole weight would stay in memory where fsdp2 shares it out
        for name, buffer in base._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in base._non_persistent_buffers_set)
        self.base = [base]  # in a list, so that it is no submodule, whose tensors would have two names
        self.base_names = frozenset(self._parameters)
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

    def add_below(self, tensors: Mapping[str, Tensor], options: LayerOptions | Mapping[str, LayerOptions]) -> None:
        """Add the update of another adapter, as it is saved, which stays as it is. `options`: those that it has there.

        Raises ValueError when it does not fit.
        """
        raise NotImplementedError

    def ranks(self) -> dict[str, tuple[int, float]]:
        """Return the rank and the scaling of what is saved, by the weight's name, which is empty in a linear layer."""
        return {"": (self.options.r, self.scaling)}

    def freeze_update(self) -> None:
        """Turn the parameters of the update into buffers, which do not train and are not shared out."""
        for name in [name for name in self._parameters if name not in self.base_names]:
            parameter = self._parameters.pop(name)
            if parameter is not None:
                self.register_buffer(name, parameter.data, persistent=False)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors with the names and shapes of `tensors()`."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])

    def install(self, model: nn.Module, path: str) -> None:
        """Put this layer into the model, at the path of the module that it adapts."""
        model.set_submodule(path, self)

    def merge(self, model: nn.Module, path: str) -> None:
        """Put a plain module that computes the same back at this layer's path."""
        model.set_submodule(path, self.merged())

    @abstractmethod
    def merged(self) -> nn.Module:
        """Return a plain module that computes the same, with the base's class and the names of its tensors."""


def check_unchanged(path: str, base: nn.Module) -> None:
    """Raise ConfigError for a module that another adapter has changed already."""
    added = {name for name, _ in base.named_parameters()} - {"weight", "bias", "codes"}
    if added or isinstance(base, LoraLayer):
        raise ConfigError(f"another adapter of this run has changed {path} already; leave one of the two out")


def make_layer(
    path: str, base: nn.Module, options: LayerOptions, *, run_seed: Tensor, number: int, is_head: bool = False
) -> LoraLayer:
    """Return the LoRA layer for a module. Raises ConfigError for one that is changed already."""
    check_unchanged(path, base)
    kind = LoraHead if is_head else next((kind for kind in LoraLayer.kinds if isinstance(base, kind.adapts)), None)
    assert kind is not None, f"{path} was chosen, and {type(base).__name__} has no kind of layer"
    return kind(base, options, run_seed=run_seed, number=number)


class LowRank(LoraLayer):
    """A layer with a frozen weight [O, K] and an update `scaling * B A` of it, in any of the variants of LoRA."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    initial_A: Tensor | None
    initial_B: Tensor | None
    """What A and B began as, where the update is the difference to that."""
    below_A: Tensor | None
    below_B: Tensor | None
    """The updates of adapters that stand below this one and do not train, as one update of this layer's scaling."""

    def base_weight(self) -> Tensor | QuantizedWeight:
        """Return the frozen weight, [O, K], as `lora_linear` takes it."""
        return cast(Tensor, self.weight)

    def add_parameters(self, weight: Tensor | QuantizedWeight, device: torch.device) -> None:
        """Make A, B and what else the options ask for, in fp32. `weight`: what `base_weight` returns."""
        A_RK, B_OR = initial_factors(self.options, weight, device)
        self.lora_A, self.lora_B = nn.Parameter(A_RK), nn.Parameter(B_OR)
        in_weight = self.options.begins_in_the_weight
        self.register_buffer("initial_A", A_RK.clone() if in_weight else None, persistent=False)
        self.register_buffer("initial_B", B_OR.clone() if in_weight else None, persistent=False)
        self.register_buffer("below_A", None, persistent=False)
        self.register_buffer("below_B", None, persistent=False)
        self.lora_bias = nn.Parameter(torch.zeros(B_OR.shape[0], device=device)) if self.options.lora_bias else None
        self.lora_magnitude_vector: nn.Parameter | None = None
        if self.options.use_dora:
            self.register_buffer("squared_norms", squared_row_norms(weight).to(device), persistent=False)
            self.lora_magnitude_vector = nn.Parameter(cast(Tensor, self.squared_norms).sqrt())

    def frozen_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return A [R, K] and B [O, R] of what is added to the weight and does not train, None if there is nothing."""
        parts = []
        if self.initial_A is not None and self.initial_B is not None and self.enabled:
            parts.append((self.initial_A, -self.initial_B))
        if self.below_A is not None and self.below_B is not None:
            parts.append((self.below_A, self.below_B))
        return _concatenated(parts) if parts else None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [R, K] and B [O, R] of all that is added to the weight, one below another: first what trains."""
        frozen = self.frozen_factors()
        trained = (self.lora_A, self.lora_B)
        return trained if frozen is None else _concatenated([trained, frozen])

    def dora_scale(self) -> Tensor:
        """Return magnitude / ||W + s B A|| of each row, [O]; the norm has no gradient."""
        assert self.lora_magnitude_vector is not None
        norms_O = updated_row_norms(
            self.base_weight(), cast(Tensor, self.squared_norms), *self.factors(), scaling=self.scaling
        )
        return self.lora_magnitude_vector / norms_O

    def tensors(self) -> dict[str, Tensor]:
        A_RK, B_OR = self.factors()
        tensors = {"lora_A.weight": A_RK, "lora_B.weight": B_OR}
        if self.lora_bias is not None:
            tensors["lora_B.bias"] = self.lora_bias
        if self.lora_magnitude_vector is not None:
            tensors["lora_magnitude_vector"] = self.lora_magnitude_vector
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        A_RK, B_OR = tensors["lora_A.weight"], tensors["lora_B.weight"]
        check_fits(A_RK, (None, self.lora_A.shape[1]))
        check_fits(B_OR, (self.lora_B.shape[0], A_RK.shape[0]))
        r = self.lora_A.shape[0]
        self.lora_A.copy_(A_RK[:r])
        self.lora_B.copy_(B_OR[:, :r])
        if self.initial_A is not None and self.initial_B is not None:
            self.initial_A.copy_(A_RK[r : 2 * r])
            self.initial_B.copy_(-B_OR[:, r : 2 * r])
            r *= 2
        below = A_RK[r:], B_OR[:, r:]
        self.below_A, self.below_B = (part.to(self.lora_A) for part in below) if len(A_RK) > r else (None, None)
        for name, own in self.tensors().items():
            if name not in ("lora_A.weight", "lora_B.weight"):
                own.copy_(tensors[name])

    @torch.no_grad()
    def add_below(self, tensors: Mapping[str, Tensor], options: LayerOptions | Mapping[str, LayerOptions]) -> None:
        assert isinstance(options, LayerOptions)
        added = tensors["lora_A.weight"].to(self.lora_A), tensors["lora_B.weight"].to(self.lora_B)
        check_fits(added[0], (None, self.lora_A.shape[1]))
        check_fits(added[1], (self.lora_B.shape[0], added[0].shape[0]))
        added = added[0], added[1] * (options.scaling / self.scaling)
        if self.below_A is not None and self.below_B is not None:
            added = _concatenated([(self.below_A, self.below_B), added])
        self.below_A, self.below_B = added

    def ranks(self) -> dict[str, tuple[int, float]]:
        return {"": (self.factors()[0].shape[0], self.scaling)}

    @torch.no_grad()
    def merged_weight(self, weight_OK: Tensor) -> Tensor:
        """Return the weight with the update, [O, K], computed in fp32 or the weight's own wider dtype."""
        A_RK, B_OR = self.factors()
        weight_OK = weight_OK + self.scaling * (B_OR @ A_RK)
        return weight_OK if self.lora_magnitude_vector is None else self.dora_scale()[:, None] * weight_OK


class LoraLinear(LowRank, nn.Linear):
    """A linear layer with a low-rank update. Subclasses hold their weight in another form (see `base_weight`)."""

    adapts: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(self, base: nn.Module, options: LayerOptions, *, run_seed: Tensor, number: int) -> None:
        super().__init__(base, options, run_seed=run_seed, number=number)
        self.shared_input: SharedInput | None = None
        """Computes this layer together with others of the same input."""
        self._is_dense = type(self).base_weight is LowRank.base_weight
        weight = self.base_weight()
        self.out_features, self.in_features = weight.shape
        if options.lora_bias and self.bias is None:
            raise ConfigError("lora_bias: a layer has no bias that could take it up when it is merged; leave it out")
        self.add_parameters(weight, self.weight_device())

    def weight_device(self) -> torch.device:
        return self.weight.device

    def base_forward(self, x: Tensor) -> Tensor:
        """Compute what the module did before it was adapted."""
        return nn.functional.linear(x, self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if self.shared_input is not None and self.enabled and not torch.compiler.is_compiling():
            shared = self.shared_input.output_of(self, input, LoraLinear._together)
            if shared is not None:
                return shared
        is_plain = self.initial_A is None and self.below_A is None
        frozen = None if is_plain else self.frozen_factors()
        if not self.enabled:
            return self._plus(self.base_forward(input), input, frozen)
        dropout_p = self.options.lora_dropout if self.training else 0.0
        if self.lora_magnitude_vector is not None:
            return self._dora_forward(input, dropout_p)
        # What is frozen belongs to the weight, which dropout leaves alone.
        is_split = dropout_p > 0 and frozen is not None
        A_RK, B_OR = (self.lora_A, self.lora_B) if is_plain or is_split else self.factors()
        bias_O = self._whole_bias()
        (output,) = lora_linears(
            input,
            (self.weight if self._is_dense else self.base_weight(),),
            (A_RK,),
            (B_OR,),
            scaling=self.scaling,
            dropout_p=dropout_p,
            seed=self.dropout_seed() if dropout_p else None,
            biases=None if bias_O is None else (bias_O,),
        )
        return self._plus(output, input, frozen) if is_split else output

    def _whole_bias(self) -> Tensor | None:
        """Return the bias with its update, [O], if there is one."""
        bias_O: Tensor | None = self.bias
        if bias_O is None or self.lora_bias is None:
            return bias_O
        return bias_O + (self.scaling * self.lora_bias).to(bias_O.dtype)

    @staticmethod
    def _together(layers: Sequence[LoraLinear], x: Tensor) -> Sequence[Tensor]:
        """Return the outputs of layers that share their input, in one operation."""
        factors = [layer.factors() for layer in layers]
        biases = [bias for bias in (layer._whole_bias() for layer in layers) if bias is not None]
        return lora_linears(
            x,
            [layer.base_weight() for layer in layers],
            [A_RK for A_RK, _ in factors],
            [B_OR for _, B_OR in factors],
            scaling=[layer.scaling for layer in layers],
            biases=biases or None,
        )

    def _plus(self, output: Tensor, x: Tensor, frozen: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the output with the update of these factors, if there are any, applied to x."""
        if frozen is None:
            return output
        A_RK, B_OR = (factor.to(output.dtype) for factor in frozen)
        return output + nn.functional.linear(nn.functional.linear(x.to(output.dtype), A_RK), self.scaling * B_OR)

    def _dora_forward(self, x: Tensor, dropout_p: float) -> Tensor:
        """Return x W^T + bias + (g - 1) drop(x) W^T + g s drop(x) A^T B^T, where g is magnitude / norm, as PEFT does.

        Without dropout this is g (x (W + s B A)^T) + bias.
        """
        dropped = seeded_dropout(x, dropout_p, self.dropout_seed()) if dropout_p else x
        changed = lora_linear(dropped, self.base_weight(), *self.factors(), scaling=self.scaling)
        rest: Tensor | None = self.bias
        if dropout_p:
            undropped = x - dropped
            rest = self._plus(self.base_forward(undropped), undropped, self.frozen_factors())
        # With g - 1, which is small, bf16 rounds the change of the magnitude and not the magnitude.
        output = torch.addcmul(changed, changed, (self.dora_scale() - 1).to(changed.dtype))
        return output if rest is None else output + rest.to(output.dtype)

    def merged_parameter(self) -> Tensor:
        """Return the merged weight as the module stores it."""
        return self.merged_weight(self.weight)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        base: Any = self.base[0]
        base.weight = nn.Parameter(self.merged_parameter().to(self.weight.dtype), requires_grad=False)
        if self.bias is not None:
            base.bias = self.bias
            if self.lora_bias is not None:
                base.bias.data = (self.bias + self.scaling * self.lora_bias).to(self.bias.dtype)
        return cast(nn.Module, base)


def share_inputs(layers: Mapping[str, LoraLayer]) -> None:
    """Let those of these layers that read one tensor be computed in one operation; they are given by their paths."""
    for group in shared_input.groups(layers):
        linear = [layer for layer in group if isinstance(layer, LoraLinear) and layer.lora_magnitude_vector is None]
        kinds = {(type(layer), layer.bias is None) for layer in linear}
        # With dropout, each layer has a mask of its own.
        if len(linear) == len(group) and len(kinds) == 1 and not any(one.options.lora_dropout for one in linear):
            shared = SharedInput(linear)
            for layer in linear:
                layer.shared_input = shared


class LoraConv1D(LoraLinear):
    """A low-rank update of transformers' Conv1D (GPT-2), which is a linear layer whose weight is [K, O]."""

    adapts = Conv1D
    fan_in_fan_out = True

    def base_weight(self) -> Tensor:
        return self.weight.T

    def base_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.T, self.bias)

    def merged_parameter(self) -> Tensor:
        return self.merged_weight(self.weight.T).T.contiguous()


class LoraQuantizedLinear(LoraLinear):
    """A quantised linear layer with a low-rank update. Merged, it is a plain one in the dtype that was quantised."""

    adapts = QuantizedLinear

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def base_weight(self) -> QuantizedWeight:
        if self.codes.dtype == torch.int8:
            return Int8Weight(self.codes, self.absmax)
        base = cast(QuantizedLinear, self.base[0])
        return NF4Weight(
            self.codes, self.absmax, (base.out_features, base.in_features), self.nested_absmax, self.offset
        )

    def weight_device(self) -> torch.device:
        return self.codes.device

    def base_forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.base_weight(), self.bias)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        base = cast(QuantizedLinear, self.base[0])
        base.register_parameter("bias", self.bias)
        plain: Any = base.dense(self.merged_weight(dequantize(self.base_weight(), torch.float32)).to(base.dtype))
        if self.lora_bias is not None:
            plain.bias.data = (self.bias + self.scaling * self.lora_bias).to(self.bias.dtype)
        return cast(nn.Module, plain)


class QuantizedConv1D(QuantizedLinear):
    """A quantised Conv1D of transformers, whose weight is quantised as [O, K], as bitsandbytes does."""

    def dense(self, weight_OK: Tensor) -> nn.Module:
        plain: Any = Conv1D(0, 0)
        plain.nf, plain.nx = weight_OK.shape
        plain.weight = nn.Parameter(weight_OK.T.contiguous(), requires_grad=False)
        plain.register_parameter("bias", self.bias)
        return cast(nn.Module, plain)


class LoraQuantizedConv1D(LoraQuantizedLinear):
    """A quantised Conv1D with a low-rank update."""

    adapts = QuantizedConv1D
    fan_in_fan_out = True


class LoraHead(LowRank):
    """A low-rank update of the output head, as a parametrisation of its weight, since the loss reads the weight itself.

    The updated weight [V, D] is made in each forward and kept for its backward.
    """

    def __init__(self, base: nn.Module, options: LayerOptions, *, run_seed: Tensor, number: int) -> None:
        nn.Module.__init__(self)
        self.enabled, self.options, self.scaling = True, options, options.scaling
        self.base, self.base_names = [base], frozenset()
        self.add_parameters(self.base_weight(), cast(Tensor, base.weight).device)

    def base_weight(self) -> Tensor:
        head = self.base[0]
        if parametrize.is_parametrized(head, "weight"):
            return cast(Tensor, cast(Any, head).parametrizations.weight.original)
        return cast(Tensor, head.weight)

    def forward(self, weight_VD: Tensor) -> Tensor:
        factors = self.factors() if self.enabled else self.frozen_factors()
        if factors is None:
            return weight_VD
        A_RD, B_VR = factors
        with torch.autocast(weight_VD.device.type, enabled=False):
            updated_VD = weight_VD + (self.scaling * (B_VR @ A_RD)).to(weight_VD.dtype)
            if self.lora_magnitude_vector is None or not self.enabled:
                return updated_VD
            return torch.addcmul(updated_VD, updated_VD, (self.dora_scale() - 1).to(updated_VD.dtype)[:, None])

    def install(self, model: nn.Module, path: str) -> None:
        parametrize.register_parametrization(model.get_submodule(path), "weight", self, unsafe=True)

    @torch.no_grad()
    def merge(self, model: nn.Module, path: str) -> None:
        head: Any = model.get_submodule(path)
        weight_VD = head.parametrizations.weight.original
        weight_VD.copy_(self.merged_weight(weight_VD))
        parametrize.remove_parametrizations(head, "weight", leave_parametrized=False)

    def merged(self) -> nn.Module:
        raise NotImplementedError


class LoraEmbedding(LoraLayer, nn.Embedding):
    """An embedding [V, D] with a low-rank update of its rows, under PEFT's names: A is [R, V] and B is [D, R]."""

    adapts = nn.Embedding

    def __init__(self, base: nn.Module, options: LayerOptions, *, run_seed: Tensor, number: int) -> None:
        super().__init__(base, options, run_seed=run_seed, number=number)
        if options.use_dora or options.lora_bias or isinstance(options.init_lora_weights, str):
            raise ConfigError(
                "use_dora, lora_bias and init_lora_weights are for linear layers; leave the embedding out of "
                "target_modules, or these options"
            )
        self.num_embeddings, self.embedding_dim = self.weight.shape
        device = self.weight.device
        # As in PEFT: A is zero and B is drawn, so the update is zero at first.
        self.lora_embedding_A = nn.Parameter(torch.zeros(options.r, self.num_embeddings, device=device))
        self.lora_embedding_B = nn.Parameter(torch.randn(self.embedding_dim, options.r, device=device))

    def forward(self, input: Tensor) -> Tensor:
        base = cast(nn.Embedding, self.base[0])
        base.weight = self.weight  # which a parallel strategy may have replaced
        rows: Tensor = base(input)
        if not self.enabled:
            return rows
        factor = self.scaling * getattr(self, "embed_scale", 1.0)  # by which Gemma's embedding multiplies its rows
        update = nn.functional.embedding(input, self.lora_embedding_A.T) @ self.lora_embedding_B.T
        return rows + (factor * update).to(rows.dtype)

    def base_weight(self) -> Tensor:
        return self.weight

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}

    @torch.no_grad()
    def merged(self) -> nn.Module:
        base = cast(nn.Embedding, self.base[0])
        weight_VD = self.weight + self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T
        base.weight = nn.Parameter(weight_VD.to(self.weight.dtype), requires_grad=False)
        return base


def _concatenated(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return A [R, K] and B [O, R] of the sum of several updates, of which each has its A and its B."""
    As, Bs = zip(*parts, strict=True)
    return torch.cat(As), torch.cat(Bs, 1)


def check_fits(tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Raise ValueError unless the tensor has this shape; None stands for any size."""
    if len(shape) != tensor.ndim or any(size not in (None, own) for size, own in zip(shape, tensor.shape, strict=True)):
        expected = ["any" if size is None else size for size in shape]
        raise ValueError(f"has the shape {list(tensor.shape)}, expected {expected}")


@torch.no_grad()
def initial_factors(
    options: LayerOptions, weight: Tensor | QuantizedWeight, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the initial A [R, K] and B [O, R] in fp32, as PEFT's `init_lora_weights` has them.

    True, "gaussian": A is drawn, B is zero. "orthogonal": both are drawn in orthogonal spaces, so that B A is zero.
    "pissa" (arXiv:2404.02948), "pissa_niter_N": from the R largest singular values. "olora" (arXiv:2406.01775): from
    the QR decomposition.
    """
    (O, K), r, init = weight.shape, options.r, options.init_lora_weights  # noqa: E741
    A_RK, B_OR = torch.empty(r, K, device=device), torch.zeros(O, r, device=device)
    if init is True:
        nn.init.kaiming_uniform_(A_RK, a=math.sqrt(5))  # like the weight of nn.Linear
        return A_RK, B_OR
    if init == "gaussian":
        return A_RK.normal_(std=1 / r), B_OR
    if init == "orthogonal":
        # B A = c B' E O^T A' = 0, since the rows E and O of an orthogonal matrix are orthogonal to one another.
        basis_RR, _ = torch.linalg.qr(torch.randn(r, r, device=device))
        A_RK = (torch.randn(K, r // 2, device=device) @ basis_RR[0::2]).T / 10
        return A_RK.contiguous(), (torch.randn(O, r // 2, device=device) @ basis_RR[1::2]) / 10
    dense_OK = weight.float() if isinstance(weight, Tensor) else dequantize(weight, torch.float32)
    if init == "olora":
        Q, R = torch.linalg.qr(dense_OK)
        return R[:r].contiguous(), Q[:, :r].contiguous()
    niter = str(init).removeprefix("pissa_niter_")
    if niter.isdigit():
        U_OR, S_R, V_KR = torch.svd_lowrank(dense_OK, r, niter=int(niter))
        Vh_RK = V_KR.T
    else:
        U, S, Vh = torch.linalg.svd(dense_OK, full_matrices=False)
        U_OR, S_R, Vh_RK = U[:, :r], S[:r], Vh[:r]
    root_R = (S_R / options.scaling).sqrt()
    return (root_R[:, None] * Vh_RK).contiguous(), (U_OR * root_R).contiguous()
