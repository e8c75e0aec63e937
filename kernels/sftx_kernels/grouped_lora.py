"""`grouped_lora_linear` is `lora_linear` for rows that are sorted by group, each group with its own weights.

The groups are the experts of a mixture. With x [M, K] of which the rows x_e belong to group e, W [E, O, K],
A [E, R, K], B [E, O, R], alpha the scaling times dropout's 1 / (1 - p), keep dropout's mask, for each group e:

    S_e = drop(x_e) A_e^T        y_e = x_e W_e^T + b_e + alpha S_e B_e^T
    dS_e = alpha dY_e B_e        dB_e = alpha dY_e^T S_e
    dA_e = dS_e^T drop(x_e)      dX_e = dY_e W_e + keep * (dS_e A_e)

As in `lora.py`, backward keeps x, the inputs and S, and the operation is a torch.autograd.Function, or the custom op
`sftx::grouped_lora_linear` where a dispatch mode or the compiler looks on. On GPUs of compute capability 9 and above,
products in bf16 are torch's grouped matrix products, which wait for nothing; everywhere else a loop over the groups
reads their sizes on the host.

Shape suffixes: M rows, E groups, K in, O out, R rank; I and J are the inner and the outer size of any product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sftx_kernels.checks import (
    check_dropout,
    check_tensor,
    differentiable_once,
    error,
    gemm_dtype,
    is_number,
    without_autocast,
)
from sftx_kernels.dropout import dropped_mask, keep_scale, threshold_of
from sftx_kernels.gemm import accumulator, add_product_, add_weight_gradient_, project_back
from sftx_kernels.quantized import QuantizedStack, check_quantized, dequantize


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedStack,
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    *,
    scaling: float,
    transposed: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return, for the rows of each group e, `x_e W_e^T + bias_e + scaling * (drop(x_e) A_e^T) B_e^T`.

    Nothing is overwritten; differentiable once. The gradients of a group without rows are zero.

    Args:
        x, weight, bias: [M, K], [E, O, K] (if `transposed`, [E, K, O]), [E, O]; of one floating dtype, unless autocast
            casts them. M may be 0. A quantised weight is dequantised matrix by matrix, in forward and again in
            backward, and gets no gradient.
        lora_A, lora_B: [E, R, K], [E, O, R]; of one floating dtype, which may be another than x's, as in `lora_linear`.
            Their gradients are summed in fp32, and come back unrounded but from torch's grouped products, which
            round them to bf16 as autocast would. R may be 0: there is no update then.
        offsets: [E] int32 or int64, on x's device: the end of each group's rows, ascending, the last one M. On a GPU
            this is not checked, since that would wait for the device.
        dropout_p, seed: as in `lora_linear`. The mask is a function of `seed`, x's shape and the kind of device.

    Returns:
        [M, O] in the dtype of `x W^T`: x's own, or autocast's.

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    _check(x, weight, lora_A, lora_B, offsets, scaling, transposed, dropout_p, seed, bias)
    spec = _Spec(float(scaling), transposed, dropout_p, gemm_dtype(x))
    if isinstance(weight, Tensor):
        tensors = _Tensors(x, weight, lora_A, lora_B, offsets, bias)
    else:
        tensors = _Tensors(x, weight.codes, lora_A, lora_B, offsets, bias, list(weight.scales))
        spec = spec._replace(shape=list(weight.shape))
    seed = seed if dropout_p else None
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return cast(Tensor, _op(*tensors, seed, *spec)[0])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:6]):
        return cast(Tensor, _GroupedLoraLinear.apply(spec, seed, *tensors[:6], *tensors.scales))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return _forward(tensors, seed, spec)[0]


def _check(
    x: Tensor,
    weight: Tensor | QuantizedStack,
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    scaling: float,
    transposed: bool,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
) -> None:
    check_tensor("x", x, ("M", "K"), x, None)
    num_rows, K = x.shape
    if K == 0:
        raise error("x", "at least one column", f"shape {list(x.shape)}")
    if not isinstance(weight, Tensor):
        if weight.codes.device != x.device:
            raise error("weight", f"device {x.device}", f"device {weight.codes.device}")
        check_quantized("weight", weight.matrix(0))
        weight = x.new_empty(()).expand(weight.shape)  # carries only the shape into the checks below
    check_tensor("weight", weight, ("E", K, "O") if transposed else ("E", "O", K), x, x.dtype)
    E, O = weight.shape[0], weight.shape[2 if transposed else 1]  # noqa: E741
    if E == 0:
        raise error("weight", "at least one group", f"shape {list(weight.shape)}")
    check_tensor("lora_A", lora_A, (E, "R", K), x, None)
    check_tensor("lora_B", lora_B, (E, O, lora_A.shape[1]), x, lora_A.dtype)
    if bias is not None:
        check_tensor("bias", bias, (E, O), x, x.dtype)
    if not is_number(scaling):
        raise error("scaling", "a finite number", repr(scaling))
    check_dropout(dropout_p, seed)
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.shape != (E,) or offsets.device != x.device:
        actual = f"{offsets.dtype} of shape {list(offsets.shape)} on {offsets.device}"
        raise error("offsets", f"int32 or int64 of shape [{E}] on {x.device}", actual)
    if offsets.is_cpu and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode():
        ends = offsets.tolist()
        if [0, *ends, num_rows] != sorted([0, *ends, num_rows]) or ends[-1] != num_rows:
            raise error("offsets", f"ascending ends of groups, the last one {num_rows}", ends)


# ---- a call as data


class _Spec(NamedTuple):
    """A _Spec holds the arguments of a call that are not tensors."""

    scaling: float
    transposed: bool
    dropout_p: float
    dtype: torch.dtype  # of the products
    shape: list[int] = []  # noqa: RUF012  # of a quantised weight


class _Tensors(NamedTuple):
    """A _Tensors holds the tensors of a call but the seed; of a quantised weight the codes, and its scales."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    offsets: Tensor
    bias: Tensor | None
    scales: list[Tensor] = []  # noqa: RUF012

    def weight_EOK(self, spec: _Spec) -> _Stack:
        weight: _Stack
        if self.scales:
            E, O, K = spec.shape  # noqa: E741
            weight = _DequantizedStack(QuantizedStack(self.weight, tuple(self.scales), (E, O, K)), spec.dtype)
        else:
            weight = self.weight.to(spec.dtype)
        return weight.transpose(1, 2) if spec.transposed else weight


class _DequantizedStack:
    """A _DequantizedStack is a quantised stack of matrices of which each is dequantised when it is asked for."""

    def __init__(self, stack: QuantizedStack, dtype: torch.dtype, *, is_transposed: bool = False) -> None:
        E, O, K = stack.shape  # noqa: E741
        self.shape = (E, K, O) if is_transposed else (E, O, K)
        self._arguments = stack, dtype
        self._is_transposed = is_transposed

    def transpose(self, _one: int, _two: int) -> _DequantizedStack:
        return _DequantizedStack(*self._arguments, is_transposed=not self._is_transposed)

    def __getitem__(self, index: int) -> Tensor:
        stack, dtype = self._arguments
        dense = dequantize(stack.matrix(index), dtype)
        return dense.T if self._is_transposed else dense


_Stack = Tensor | _DequantizedStack


# ---- forward and backward, without autograd


def _forward(tensors: _Tensors, seed: Tensor | None, spec: _Spec) -> tuple[Tensor, Tensor]:
    """Return y [M, O], and S [M, R], which backward needs."""
    x, _, lora_A, lora_B, offsets, bias, _ = tensors
    threshold = threshold_of(spec.dropout_p)
    with without_autocast(x.device.type):
        x_MK, weight_EOK = x.to(spec.dtype), tensors.weight_EOK(spec)
        products = _products(x_MK, weight_EOK, offsets)
        s_MR = products.times(_drop(x_MK, threshold, seed), lora_A.to(spec.dtype).transpose(1, 2))
        y_MO = products.times(x_MK, weight_EOK.transpose(1, 2))
        if bias is not None:
            rows_M = torch.arange(x_MK.shape[0], device=x.device, dtype=offsets.dtype)
            y_MO.add_(bias.to(spec.dtype)[torch.searchsorted(offsets, rows_M, right=True)])
        alpha = spec.scaling * keep_scale(threshold)
        products.add_times_(y_MO, s_MR, lora_B.to(spec.dtype).transpose(1, 2), alpha)
    return y_MO, s_MR


def _backward(
    dy: Tensor, s_MR: Tensor, tensors: _Tensors, seed: Tensor | None, spec: _Spec, wants_grad: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradient of each of `tensors` that `wants_grad` asks for, None for the others."""
    x, weight, lora_A, lora_B, offsets, bias, _ = tensors
    x_wanted, weight_wanted, A_wanted, B_wanted, _, bias_wanted = wants_grad
    threshold = threshold_of(spec.dropout_p)
    alpha = spec.scaling * keep_scale(threshold)
    dX = dW = dA = dB = db = None
    with without_autocast(x.device.type):
        x_MK, dy_MO, weight_EOK = x.to(spec.dtype), dy.to(spec.dtype).contiguous(), tensors.weight_EOK(spec)
        products = _products(x_MK, weight_EOK, offsets)
        if weight_wanted:
            dW_EOK = products.gradient(dy_MO, x_MK)
            dW = (dW_EOK.transpose(1, 2) if spec.transposed else dW_EOK).to(weight.dtype).contiguous()
        if bias is not None and bias_wanted:
            db = products.gradient(dy_MO.new_ones(dy_MO.shape[0], 1), dy_MO)[:, 0].to(bias.dtype, copy=True)
        if B_wanted:
            dB = products.gradient(dy_MO, s_MR).mul_(alpha).to(lora_B.dtype)
        if x_wanted or A_wanted:
            # alpha goes into B, which is smaller than dS where an expert has many rows.
            dS_MR = products.times(dy_MO, lora_B.to(spec.dtype) * alpha)
            if A_wanted:
                dA = products.gradient(dS_MR, _drop(x_MK, threshold, seed)).to(lora_A.dtype)
            if x_wanted:
                dX_MK, A_ERK = products.times(dy_MO, weight_EOK), lora_A.to(spec.dtype)
                if threshold:
                    dX_MK.add_(_drop(products.times(dS_MR, A_ERK), threshold, seed))
                else:
                    products.add_times_(dX_MK, dS_MR, A_ERK, 1.0)
                dX = dX_MK.to(x.dtype)
    return [dX, dW, dA, dB, None, db]


def _drop(x_MK: Tensor, threshold: int, seed: Tensor | None) -> Tensor:
    """Return keep * x; the scale of what is kept is in alpha."""
    if not threshold:
        return x_MK
    assert seed is not None
    return x_MK.masked_fill(dropped_mask(x_MK.shape, threshold, int(seed), x_MK.device), 0)


# ---- products by group


class _Products(Protocol):
    """A _Products multiplies each group's rows with the group's matrix. All operands have one dtype."""

    def times(self, a_MI: Tensor, matrix_EIJ: _Stack) -> Tensor:
        """Return a_e matrix_e of each group, [M, J]."""
        ...

    def add_times_(self, sum_MJ: Tensor, a_MI: Tensor, matrix_EIJ: Tensor, alpha: float) -> None:
        """Compute sum_e += alpha a_e matrix_e, whose inner dimension is small."""
        ...

    def gradient(self, a_MI: Tensor, b_MJ: Tensor) -> Tensor:
        """Return a_e^T b_e of each group, [E, I, J]."""
        ...


class _LoopedProducts:
    """_LoopedProducts are products in a loop over the groups; `gradient` is summed and returned in fp32 at least."""

    def __init__(self, offsets_E: Tensor) -> None:
        ends = offsets_E.tolist()
        self._num_groups = len(ends)
        self._groups = [(e, slice(a, b)) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if a < b]

    def times(self, a_MI: Tensor, matrix_EIJ: _Stack) -> Tensor:
        out_MJ = a_MI.new_empty(a_MI.shape[0], matrix_EIJ.shape[2])
        for e, rows in self._groups:
            project_back(a_MI[rows], matrix_EIJ[e], out=out_MJ[rows])
        return out_MJ

    def add_times_(self, sum_MJ: Tensor, a_MI: Tensor, matrix_EIJ: Tensor, alpha: float) -> None:
        for e, rows in self._groups:
            add_product_(sum_MJ[rows], a_MI[rows], matrix_EIJ[e], alpha)

    def gradient(self, a_MI: Tensor, b_MJ: Tensor) -> Tensor:
        sum_EIJ = a_MI.new_zeros(self._num_groups, a_MI.shape[1], b_MJ.shape[1], dtype=accumulator(a_MI.dtype))
        for e, rows in self._groups:
            add_weight_gradient_(sum_EIJ[e], a_MI[rows], b_MJ[rows])
        return sum_EIJ


_ALIGNMENT: Final = 16
"""The bytes of which torch's grouped product needs a row's size to be a multiple."""


class _GroupedProducts:
    """_GroupedProducts are torch's grouped products, which know the groups on the device; ranks are padded with zeros.

    `gradient` is summed in fp32 and rounded to the operands' dtype.
    """

    def __init__(self, offsets_E: Tensor) -> None:
        self._ends_E = offsets_E.to(torch.int32)

    def times(self, a_MI: Tensor, matrix_EIJ: _Stack) -> Tensor:
        assert isinstance(matrix_EIJ, Tensor)
        num_columns = matrix_EIJ.shape[2]
        if not (a_MI.numel() and num_columns):  # no rows, or an inner or outer dimension of 0
            return a_MI.new_zeros(a_MI.shape[0], num_columns)
        a_MI, matrix_EIJ = _aligned(a_MI, 1), _aligned(_aligned(matrix_EIJ, 1), 2)
        out_MJ: Tensor = F.grouped_mm(a_MI, matrix_EIJ, offs=self._ends_E)
        return out_MJ if out_MJ.shape[1] == num_columns else out_MJ[:, :num_columns].contiguous()

    def add_times_(self, sum_MJ: Tensor, a_MI: Tensor, matrix_EIJ: Tensor, alpha: float) -> None:
        if a_MI.numel():
            sum_MJ.add_(self.times(a_MI, matrix_EIJ), alpha=alpha)

    def gradient(self, a_MI: Tensor, b_MJ: Tensor) -> Tensor:
        num_rows, num_columns = a_MI.shape[1], b_MJ.shape[1]
        if not (a_MI.numel() and num_columns):
            return a_MI.new_zeros(len(self._ends_E), num_rows, num_columns)
        out_EIJ: Tensor = F.grouped_mm(_aligned(a_MI, 1).T, _aligned(b_MJ, 1), offs=self._ends_E)
        return out_EIJ[:, :num_rows, :num_columns].contiguous()


def _aligned(tensor: Tensor, dim: int) -> Tensor:
    """Pad a dimension with zeros so that its bytes are a multiple of `_ALIGNMENT`."""
    more = -tensor.shape[dim] % (_ALIGNMENT // tensor.element_size())
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, more]) if more else tensor


def _products(x_MK: Tensor, weight_EOK: _Stack, offsets: Tensor) -> _Products:
    return _GroupedProducts(offsets) if _takes_grouped_mm(x_MK, weight_EOK) else _LoopedProducts(offsets)


def _takes_grouped_mm(x_MK: Tensor, weight_EOK: _Stack) -> bool:
    """Return True where torch has a kernel for grouped products, and the weight would not be copied to align it.

    In other dtypes and on older GPUs torch's function is a loop as well (read in 2.13).
    """
    return (
        isinstance(weight_EOK, Tensor)
        and x_MK.is_cuda
        and x_MK.dtype == torch.bfloat16
        and not torch.version.hip
        and torch.cuda.get_device_capability(x_MK.device)[0] >= 9
        and hasattr(F, "grouped_mm")
        and all(size * x_MK.element_size() % _ALIGNMENT == 0 for size in weight_EOK.shape[1:])
    )


# ---- autograd


def _tensors(flat: Sequence[Any]) -> _Tensors:
    """Return the fields of a `_Tensors` that are followed by the scales."""
    x, weight, lora_A, lora_B, offsets, bias, *scales = flat
    return _Tensors(x, weight, lora_A, lora_B, offsets, bias, scales)


class _GroupedLoraLinear(torch.autograd.Function):
    """_GroupedLoraLinear is the operation in eager mode, on the fields of a `_Tensors`."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, seed: Tensor | None, *fields: Any) -> Tensor:
        y_MO, s_MR = _forward(_tensors(fields), seed, spec)
        ctx.spec = spec
        ctx.save_for_backward(s_MR, seed, *fields)
        return y_MO

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> Any:
        s_MR, seed, *fields = ctx.saved_tensors
        tensors = _tensors(fields)
        gradients = _backward(dy, s_MR, tensors, seed, ctx.spec, ctx.needs_input_grad[2:8])
        return None, None, *gradients, *[None] * len(tensors.scales)


@torch.library.custom_op("sftx::grouped_lora_linear", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scales: list[Tensor],
    seed: Tensor | None,
    scaling: float,
    transposed: bool,
    dropout_p: float,
    dtype: torch.dtype,
    shape: list[int],
) -> tuple[Tensor, Tensor]:
    """Run `_forward` where the compiler or a dispatch mode looks on."""
    tensors = _Tensors(x, weight, lora_A, lora_B, offsets, bias, scales)
    return _forward(tensors, seed, _Spec(scaling, transposed, dropout_p, dtype, shape))


@_op.register_fake
def _(x, weight, lora_A, lora_B, offsets, bias, scales, seed, scaling, transposed, dropout_p, dtype, shape):  # type: ignore[no-untyped-def]
    rows = x.shape[0]
    return x.new_empty(rows, lora_B.shape[1], dtype=dtype), x.new_empty(rows, lora_A.shape[1], dtype=dtype)


@torch.library.custom_op("sftx::grouped_lora_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    s_MR: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scales: list[Tensor],
    seed: Tensor | None,
    scaling: float,
    transposed: bool,
    dropout_p: float,
    dtype: torch.dtype,
    shape: list[int],
    wants_grad: list[bool],
) -> list[Tensor]:
    """Return the gradients that `wants_grad` asks for, in the order of `_Tensors`."""
    tensors = _Tensors(x, weight, lora_A, lora_B, offsets, bias, scales)
    spec = _Spec(scaling, transposed, dropout_p, dtype, shape)
    return [gradient for gradient in _backward(dy, s_MR, tensors, seed, spec, wants_grad) if gradient is not None]


@_backward_op.register_fake
def _(dy, s_MR, *arguments):  # type: ignore[no-untyped-def]
    fields, wants_grad = arguments[:6], arguments[-1]
    return [tensor.new_empty(tensor.shape) for tensor, wanted in zip(fields, wants_grad, strict=True) if wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *fields, scales, seed, scaling, transposed, dropout_p, dtype, shape = inputs
    ctx.spec = _Spec(scaling, transposed, dropout_p, dtype, shape)
    ctx.save_for_backward(output[1], seed, *fields, *scales)


@differentiable_once
def _differentiate(ctx: Any, dy: Tensor, _ds: Tensor) -> Any:
    s_MR, seed, *fields = ctx.saved_tensors
    wants_grad, scales = list(ctx.needs_input_grad[:6]), list(fields[6:])
    gradients = iter(_backward_op(dy, s_MR, *fields[:6], scales, seed, *ctx.spec, wants_grad))
    of_fields = [next(gradients) if wanted else None for wanted in wants_grad]
    # An empty list is taken for one of tensors.
    return *of_fields, [None] * len(scales), None, None, None, None, None, None if ctx.spec.shape else []


_op.register_autograd(_differentiate, setup_context=_setup_context)
