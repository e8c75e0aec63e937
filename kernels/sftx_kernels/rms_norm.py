"""`rms_norm` is the norm of Llama and Gemma (Zhang and Sennrich, arXiv:1910.07467), with the addition before it.

For a row h = x + residual of D elements, its weight w and the weight's offset o:

    rstd = 1 / sqrt(mean(h^2) + eps)        h^ = h rstd        y = (w + o) h^
    g = (w + o) dy        dh = rstd (g - h^ mean(g h^)) + d(x + residual)        dw = sum over rows of dy h^

Models round h^ to the dtype of h before it meets the weight (`LlamaRMSNorm` of transformers, and those of Mistral, Qwen
and most others), or after (`GemmaRMSNorm`). All else runs in fp32 (fp64 for fp64). Backward keeps h, w and rstd.

In eager mode the operation is a torch.autograd.Function; under torch.compile it is the custom op `sftx::rms_norm`, as
`lora` explains.

Shape suffixes: N rows, C rows of a chunk, D columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sftx_kernels.checks import check_tensor, differentiable_once, error, is_number
from sftx_kernels.chunks import chunk_rows, row_chunks
from sftx_kernels.dispatch import decide
from sftx_kernels.gemm import accumulator


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Any:
    """Return y = rms_norm(x), or (y, x + residual) where a residual is given; the formula is at the top of this module.

    Without further options y is `LlamaRMSNorm` of transformers, whose numbers Mistral's, Qwen2's and Qwen3's norms give
    too. With `weight_offset=1.0, cast_before_weight=False` it is Gemma's. Differentiable once; nothing is overwritten.

    Args:
        x: [..., D], floating.
        weight: [D], floating. A frozen one costs backward nothing.
        eps: added to the mean of the squares, > 0.
        residual: of x's shape; what is normalised is then x + residual, which is returned too, in the dtype that torch
            promotes the two to.
        weight_offset: added to the weight: 1.0 for Gemma.
        cast_before_weight: round the normalised rows to the dtype of x + residual before the product with the weight,
            which then has the dtype that torch promotes the two to. Otherwise the product is made in fp32 and rounded
            to the dtype of x + residual.
        dtype: y's dtype in place of the above. With fp32 rows under autocast, its dtype saves the layers that read y a
            cast each; the values are those of the cast.
        backend: for `dispatch.decide`: "torch" or "triton".

    Returns:
        y [..., D], or (y, x + residual).

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    _check(x, weight, eps, residual, weight_offset, dtype)
    if dtype is None:
        total_dtype = _total_dtype(x, residual)
        dtype = torch.promote_types(total_dtype, weight.dtype) if cast_before_weight else total_dtype
    spec = _Spec(float(eps), float(weight_offset), bool(cast_before_weight), dtype, backend)
    inputs = (x, residual, weight)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():  # see lora_linears
        y, *totals = _op(*inputs, *spec)[:-1]
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y, *totals = _RmsNorm.apply(spec, *inputs)  # type: ignore[no-untyped-call]
    else:
        y, *totals = _forward(*inputs, spec)[:-1]
    return y if residual is None else (y, totals[0])


def _total_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _check(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, weight_offset: float, dtype: torch.dtype | None
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise error("x", "shape [..., D] with D >= 1", f"shape {list(x.shape)}")
    check_tensor("x", x, tuple(x.shape), x, None)
    check_tensor("weight", weight, (x.shape[-1],), x, None)
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), x, None)
    if not (is_number(eps) and eps > 0):
        raise error("eps", "a number > 0", eps)
    if not is_number(weight_offset):
        raise error("weight_offset", "a finite number", weight_offset)
    if dtype is not None and not dtype.is_floating_point:
        raise error("dtype", "None or a floating dtype", dtype)


class _Spec(NamedTuple):
    eps: float
    weight_offset: float
    cast_before_weight: bool
    dtype: torch.dtype  # of y
    backend: str | None


# ---- forward and backward, with the backend that `decide` chooses


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, spec: _Spec) -> list[Tensor]:
    """Return [y, rstd_N], with x + residual between them where there is a residual."""
    D = x.shape[-1]
    x_ND = x.reshape(-1, D)
    residual_ND = None if residual is None else residual.reshape(-1, D)
    y, *totals, rstd_N = outputs = _empty(x, residual, spec)
    total_ND = totals[0].view(-1, D) if totals else None
    if decide("rms_norm", x.device, _total_dtype(x, residual), requested=spec.backend).backend == "torch":
        _forward_with_torch(x_ND, residual_ND, weight, y.view(-1, D), total_ND, rstd_N, spec)
    else:
        from sftx_kernels.triton.rms_norm import forward_launch

        contiguous_ND = None if residual_ND is None else residual_ND.contiguous()
        forward_launch(
            x_ND.contiguous(), contiguous_ND, weight.contiguous(), y.view(-1, D), total_ND, rstd_N,
            eps=spec.eps, weight_offset=spec.weight_offset, cast_before_weight=spec.cast_before_weight,
        ).run()  # fmt: skip
    return outputs


def _empty(x: Tensor, residual: Tensor | None, spec: _Spec) -> list[Tensor]:
    """Return the outputs of `_forward`, not yet filled."""
    total_dtype = _total_dtype(x, residual)
    y = x.new_empty(x.shape, dtype=spec.dtype)
    rstd_N = x.new_empty(x.numel() // x.shape[-1], dtype=accumulator(total_dtype))
    return [y, rstd_N] if residual is None else [y, x.new_empty(x.shape, dtype=total_dtype), rstd_N]


def _backward(
    dy: Tensor | None, d_total: Tensor | None, total: Tensor, rstd_N: Tensor, weight: Tensor, spec: _Spec,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of x + residual, in its dtype, and of the weight."""
    if dy is None:
        assert d_total is not None
        return d_total, torch.zeros_like(weight) if wants_weight else None
    D = total.shape[-1]
    dx = total.new_empty(total.shape)
    dy_ND, total_ND, dx_ND = dy.reshape(-1, D), total.reshape(-1, D), dx.view(-1, D)
    d_total_ND = None if d_total is None else d_total.reshape(-1, D)
    if decide("rms_norm", dx.device, dx.dtype, requested=spec.backend).backend == "torch":
        dw_D = weight.new_zeros(D, dtype=rstd_N.dtype) if wants_weight else None
        _backward_with_torch(dy_ND, d_total_ND, total_ND, rstd_N, weight, dx_ND, dw_D, spec)
    else:
        from sftx_kernels.triton.launch import chip_of
        from sftx_kernels.triton.rms_norm import backward_launch

        launch, dw_PD = backward_launch(
            dy_ND.contiguous(), None if d_total_ND is None else d_total_ND.contiguous(), total_ND.contiguous(), rstd_N,
            weight.contiguous(), dx_ND, chip_of(dx.device), weight_offset=spec.weight_offset, wants_weight=wants_weight,
        )  # fmt: skip
        launch.run()
        dw_D = None if dw_PD is None else dw_PD.sum(0)
    return dx, None if dw_D is None else dw_D.to(weight.dtype)


# ---- plain torch


def _forward_with_torch(
    x_ND: Tensor, residual_ND: Tensor | None, weight: Tensor, y_ND: Tensor, total_ND: Tensor | None, rstd_N: Tensor,
    spec: _Spec,
) -> None:  # fmt: skip
    num_rows, D = x_ND.shape
    weight_D = _weight(weight, spec, weight.dtype if spec.cast_before_weight else rstd_N.dtype)
    wide_CD = x_ND.new_empty(chunk_rows(num_rows, D, x_ND.device), D, dtype=rstd_N.dtype)
    for chunk in row_chunks(num_rows, D, x_ND.device):
        h_CD, y_CD, rstd_C = x_ND[chunk], y_ND[chunk], rstd_N[chunk]
        if residual_ND is not None and total_ND is not None:
            h_CD = torch.add(h_CD, residual_ND[chunk], out=total_ND[chunk])
        hat_CD = wide_CD[: len(h_CD)]
        source_CD = h_CD if h_CD.dtype == hat_CD.dtype else hat_CD.copy_(h_CD)
        torch.linalg.vector_norm(source_CD, dim=1, out=rstd_C)
        rstd_C.square_().div_(D).add_(spec.eps).rsqrt_()
        if spec.cast_before_weight and y_CD.dtype == h_CD.dtype == weight_D.dtype:
            if y_CD.dtype == hat_CD.dtype:
                torch.mul(source_CD, rstd_C[:, None], out=y_CD)
            else:
                y_CD.copy_(torch.mul(source_CD, rstd_C[:, None], out=hat_CD))
            y_CD.mul_(weight_D)
        else:
            torch.mul(source_CD, rstd_C[:, None], out=hat_CD)
            rounded_CD = hat_CD.to(h_CD.dtype) if spec.cast_before_weight else hat_CD
            y_CD.copy_(rounded_CD * weight_D if rounded_CD.dtype != weight_D.dtype else rounded_CD.mul_(weight_D))


def _backward_with_torch(
    dy_ND: Tensor, d_total_ND: Tensor | None, total_ND: Tensor, rstd_N: Tensor, weight: Tensor, dx_ND: Tensor,
    dw_D: Tensor | None, spec: _Spec,
) -> None:  # fmt: skip
    num_rows, D = dx_ND.shape
    weight_D = _weight(weight, spec, rstd_N.dtype)
    step = chunk_rows(num_rows, D, dx_ND.device)
    wide_SCD = dx_ND.new_empty(3, step, D, dtype=rstd_N.dtype)
    for chunk in row_chunks(num_rows, D, dx_ND.device):
        dy_CD, h_CD, dx_CD, rstd_C = dy_ND[chunk], total_ND[chunk], dx_ND[chunk], rstd_N[chunk]
        dy_wide_CD, h_wide_CD, product_CD = wide_SCD[:, : len(dx_CD)]
        h_wide_CD = h_CD if h_CD.dtype == rstd_N.dtype else h_wide_CD.copy_(h_CD)
        g_CD = dy_CD if dy_CD.dtype == rstd_N.dtype else dy_wide_CD.copy_(dy_CD)
        if dw_D is not None:
            dw_D += torch.mul(g_CD, h_wide_CD, out=product_CD).mul_(rstd_C[:, None]).sum(0)
        g_CD = torch.mul(g_CD, weight_D, out=dy_wide_CD)
        # rstd (g - h^ mean(g h^)) = rstd g - h (rstd^3 / D) sum(g h)
        slope_C = torch.mul(g_CD, h_wide_CD, out=product_CD).sum(1).mul_(rstd_C.pow(3)).div_(-D)
        g_CD.mul_(rstd_C[:, None])
        if d_total_ND is not None:
            g_CD.add_(d_total_ND[chunk])
        if dx_CD.dtype == g_CD.dtype:
            torch.addcmul(g_CD, h_wide_CD, slope_C[:, None], out=dx_CD)
        else:
            dx_CD.copy_(g_CD.addcmul_(h_wide_CD, slope_C[:, None]))


def _weight(weight: Tensor, spec: _Spec, dtype: torch.dtype) -> Tensor:
    """Return the weight with its offset in `dtype`."""
    return weight.to(dtype) + spec.weight_offset if spec.weight_offset else weight.to(dtype)


# ---- autograd


class _RmsNorm(torch.autograd.Function):
    """_RmsNorm is the operation in eager mode."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, x: Tensor, residual: Tensor | None, weight: Tensor) -> Any:
        y, *totals, rstd_N = _forward(x, residual, weight, spec)
        ctx.spec, ctx.dtypes = spec, (x.dtype, None if residual is None else residual.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(totals[0] if totals else x, rstd_N, weight)
        return (y, *totals)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor | None, d_total: Tensor | None = None) -> Any:
        total, rstd_N, weight = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[3]
        if dy is None and d_total is None:
            return None, None, None, None
        dx, dw = _backward(dy, d_total, total, rstd_N, weight, ctx.spec, wants_weight)
        return None, *_cast(dx, ctx.dtypes), dw


def _cast(dx: Tensor, dtypes: tuple[torch.dtype, torch.dtype | None]) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and of the residual, from that of their sum."""
    return tuple(None if dtype is None else dx.to(dtype) for dtype in dtypes)


@torch.library.custom_op("sftx::rms_norm", mutates_args=())
def _op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    dtype: torch.dtype,
    backend: str | None,
) -> list[Tensor]:
    return _forward(x, residual, weight, _Spec(eps, weight_offset, cast_before_weight, dtype, backend))


@_op.register_fake
def _(x, residual, weight, *spec):  # type: ignore[no-untyped-def]
    return _empty(x, residual, _Spec(*spec))


@torch.library.custom_op("sftx::rms_norm_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    rstd_N: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    dtype: torch.dtype,
    backend: str | None,
    wants_weight: bool,
) -> list[Tensor]:
    """Return the gradient of x + residual and, if wanted, that of the weight."""
    spec = _Spec(eps, weight_offset, cast_before_weight, dtype, backend)
    dx, dw = _backward(dy, d_total, total, rstd_N, weight, spec, wants_weight)
    return [dx] if dw is None else [dx, dw]


@_backward_op.register_fake
def _(dy, d_total, total, rstd_N, weight, *rest):  # type: ignore[no-untyped-def]
    dx = total.new_empty(total.shape)
    return [dx, torch.empty_like(weight)] if rest[-1] else [dx]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, residual, weight, *spec = inputs
    ctx.spec, ctx.dtypes = spec, (x.dtype, None if residual is None else residual.dtype)
    ctx.save_for_backward(x if residual is None else output[1], output[-1], weight)


@differentiable_once
def _differentiate(ctx: Any, gradients: list[Tensor]) -> Any:
    total, rstd_N, weight = ctx.saved_tensors
    dy, *d_totals = gradients[:-1]
    wants_weight = ctx.needs_input_grad[2]
    d_total = d_totals[0] if d_totals else None
    dx, *dws = _backward_op(dy, d_total, total, rstd_N, weight, *ctx.spec, wants_weight)
    return *_cast(dx, ctx.dtypes), dws[0] if dws else None, None, None, None, None, None


_op.register_autograd(_differentiate, setup_context=_setup_context)
