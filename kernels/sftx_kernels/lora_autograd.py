"""What `lora` computes, and how it is differentiated.

With x [M, K], W [O, K], A [R, K], B [O, R], alpha the scaling times dropout's 1 / (1 - p):

    S = drop(x) A^T           y = x W^T + b + alpha S B^T
    dS = alpha dY B           dB = alpha dY^T S
    dA = dS^T drop(x)         dX = dY W + keep * (dS A)

Layers that share x share S and dS: their A are stacked, and x is read once for S and once for dA. Backward keeps x,
the inputs and S, nothing as wide as y, and makes the mask again. In eager mode this is a torch.autograd.Function, and
under torch.compile the custom op `sftx::lora_linear`, over the same functions: to the compiler the op is one opaque
call; in eager mode it would add 0.3 ms to a forward and 0.8 ms to a forward and backward, on a slow core.

Shape suffixes: M rows, K in, O out, R rank (in a group, the sum of the ranks).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sftx_kernels.checks import autocasts, differentiable_once, error
from sftx_kernels.dispatch import decide
from sftx_kernels.gemm import accumulator
from sftx_kernels.lora_products import TorchProducts, weight_gradient
from sftx_kernels.nf4 import dequantize_into_


def run(group: Group, seed: Tensor | None, spec: Spec) -> tuple[Tensor, ...]:
    """The outputs of a group whose arguments have been checked, differentiable once."""
    seed = seed if spec.dropout_p else None
    # As one operation for whoever looks at operations: the compiler, and selective checkpointing, which keeps results
    # and could not keep one that is added to in place.
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        parts = [list(part) for part in group[1:]]
        return tuple(_op(group.x, *parts, seed, list(spec.scalings), *spec[1:])[:-1])
    spec = _decided(spec, group)
    if torch.is_grad_enabled() and any(t.requires_grad for t in group.flat()):
        outputs: tuple[Tensor, ...] = _LoraLinears.apply(spec, seed, group.sizes(), *group.flat())  # type: ignore[no-untyped-call]
        return outputs
    with torch.no_grad():
        return tuple(_forward(group, seed, spec)[:-1])


class Spec(NamedTuple):
    """What a call is told beside its tensors."""

    scalings: tuple[float, ...]
    dropout_p: float
    dtype: torch.dtype  # of the products
    backend: str | None  # as asked for, until `_decided`


class Group(NamedTuple):
    """The tensors of a call that may have gradients, and those of NF4 weights: codes as weights, and absmax."""

    x: Tensor
    weights: tuple[Tensor, ...]
    absmaxes: tuple[Tensor, ...]  # none for plain weights
    lora_As: tuple[Tensor, ...]
    lora_Bs: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]  # or none

    def flat(self) -> tuple[Tensor, ...]:
        return (self.x, *(tensor for part in self[1:] for tensor in part))

    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self[1:]))

    @property
    def ranks(self) -> list[int]:
        return [A.shape[0] for A in self.lora_As]


def _grouped(flat: Sequence[Any], sizes: Sequence[int]) -> tuple[Any, list[tuple[Any, ...]]]:
    """(of x, of the other parts of a `Group`): the inverse of `Group.flat`, for whatever lies in its order."""
    parts, start = [], 1
    for size in sizes:
        parts.append(tuple(flat[start : start + size]))
        start += size
    return flat[0], parts


def _decided(spec: Spec, group: Group) -> Spec:
    """With the backend that runs. Rows with gaps cost a copy; who asked for a kernel by name is told instead."""
    decision = decide("lora_linear", group.x.device, spec.dtype, asked=spec.backend)
    if decision.backend != "torch" and decision.forced:
        weights = () if group.absmaxes else group.weights
        for name, tensors in (("weight", weights), ("lora_A", group.lora_As), ("lora_B", group.lora_Bs)):
            for tensor in tensors:
                if tensor.stride(1) != 1 and tensor.shape[1] > 1:
                    raise error(name, "rows without gaps, of stride 1", f"strides {tensor.stride()}")
    return spec._replace(backend=decision.backend)


# ---- forward and backward, without autograd


def _products(spec: Spec, seed: Tensor | None, device: torch.device) -> TorchProducts:
    if spec.backend == "torch":
        return TorchProducts(spec.dropout_p, seed)
    from sftx_kernels.gpu.lora_products import TritonProducts

    return TritonProducts(spec.dropout_p, seed, device, fused=spec.backend == "triton-fused")


def _forward(group: Group, seed: Tensor | None, spec: Spec) -> list[Tensor]:
    """[y of each layer [..., O], and S [M, R], which backward needs]"""
    x, group = group.x, _aligned(group, spec.backend)
    with _without_autocast(x.device.type):
        products = _products(spec, seed, x.device)
        x_MK = x.reshape(-1, x.shape[-1]).to(spec.dtype)
        s_MR = products.shrink(x_MK, _stack(group.lora_As, spec.dtype))
        outputs = []
        biases = group.biases or (None,) * len(spec.scalings)
        for i, (s, B, bias) in enumerate(zip(_split(s_MR, group.ranks), group.lora_Bs, biases, strict=True)):
            bias_O = None if bias is None else bias.to(spec.dtype)
            alpha = spec.scalings[i] * products.keep_scale
            y_MO = products.linear(x_MK, _weight(group, i, spec), bias_O, s, B.to(spec.dtype), alpha)
            outputs.append(y_MO.view(*x.shape[:-1], B.shape[0]))
    return [*outputs, s_MR]


def _backward(
    dys: Sequence[Tensor | None],
    s_MR: Tensor,
    group: Group,
    seed: Tensor | None,
    spec: Spec,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of each of `group.flat()` that is wanted, None for the others."""
    x, rows, given = group.x, s_MR.shape[0], group
    group = _aligned(group, spec.backend)
    want_x, (want_weights, _, want_As, want_Bs, want_biases) = _grouped(wanted, group.sizes())
    ranks = group.ranks
    with _without_autocast(x.device.type):
        products = _products(spec, seed, x.device)
        x_MK = x.reshape(-1, x.shape[-1]).to(spec.dtype)
        dy_MOs = [None if dy is None else dy.reshape(rows, dy.shape[-1]).to(spec.dtype) for dy in dys]
        dWs = _each(want_weights, dy_MOs, lambda i, dy: weight_gradient(dy, x_MK).to(group.weights[i].dtype))
        dbs = _each(want_biases, dy_MOs, lambda i, dy: _sum_rows(dy).to(group.biases[i].dtype))
        dX: Tensor | None = None
        dAs: list[Tensor | None] = [None] * len(ranks)
        dBs: list[Tensor | None] = [None] * len(ranks)
        if want_x or any(want_As) or any(want_Bs):
            dS_parts = []
            for i, (dy_MO, s) in enumerate(zip(dy_MOs, _split(s_MR, ranks), strict=True)):
                if dy_MO is None:
                    dS_parts.append(torch.zeros_like(s))
                    continue
                B, alpha = group.lora_Bs[i], spec.scalings[i] * products.keep_scale
                dS, dBs[i] = products.down(dy_MO, B.to(spec.dtype), s, alpha, B.dtype)
                dS_parts.append(dS)
            dS_MR = dS_parts[0] if len(ranks) == 1 else torch.cat(dS_parts, 1)
            if any(want_As):
                widest = functools.reduce(torch.promote_types, (A.dtype for A in group.lora_As))
                dA_RK = products.grad_A(dS_MR, x_MK, widest)
                # Copies, since what an op returns may not share memory.
                dAs = [dA_RK]
                if len(ranks) > 1:
                    parts = zip(dA_RK.split(ranks), group.lora_As, strict=True)
                    dAs = [part.to(A.dtype, copy=True) for part, A in parts]
            if want_x:
                branches = ((dy, _weight(group, i, spec)) for i, dy in enumerate(dy_MOs) if dy is not None)
                dX = products.grad_x(branches, dS_MR, _stack(group.lora_As, spec.dtype)).view(x.shape).to(x.dtype)
    if group is not given:
        dAs = [None if dA is None else dA[: A.shape[0]].clone() for dA, A in zip(dAs, given.lora_As, strict=True)]
        dBs = [None if dB is None else dB[:, : B.shape[1]].clone() for dB, B in zip(dBs, given.lora_Bs, strict=True)]
    gradients = [dX, *dWs, *(None for _ in group.absmaxes), *dAs, *dBs, *dbs]
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def _aligned(group: Group, backend: str | None) -> Group:
    """With ranks that are multiples of 16, padded with zeros, for the kernels: they load wide only what is aligned,
    and at rank 8 ptxas spilled 2 KB a thread (sm_80)."""
    if backend == "torch" or not any(rank % 16 for rank in group.ranks):
        return group
    missing = [_aligned_rank(A, backend) - A.shape[0] for A in group.lora_As]
    return group._replace(
        lora_As=tuple(F.pad(A, (0, 0, 0, more)) for A, more in zip(group.lora_As, missing, strict=True)),
        lora_Bs=tuple(F.pad(B, (0, more)) for B, more in zip(group.lora_Bs, missing, strict=True)),
    )


def _aligned_rank(lora_A_RK: Tensor, backend: str | None) -> int:
    rank = lora_A_RK.shape[0]
    return rank if backend == "torch" else -(-rank // 16) * 16


def _each(
    wanted: Sequence[bool], dys: Sequence[Tensor | None], gradient: Callable[[int, Tensor], Tensor]
) -> list[Tensor | None]:
    pairs = zip(wanted, dys, strict=False)  # there may be no biases
    return [gradient(i, dy) if want and dy is not None else None for i, (want, dy) in enumerate(pairs)]


def _split(s_MR: Tensor, ranks: Sequence[int]) -> Sequence[Tensor]:
    return [s_MR] if len(ranks) == 1 else s_MR.split(ranks, 1)


def _stack(lora_As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return lora_As[0].to(dtype) if len(lora_As) == 1 else torch.cat([A.to(dtype) for A in lora_As])


def _weight(group: Group, i: int, spec: Spec) -> Tensor:
    """The weight of layer i in the dtype of the products; of NF4, a temporary that is freed after its one use."""
    if not group.absmaxes:
        return group.weights[i].to(spec.dtype)
    out = torch.empty(group.lora_Bs[i].shape[0], group.x.shape[-1], dtype=spec.dtype, device=group.x.device)
    backend = "torch" if spec.backend == "torch" else "triton"
    dequantize_into_(out, group.weights[i], group.absmaxes[i], backend)
    return out


def _sum_rows(dy_MO: Tensor) -> Tensor:
    return dy_MO.sum(0, dtype=accumulator(dy_MO.dtype))


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    """The dtypes are chosen already; autocast would cast fp32 operands behind our back."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


# ---- autograd


class _LoraLinears(torch.autograd.Function):
    """Takes and differentiates the flat tensors of a `Group`."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, seed: Tensor | None, sizes: tuple[int, ...], *flat: Tensor) -> Any:
        x, parts = _grouped(flat, sizes)
        *outputs, s_MR = _forward(Group(x, *parts), seed, spec)
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
        x, parts = _grouped(flat, ctx.sizes)
        gradients = _backward(dys, s_MR, Group(x, *parts), seed, ctx.spec, ctx.needs_input_grad[3:])
        return None, None, None, *gradients


@torch.library.custom_op("sftx::lora_linear", mutates_args=())
def _op(
    x: Tensor,
    weights: list[Tensor],
    absmaxes: list[Tensor],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    biases: list[Tensor],
    seed: Tensor | None,
    scalings: list[float],
    dropout_p: float,
    dtype: torch.dtype,
    backend: str | None,
) -> list[Tensor]:
    """`_forward`, for torch.compile: plain weights, or the codes of NF4 ones with their `absmaxes`."""
    group = Group(x, *map(tuple, (weights, absmaxes, lora_As, lora_Bs, biases)))
    return _forward(group, seed, _decided(Spec(tuple(scalings), dropout_p, dtype, backend), group))


@_op.register_fake
def _(x, weights, absmaxes, lora_As, lora_Bs, biases, seed, scalings, dropout_p, dtype, backend):  # type: ignore[no-untyped-def]
    outputs = [x.new_empty(*x.shape[:-1], B.shape[0], dtype=dtype) for B in lora_Bs]
    chosen = decide("lora_linear", x.device, dtype, asked=backend).backend
    rank = sum(_aligned_rank(A, chosen) for A in lora_As)
    return [*outputs, x.new_empty(x.numel() // x.shape[-1], rank, dtype=dtype)]


@torch.library.custom_op("sftx::lora_linear_backward", mutates_args=())
def _backward_op(
    dys: list[Tensor],
    s_MR: Tensor,
    x: Tensor,
    weights: list[Tensor],
    absmaxes: list[Tensor],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    biases: list[Tensor],
    seed: Tensor | None,
    scalings: list[float],
    dropout_p: float,
    dtype: torch.dtype,
    backend: str | None,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients that are wanted, in the order of `Group.flat`."""
    group = Group(x, *map(tuple, (weights, absmaxes, lora_As, lora_Bs, biases)))
    spec = _decided(Spec(tuple(scalings), dropout_p, dtype, backend), group)
    gradients = _backward(dys, s_MR, group, seed, spec, wanted)
    return [gradient for gradient in gradients if gradient is not None]


@_backward_op.register_fake
def _(dys, s_MR, x, weights, absmaxes, lora_As, lora_Bs, biases, seed, scalings, dropout_p, dtype, backend, wanted):  # type: ignore[no-untyped-def]
    flat = (x, *weights, *absmaxes, *lora_As, *lora_Bs, *biases)
    return [tensor.new_empty(tensor.shape) for tensor, want in zip(flat, wanted, strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, absmaxes, lora_As, lora_Bs, biases, seed, *spec = inputs
    group = Group(x, *map(tuple, (weights, absmaxes, lora_As, lora_Bs, biases)))
    ctx.spec, ctx.sizes = spec, group.sizes()
    ctx.save_for_backward(output[-1], seed, *group.flat())


@differentiable_once
def _op_backward(ctx: Any, dys: list[Tensor]) -> Any:
    s_MR, seed, *flat = ctx.saved_tensors
    x, parts = _grouped(flat, ctx.sizes)
    wanted = [
        bool(w) for need in ctx.needs_input_grad[:6] for w in (need if isinstance(need, list | tuple) else [need])
    ]
    found = iter(_backward_op(list(dys[:-1]), s_MR, x, *map(list, parts), seed, *ctx.spec, wanted))
    dX, gradients = _grouped([next(found) if want else None for want in wanted], ctx.sizes)
    return dX, *map(list, gradients), None, None, None, None, None


_op.register_autograd(_op_backward, setup_context=_setup_context)
