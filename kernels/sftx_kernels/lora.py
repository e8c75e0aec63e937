"""`lora_linear` is a linear layer plus its low-rank update, `lora_linears` several layers that share their input.

With x [M, K], W [O, K], A [R, K], B [O, R], alpha the scaling times dropout's 1 / (1 - p), keep dropout's mask:

    S = drop(x) A^T           y = x W^T + b + alpha S B^T
    dS = alpha dY B           dB = alpha dY^T S
    dA = dS^T drop(x)         dX = dY W + keep * (dS A)

Layers that share x share S and dS: their A are stacked, and x is read once for S and once for dA. Backward keeps x,
the inputs and S, no activation as wide as y, and makes the mask again. In eager mode the operation is a
torch.autograd.Function; under torch.compile it is the custom op `sftx::lora_linear` over the same functions, which the
compiler does not trace. In eager mode the op would add 0.3 ms to a forward and 0.8 ms to a forward and backward, on a
slow core.

Shape suffixes: M rows, C rows of a chunk, K in, O out, R rank (in a group, the sum of the ranks).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

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
from sftx_kernels.dispatch import decide
from sftx_kernels.dropout import dropped_mask, keep_scale, threshold_of
from sftx_kernels.gemm import accumulator, add_product_, add_weight_gradient_, project, project_back, widens
from sftx_kernels.quantized import QuantizedWeight, check_quantized, dequantize_into_


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return a linear layer with a low-rank update, `x W^T + bias + scaling * (drop(x) A^T) B^T`.

    LoRA (arXiv:2106.09685), section 4.1; dropout on the update's input, as in its authors' code and in PEFT.
    Nothing is overwritten; differentiable once.

    Args:
        x, weight, bias: [..., K], [O, K], [O]; of one floating dtype, unless autocast casts them. The weight may be
            an `NF4Weight` or `Int8Weight`, which is dequantised in forward and again in backward, and gets no gradient.
        lora_A, lora_B: [R, K], [O, R]; of one floating dtype, which may be another than x's: both paths run in
            the dtype of `x W^T`. So fp32 A and B on a bf16 base are cast to bf16, which gives the numbers
            that autocast gives, and their gradients are summed in fp32. They come back unrounded, but on a CPU with
            instructions for x's dtype, which rounds the product of each chunk of rows to it, as under autocast.
        dropout_p: in [0, 1). The mask is a function of `seed`, x's shape, the kind of device and the backend, and of
            nothing else. The global generators are neither read nor moved, so that recomputation under
            gradient checkpointing drops the same elements. Triton's kernels round p to a multiple of 2**-16.
        seed: 0-d int64, needed if dropout_p > 0. On the host, or on x's device, where Triton's kernels read it
            without a sync; plain torch reads it on the host, which syncs.
        backend: for `dispatch.decide`: "torch" or "triton". A requested "triton" refuses weights, A and B whose rows
            have gaps.

    Returns:
        [..., O] in the dtype of `x W^T`: x's own, or autocast's.

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    biases = None if bias is None else (bias,)
    return lora_linears(
        x, (weight,), (lora_A,), (lora_B,),
        scaling=scaling, dropout_p=dropout_p, seed=seed, biases=biases, backend=backend,
    )[0]  # fmt: skip


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor | QuantizedWeight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    *,
    scaling: float | Sequence[float],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    biases: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Return `lora_linear` of layers that share x, such as q, k and v: x is read once for all their updates.

    The results are those of separate calls with one seed: all layers use one mask. The weights are all tensors or all
    quantised alike; ranks and scalings may differ; all layers have a bias, or none has.
    """
    scalings = tuple(scaling) if isinstance(scaling, Sequence) else (scaling,) * len(weights)
    _check(x, weights, lora_As, lora_Bs, scalings, biases, dropout_p, seed)
    group = _Group(
        x,
        tuple(w if isinstance(w, Tensor) else w.codes for w in weights),
        tuple(scale for w in weights if not isinstance(w, Tensor) for scale in w.scales),
        tuple(lora_As),
        tuple(lora_Bs),
        tuple(biases or ()),
    )
    spec = _Spec(tuple(map(float, scalings)), dropout_p, gemm_dtype(x), backend)
    seed = seed if dropout_p else None
    # A dispatch mode has to see one operation: the compiler, and selective checkpointing, which keeps results and could
    # not keep one that is added to in place.
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        parts = [list(part) for part in group[1:]]
        return tuple(_op(group.x, *parts, seed, list(spec.scalings), *spec[1:])[:-1])
    spec = _with_decided_backend(spec, group)
    if torch.is_grad_enabled() and any(t.requires_grad for t in group.flat()):
        outputs: tuple[Tensor, ...] = _LoraLinears.apply(spec, seed, group.sizes(), *group.flat())  # type: ignore[no-untyped-call]
        return outputs
    with torch.no_grad():
        return tuple(_forward(group, seed, spec)[:-1])


# ---- checks


def _check(
    x: Tensor,
    weights: Sequence[Tensor | QuantizedWeight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    biases: Sequence[Tensor] | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Check all arguments of a group; with several layers, the message names the wrong one."""
    num = len(weights)
    lists = {
        "lora_As": lora_As,
        "lora_Bs": lora_Bs,
        "scaling": scalings,
        "biases": weights if biases is None else biases,
    }
    for name, values in lists.items():
        if len(values) != num or not num:
            raise error(name, f"one for each of {num} weights" if num else "at least one layer", len(values))
    if len({_kind(w) for w in weights}) > 1:
        raise error("weights", "all tensors, or all quantised alike", list(map(_kind, weights)))
    for i, weight in enumerate(weights):
        if not is_number(scalings[i]):
            raise error("scaling", "a finite number", repr(scalings[i]))
        try:
            if not isinstance(weight, Tensor):
                check_quantized("weight", weight)
                if weight.codes.device != x.device:
                    raise error("weight", f"device {x.device}", f"device {weight.codes.device}")
                weight = x.new_empty(()).expand(weight.shape)  # carries only the shape into the checks below
            bias = None if biases is None else biases[i]
            if biases is not None and not isinstance(bias, Tensor):
                raise error("bias", "a tensor for each layer, or no biases", repr(bias))
            _check_layer(x, weight, lora_As[i], lora_Bs[i], bias, dropout_p, seed)
        except ValueError as problem:
            if num == 1:
                raise
            raise ValueError(f"layer {i} of {num}: {problem}") from None


def _kind(weight: Tensor | QuantizedWeight) -> str:
    return type(weight).__name__ + (
        " with nested_absmax" if not isinstance(weight, Tensor) and weight.scales[1:] else ""
    )


def _check_layer(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    check_tensor("x", x, (*["..."] * (x.dim() - 1), "K"), x, None)
    K = x.shape[-1]
    if K == 0:
        raise error("x", "at least one column", f"shape {list(x.shape)}")
    check_tensor("weight", weight, ("O", K), x, x.dtype)
    check_tensor("lora_A", lora_A, ("R", K), x, None)
    check_tensor("lora_B", lora_B, (weight.shape[0], lora_A.shape[0]), x, lora_A.dtype)
    if lora_A.shape[0] == 0:
        raise error("lora_A", "at least one row", f"shape {list(lora_A.shape)}")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x, x.dtype)
    check_dropout(dropout_p, seed)


# ---- a call as data


class _Spec(NamedTuple):
    """A _Spec holds the arguments of a call that are not tensors."""

    scalings: tuple[float, ...]
    dropout_p: float
    dtype: torch.dtype  # of the products
    backend: str | None  # as requested, until `_with_decided_backend`


class _Group(NamedTuple):
    """A _Group holds the tensors of a call, quantised weights as codes and scales."""

    x: Tensor
    weights: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]  # equally many for each weight, those of the first weight first; none for plain weights
    lora_As: tuple[Tensor, ...]
    lora_Bs: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]  # may be empty

    def flat(self) -> tuple[Tensor, ...]:
        return (self.x, *(tensor for part in self[1:] for tensor in part))

    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self[1:]))

    @property
    def ranks(self) -> list[int]:
        return [A.shape[0] for A in self.lora_As]


def _unflatten(flat: Sequence[Any], sizes: Sequence[int]) -> tuple[Any, list[tuple[Any, ...]]]:
    """Split values in the order of `_Group.flat` into (x's value, the other parts' values)."""
    parts, start = [], 1
    for size in sizes:
        parts.append(tuple(flat[start : start + size]))
        start += size
    return flat[0], parts


def _with_decided_backend(spec: _Spec, group: _Group) -> _Spec:
    """Replace the requested backend by the one that runs.

    Rows with gaps cost the Triton kernels a copy; an explicit request for these kernels raises instead.
    """
    decision = decide("lora_linear", group.x.device, spec.dtype, requested=spec.backend)
    if decision.backend != "torch" and decision.forced:
        weights = () if group.scales else group.weights
        for name, tensors in (("weight", weights), ("lora_A", group.lora_As), ("lora_B", group.lora_Bs)):
            for tensor in tensors:
                if tensor.stride(1) != 1 and tensor.shape[1] > 1:
                    raise error(name, "rows without gaps, of stride 1", f"strides {tensor.stride()}")
    return spec._replace(backend=decision.backend)


# ---- forward and backward, without autograd


def _forward(group: _Group, seed: Tensor | None, spec: _Spec) -> list[Tensor]:
    """Return y [..., O] of each layer, and S [M, R], which backward needs."""
    x, group = group.x, _with_aligned_ranks(group, spec.backend)
    with without_autocast(x.device.type):
        products = _Products(spec, seed, x.device)
        x_MK = x.reshape(-1, x.shape[-1]).to(spec.dtype)
        s_MR = products.shrink(x_MK, _stack(group.lora_As, spec.dtype))
        outputs = []
        biases = group.biases or (None,) * len(spec.scalings)
        for i, (s, B, bias) in enumerate(zip(_split(s_MR, group.ranks), group.lora_Bs, biases, strict=True)):
            bias_O = None if bias is None else bias.to(spec.dtype)
            alpha = spec.scalings[i] * products.keep_scale
            # The update is added in place to the fresh output of the base: no second [M, O].
            y_MO = project(x_MK, _weight(group, i, spec), bias_O)
            add_product_(y_MO, s, B.to(spec.dtype).T, alpha)
            outputs.append(y_MO.view(*x.shape[:-1], B.shape[0]))
    return [*outputs, s_MR]


def _backward(
    dys: Sequence[Tensor | None],
    s_MR: Tensor,
    inputs: _Group,
    seed: Tensor | None,
    spec: _Spec,
    wants_grad: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradient of each of `inputs.flat()` that `wants_grad` asks for, None for the others."""
    x, num_rows = inputs.x, s_MR.shape[0]
    group = _with_aligned_ranks(inputs, spec.backend)
    x_wanted, (weights_wanted, _, As_wanted, Bs_wanted, biases_wanted) = _unflatten(wants_grad, group.sizes())
    num_layers = len(dys)
    dX: Tensor | None = None
    dWs: list[Tensor | None] = [None] * num_layers
    dAs: list[Tensor | None] = [None] * num_layers
    dBs: list[Tensor | None] = [None] * num_layers
    dbs: list[Tensor | None] = [None] * num_layers
    with without_autocast(x.device.type):
        products = _Products(spec, seed, x.device)
        x_MK = x.reshape(-1, x.shape[-1]).to(spec.dtype)
        dy_MOs = [None if dy is None else dy.reshape(num_rows, dy.shape[-1]).to(spec.dtype) for dy in dys]
        for i, dy_MO in enumerate(dy_MOs):
            if dy_MO is None:
                continue
            if weights_wanted[i]:
                dWs[i] = _weight_gradient(dy_MO, x_MK).to(group.weights[i].dtype)
            if biases_wanted and biases_wanted[i]:
                dbs[i] = dy_MO.sum(0, dtype=accumulator(dy_MO.dtype)).to(group.biases[i].dtype)
        if x_wanted or any(As_wanted) or any(Bs_wanted):
            dS_parts = []
            for i, (dy_MO, s) in enumerate(zip(dy_MOs, _split(s_MR, group.ranks), strict=True)):
                if dy_MO is None:
                    dS_parts.append(torch.zeros_like(s))
                    continue
                B, alpha = group.lora_Bs[i], spec.scalings[i] * products.keep_scale
                dS, dBs[i] = products.down(dy_MO, B.to(spec.dtype), s, alpha, B.dtype)
                dS_parts.append(dS)
            dS_MR = dS_parts[0] if num_layers == 1 else torch.cat(dS_parts, 1)
            if any(As_wanted):
                widest = functools.reduce(torch.promote_types, (A.dtype for A in group.lora_As))
                dA_RK = products.grad_A(dS_MR, x_MK, widest)
                dAs = [dA_RK]
                if num_layers > 1:  # copies, since what an op returns may not share memory
                    parts = zip(dA_RK.split(group.ranks), group.lora_As, strict=True)
                    dAs = [part.to(A.dtype, copy=True) for part, A in parts]
            if x_wanted:
                branches = ((dy, _weight(group, i, spec)) for i, dy in enumerate(dy_MOs) if dy is not None)
                dX = products.grad_x(branches, dS_MR, _stack(group.lora_As, spec.dtype)).view(x.shape).to(x.dtype)
    if group is not inputs:  # cut the padding of the ranks off
        dAs = [None if dA is None else dA[: A.shape[0]].clone() for dA, A in zip(dAs, inputs.lora_As, strict=True)]
        dBs = [None if dB is None else dB[:, : B.shape[1]].clone() for dB, B in zip(dBs, inputs.lora_Bs, strict=True)]
    no_scale_grads = [None] * len(group.scales)
    gradients = [dX, *dWs, *no_scale_grads, *dAs, *dBs, *(dbs if group.biases else ())]
    return [gradient if wanted else None for gradient, wanted in zip(gradients, wants_grad, strict=True)]


def _with_aligned_ranks(group: _Group, backend: str | None) -> _Group:
    """Pad the ranks with zeros to multiples of 16 for the Triton kernels.

    These load only aligned rows in wide loads, and at rank 8 ptxas spilled 2 KB a thread (sm_80).
    """
    if backend == "torch" or not any(rank % 16 for rank in group.ranks):
        return group
    padding = [_aligned_rank(A, backend) - A.shape[0] for A in group.lora_As]
    return group._replace(
        lora_As=tuple(F.pad(A, (0, 0, 0, more)) for A, more in zip(group.lora_As, padding, strict=True)),
        lora_Bs=tuple(F.pad(B, (0, more)) for B, more in zip(group.lora_Bs, padding, strict=True)),
    )


def _aligned_rank(lora_A_RK: Tensor, backend: str | None) -> int:
    rank = lora_A_RK.shape[0]
    return rank if backend == "torch" else -(-rank // 16) * 16


def _split(s_MR: Tensor, ranks: Sequence[int]) -> Sequence[Tensor]:
    return [s_MR] if len(ranks) == 1 else s_MR.split(ranks, 1)


def _stack(lora_As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return lora_As[0].to(dtype) if len(lora_As) == 1 else torch.cat([A.to(dtype) for A in lora_As])


def _weight(group: _Group, i: int, spec: _Spec) -> Tensor:
    """Return the weight of layer i in the dtype of the products; a quantised one is freed after its one use."""
    if not group.scales:
        return group.weights[i].to(spec.dtype)
    out = torch.empty(group.lora_Bs[i].shape[0], group.x.shape[-1], dtype=spec.dtype, device=group.x.device)
    assert spec.backend is not None
    num = len(group.scales) // len(group.weights)
    dequantize_into_(out, group.weights[i], group.scales[num * i : num * (i + 1)], spec.backend)
    return out


# ---- products

# On CPU, dY is read in chunks of about this many elements (6 MB in fp32), so that the second product may find it in the
# cache. Both products on one core (M 2048, O 1536, R 16): 4.7 ms in chunks of 3 MB and 6.0 at once on a Xeon in fp32;
# on an EPYC in bf16 1.5 ms in chunks of half this size, 1.3 in these and at once. With small chunks two cores wait.
_CACHED_ELEMENTS = 3 << 19


class _Products:
    """_Products computes the matrix products of one forward or backward, with dropout as a function of `seed`.

    All matrices have one dtype. With keep the mask of ones and zeros, drop(x) is keep * x * keep_scale; the caller
    multiplies the scale into a factor that it has anyway. With the backend "triton" the kernels compute `down`, and
    under dropout also the products with a mask; the others stay with torch (cuBLAS).
    """

    def __init__(self, spec: _Spec, seed: Tensor | None, device: torch.device) -> None:
        self._threshold = threshold_of(spec.dropout_p)
        self.keep_scale = keep_scale(self._threshold)
        self._seed = seed if self._threshold else None
        self._dropped_MK: Tensor | None = None
        self._triton: Any = None
        if spec.backend == "triton":
            from sftx_kernels.triton import lora as kernels

            self._triton = kernels
            if self._seed is not None and self._seed.device != device:
                # a fill, not a copy from the host's memory, which would sync
                self._seed = torch.full((), int(self._seed), dtype=torch.int64, device=device)

    def shrink(self, x_MK: Tensor, lora_A_RK: Tensor) -> Tensor:
        """Return S = (keep * x) A^T, [M, R]."""
        if self._triton and self._threshold:
            s_MR: Tensor = self._triton.shrink(x_MK, lora_A_RK, self._seed, self._threshold)
            return s_MR
        return _mm(self._drop(x_MK), lora_A_RK.T)

    def down(
        self, dy_MO: Tensor, lora_B_OR: Tensor, s_MR: Tensor, alpha: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return dS = alpha dY B, [M, R], and dB = alpha dY^T S, [O, R] in `dtype`."""
        (num_rows, O), R = dy_MO.shape, lora_B_OR.shape[1]  # noqa: E741
        if self._triton and self._triton.down_pays(R):
            dS_MR, dB_OR = self._triton.down(dy_MO, lora_B_OR, s_MR, alpha, dtype)
            return dS_MR, dB_OR
        product_dtype = torch.float32 if widens(dy_MO) else dy_MO.dtype
        scaled_B_OR = lora_B_OR.to(product_dtype) * alpha
        dS_MR = dy_MO.new_empty(num_rows, R)
        # [R, O] and then transposed: 0.99 ms against 1.44 for dY^T S (fp32, the shape above, two cores).
        dB_RO = dy_MO.new_zeros(R, O, dtype=accumulator(dy_MO.dtype))
        step = max(64, _CACHED_ELEMENTS // max(1, O) // 64 * 64) if dy_MO.is_cpu else max(1, num_rows)
        for start in range(0, num_rows, step):
            chunk = slice(start, start + step)
            dy_CO = dy_MO[chunk].to(product_dtype)
            if dS_MR.dtype == product_dtype:
                torch.mm(dy_CO, scaled_B_OR, out=dS_MR[chunk])
            else:
                dS_MR[chunk] = dy_CO @ scaled_B_OR
            add_weight_gradient_(dB_RO, s_MR[chunk].to(product_dtype), dy_CO)
        return dS_MR, dB_RO.mul_(alpha).T.to(dtype).contiguous()

    def grad_A(self, dS_MR: Tensor, x_MK: Tensor, dtype: torch.dtype) -> Tensor:
        """Return dA = dS^T (keep * x), [R, K] in `dtype`."""
        if self._triton and self._threshold:
            dA_RK: Tensor = self._triton.grad_A(dS_MR, x_MK, self._seed, self._threshold, dtype)
            return dA_RK
        return _weight_gradient(dS_MR, self._drop(x_MK)).to(dtype)

    def grad_x(self, branches: Iterable[tuple[Tensor, Tensor]], dS_MR: Tensor, lora_A_RK: Tensor) -> Tensor:
        """Return the sum of dY W over `branches` of (dY [M, O], W [O, K]), plus keep * (dS A): [M, K]."""
        if self._triton and self._threshold:
            sum_MK: Tensor = self._triton.outer(dS_MR, lora_A_RK, self._seed, self._threshold)
            for dy_MO, weight_OK in branches:
                sum_MK.addmm_(dy_MO, weight_OK)
            return sum_MK
        dX_MK: Tensor | None = None
        for dy_MO, weight_OK in branches:
            if dX_MK is None:
                dX_MK = project_back(dy_MO, weight_OK)
            elif widens(dX_MK):
                dX_MK.add_(project_back(dy_MO, weight_OK))
            else:
                dX_MK.addmm_(dy_MO, weight_OK)
        assert dX_MK is not None
        if self._threshold:
            return dX_MK.add_(_mm(dS_MR, lora_A_RK).masked_fill_(self._dropped(dX_MK), 0))
        return add_product_(dX_MK, dS_MR, lora_A_RK, 1.0)

    def _drop(self, x_MK: Tensor) -> Tensor:
        """Return keep * x."""
        return x_MK.masked_fill(self._dropped(x_MK), 0) if self._threshold else x_MK

    def _dropped(self, x_MK: Tensor) -> Tensor:
        if self._dropped_MK is None:
            assert self._seed is not None
            self._dropped_MK = dropped_mask(x_MK.shape, self._threshold, int(self._seed), x_MK.device)
        return self._dropped_MK


def _weight_gradient(dy_MO: Tensor, x_MK: Tensor) -> Tensor:
    """Return dY^T x, [O, K], summed and returned in fp32 at least."""
    if dy_MO.dtype == accumulator(dy_MO.dtype):
        return dy_MO.T @ x_MK
    sum_OK = dy_MO.new_zeros(dy_MO.shape[1], x_MK.shape[1], dtype=accumulator(dy_MO.dtype))
    add_weight_gradient_(sum_OK, dy_MO, x_MK)
    return sum_OK


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype) if widens(a) else a @ b


# ---- autograd


class _LoraLinears(torch.autograd.Function):
    """_LoraLinears is the operation in eager mode, on the flat tensors of a `_Group`."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, seed: Tensor | None, sizes: tuple[int, ...], *flat: Tensor) -> Any:
        x, parts = _unflatten(flat, sizes)
        *outputs, s_MR = _forward(_Group(x, *parts), seed, spec)
        ctx.spec, ctx.sizes = spec, sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s_MR, seed if spec.dropout_p else None, *flat)
        return tuple(outputs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        s_MR, seed, *flat = ctx.saved_tensors
        if all(dy is None for dy in dys):
            return (None,) * (3 + len(flat))
        x, parts = _unflatten(flat, ctx.sizes)
        gradients = _backward(dys, s_MR, _Group(x, *parts), seed, ctx.spec, ctx.needs_input_grad[3:])
        return None, None, None, *gradients


@torch.library.custom_op("sftx::lora_linear", mutates_args=())
def _op(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    biases: list[Tensor],
    seed: Tensor | None,
    scalings: list[float],
    dropout_p: float,
    dtype: torch.dtype,
    backend: str | None,
) -> list[Tensor]:
    """Run `_forward` under torch.compile. Weights are plain, or the codes of quantised ones with their `scales`."""
    group = _Group(x, *map(tuple, (weights, scales, lora_As, lora_Bs, biases)))
    return _forward(group, seed, _with_decided_backend(_Spec(tuple(scalings), dropout_p, dtype, backend), group))


@_op.register_fake
def _(x, weights, scales, lora_As, lora_Bs, biases, seed, scalings, dropout_p, dtype, backend):  # type: ignore[no-untyped-def]
    outputs = [x.new_empty(*x.shape[:-1], B.shape[0], dtype=dtype) for B in lora_Bs]
    decided = decide("lora_linear", x.device, dtype, requested=backend).backend
    rank = sum(_aligned_rank(A, decided) for A in lora_As)
    return [*outputs, x.new_empty(x.numel() // x.shape[-1], rank, dtype=dtype)]


@torch.library.custom_op("sftx::lora_linear_backward", mutates_args=())
def _backward_op(
    dys: list[Tensor],
    s_MR: Tensor,
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    biases: list[Tensor],
    seed: Tensor | None,
    scalings: list[float],
    dropout_p: float,
    dtype: torch.dtype,
    backend: str | None,
    wants_grad: list[bool],
) -> list[Tensor]:
    """Return the gradients that `wants_grad` asks for, in the order of `_Group.flat`."""
    group = _Group(x, *map(tuple, (weights, scales, lora_As, lora_Bs, biases)))
    spec = _with_decided_backend(_Spec(tuple(scalings), dropout_p, dtype, backend), group)
    gradients = _backward(dys, s_MR, group, seed, spec, wants_grad)
    return [gradient for gradient in gradients if gradient is not None]


@_backward_op.register_fake
def _(dys, s_MR, x, weights, scales, lora_As, lora_Bs, biases, seed, scalings, dropout_p, dtype, backend, wants_grad):  # type: ignore[no-untyped-def]
    flat = (x, *weights, *scales, *lora_As, *lora_Bs, *biases)
    return [tensor.new_empty(tensor.shape) for tensor, wanted in zip(flat, wants_grad, strict=True) if wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, scales, lora_As, lora_Bs, biases, seed, *spec = inputs
    group = _Group(x, *map(tuple, (weights, scales, lora_As, lora_Bs, biases)))
    ctx.spec, ctx.sizes = spec, group.sizes()
    ctx.save_for_backward(output[-1], seed, *group.flat())


@differentiable_once
def _differentiate(ctx: Any, dys: list[Tensor]) -> Any:
    s_MR, seed, *flat = ctx.saved_tensors
    x, parts = _unflatten(flat, ctx.sizes)
    wants_grad = [
        bool(w) for need in ctx.needs_input_grad[:6] for w in (need if isinstance(need, list | tuple) else [need])
    ]
    gradients = iter(_backward_op(list(dys[:-1]), s_MR, x, *map(list, parts), seed, *ctx.spec, wants_grad))
    dX, grad_parts = _unflatten([next(gradients) if wanted else None for wanted in wants_grad], ctx.sizes)
    return dX, *map(list, grad_parts), None, None, None, None, None


_op.register_autograd(_differentiate, setup_context=_setup_context)
