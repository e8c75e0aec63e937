"""`quantized_linear` is a linear layer on a quantised weight, `QuantizedLinear` the module that holds one.

The dense weight is made for each product and let go of: forward keeps the codes, and backward dequantises again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sftx_kernels.checks import differentiable_once, error, gemm_dtype
from sftx_kernels.gemm import project, project_back
from sftx_kernels.int8 import Int8Weight, check_int8, dequantize_int8_
from sftx_kernels.nf4 import NF4Weight, check_nf4, dequantize_nf4, dequantize_nf4_

QuantizedWeight = NF4Weight | Int8Weight


class QuantizedStack(NamedTuple):
    """A QuantizedStack holds quantised matrices of one shape, such as those of a layer's experts, each by itself."""

    codes: Tensor  # [E, ...], those of each matrix
    scales: tuple[Tensor, ...]  # [E, ...] each
    shape: tuple[int, int, int]

    def matrix(self, index: int) -> QuantizedWeight:
        return _weight(self.shape[1:], self.codes[index], [scale[index] for scale in self.scales])


def quantize_stack(weight_EOK: Tensor, quantize: Callable[[Tensor], QuantizedWeight]) -> QuantizedStack:
    """Return the matrices of a weight, quantised by this function one after the other. Raises what it raises."""
    matrices = [quantize(weight_OK) for weight_OK in weight_EOK]
    scales = zip(*(matrix.scales for matrix in matrices), strict=True)
    codes = torch.stack([matrix.codes for matrix in matrices])
    num_matrices, num_rows, num_columns = weight_EOK.shape
    return QuantizedStack(codes, tuple(map(torch.stack, scales)), (num_matrices, num_rows, num_columns))


def check_quantized(name: str, weight: QuantizedWeight) -> None:
    """Raise ValueError unless the parts of the weight fit together."""
    if isinstance(weight, NF4Weight):
        check_nf4(name, weight)
    else:
        check_int8(name, weight)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype, *, backend: str | None = None) -> Tensor:
    """Return the dense weight [O, K] in `dtype`, each value rounded once. `backend` is for `dispatch.decide`.

    Raises:
        ValueError: the parts of the weight do not fit together, or the dtype is not floating.
    """
    if isinstance(weight, NF4Weight):
        return dequantize_nf4(weight, dtype, backend=backend)
    check_int8("weight", weight)
    if not dtype.is_floating_point:
        raise error("dtype", "a floating dtype", dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    dequantize_int8_(out, weight.codes, weight.scales)
    return out


def dequantize_into_(out: Tensor, codes: Tensor, scales: Sequence[Tensor], backend: str) -> None:
    """Write the dense weight of these codes (int8, or uint8 for NF4) to `out`. Nothing is checked."""
    if codes.dtype == torch.int8:
        dequantize_int8_(out, codes, scales)
    else:
        dequantize_nf4_(out, codes, scales, backend)


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, [..., O], in x's dtype or autocast's. The weight gets no gradient; differentiable once.

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    check_quantized("weight", weight)
    if x.shape[-1] != weight.shape[1]:
        raise error("x", f"shape [..., {weight.shape[1]}]", f"shape {list(x.shape)}")
    dtype = gemm_dtype(x)
    y: Tensor = _linear_op(
        x.to(dtype), None if bias is None else bias.to(dtype), list(weight.shape), weight.codes, list(weight.scales)
    )
    return y


def _weight(shape: Sequence[int], codes: Tensor, scales: Sequence[Tensor]) -> QuantizedWeight:
    if codes.dtype == torch.int8:
        return Int8Weight(codes, *scales)
    return NF4Weight(codes, scales[0], (shape[0], shape[1]), *scales[1:])


# An operation, for the compiler would keep the dense weight between forward and backward.
@torch.library.custom_op("sftx::quantized_linear", mutates_args=())
def _linear_op(x: Tensor, bias: Tensor | None, shape: list[int], codes: Tensor, scales: list[Tensor]) -> Tensor:
    weight_OK = dequantize(_weight(shape, codes, scales), x.dtype)
    return project(x.reshape(-1, shape[1]), weight_OK, bias).view(*x.shape[:-1], shape[0])


@_linear_op.register_fake
def _(x, bias, shape, codes, scales):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op("sftx::quantized_linear_backward", mutates_args=())
def _backward_op(dy: Tensor, shape: list[int], codes: Tensor, scales: list[Tensor]) -> Tensor:
    weight_OK = dequantize(_weight(shape, codes, scales), dy.dtype)
    return project_back(dy.reshape(-1, shape[0]), weight_OK).view(*dy.shape[:-1], shape[1])


@_backward_op.register_fake
def _(dy, shape, codes, scales):  # type: ignore[no-untyped-def]
    return dy.new_empty(*dy.shape[:-1], shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ctx.shape, codes, scales = inputs
    ctx.save_for_backward(codes, *scales)


@differentiable_once
def _differentiate(ctx: Any, dy: Tensor) -> Any:
    codes, *scales = ctx.saved_tensors
    dx = _backward_op(dy, ctx.shape, codes, scales) if ctx.needs_input_grad[0] else None
    db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
    return dx, db, None, None, [None] * len(scales)


_linear_op.register_autograd(_differentiate, setup_context=_setup_context)


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is quantised.

    `codes` is a `Parameter(requires_grad=False)`, the scales are fp32 buffers and a uint8 one: a mixed-precision
    policy, which casts floating parameters, leaves all of them alone.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        """`dtype`: that of the weight before it was quantised, for `dequantized`; by default the bias's, or fp32."""
        super().__init__()
        self.dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        check_quantized("weight", weight)
        self.out_features, self.in_features = weight.shape
        self.codes = nn.Parameter(weight.codes, requires_grad=False)
        names = ("absmax", "nested_absmax", "offset")
        for name, scale in itertools.zip_longest(names, weight.scales):
            self.register_buffer(name, scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight, as `lora_linear` takes it."""
        if self.codes.dtype == torch.int8:
            return Int8Weight(self.codes, self.absmax)
        shape = self.out_features, self.in_features
        return NF4Weight(self.codes, self.absmax, shape, self.nested_absmax, self.offset)

    def forward(self, input: Tensor) -> Tensor:
        return quantized_linear(input, self.quantized, self.bias)

    @torch.no_grad()
    def dequantized(self) -> nn.Module:
        """Return a plain, frozen layer of the same values, in `dtype`."""
        return self.dense(dequantize(self.quantized, self.dtype))

    def dense(self, weight_OK: Tensor) -> nn.Module:
        """Return the plain module that this one took the place of, with the weight [O, K]. Subclasses return others."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight_OK, requires_grad=False)
        linear.register_parameter("bias", cast("nn.Parameter | None", self.bias))
        return linear

    def extra_repr(self) -> str:
        kind = "int8" if self.codes.dtype == torch.int8 else "nf4" + ", double" * (self.nested_absmax is not None)
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"
