"""This kernel computes the divergence of a student from its teacher and its gradient, from the logits of both.

A program processes a row. It scans both rows of logits once, online, for their maxima and sums of exponentials, then
reads them again for the divergence. The gradient of the forward KL is written in that second reading; that of the
others needs the divergence first, so they are read a third time. It is written over the student's logits.

The formula is that of `sftx_kernels.linear_kl`. All arithmetic is fp32. Offsets into the logits are int64. The memory
of a row goes on to a multiple of 16 elements, as `sftx_kernels.head.logits_buffer` allocates it: it is read and written
up to there, so that loads are 16 bytes wide whatever V is, and what stands beyond V is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftx_kernels.triton.cross_entropy import LOWEST, score
from sftx_kernels.triton.launch import Arguments, Chip, Launch, Work

_FORWARD, _REVERSE, _JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LIMIT = tl.constexpr(80.0)  # of the log of a ratio: beyond it, the smaller probability is 0 beside the larger one


@triton.jit
def _load(
    row_ptr, start, V, width, logit_scale, softcap, BEYOND: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Return a block of final logits, which are BEYOND from column V on."""
    cols = start + tl.arange(0, BLOCK_V)
    inside = cols < V
    raw = tl.load(row_ptr + cols, mask=cols < width, other=0.0)
    z = score(tl.where(inside, raw, 0.0), logit_scale, softcap, SOFTCAP)
    return tl.where(inside, z, BEYOND)


@triton.jit
def _accumulate(z, top, total):
    """Update maximum and sum of exponentials with a block of logits."""
    new_top = tl.maximum(top, tl.max(z, 0))
    return new_top, total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)


@triton.jit
def _log_m_over_p(log_ratio, beta):
    return tl.log((1.0 - beta) + beta * tl.exp(log_ratio))


@triton.jit
def _log_ratio(log_p, log_q, inside, KIND: tl.constexpr, BARRED: tl.constexpr):
    """Return log(q / p), and 0 where there is no class, or one whose probability of 0 decides nothing."""
    unused = ~inside
    if BARRED:
        if KIND == _FORWARD:
            unused |= log_q == float("-inf")
        elif KIND == _REVERSE:
            unused |= log_p == float("-inf")
        else:
            unused |= (log_p == float("-inf")) & (log_q == float("-inf"))
    ratio = tl.where(unused, 0.0, log_q) - tl.where(unused, 0.0, log_p)
    if KIND == _JSD:
        ratio = tl.minimum(tl.maximum(ratio, -_LIMIT), _LIMIT)
    return ratio


@triton.jit
def row_kernel(
    logits_ptr, teacher_ptr, labels_ptr, weights_ptr, divergence_ptr, nll_ptr, correct_ptr,
    stride_row, stride_teacher, V, width, logit_scale, softcap, teacher_scale, teacher_softcap, per_temperature, beta,
    alpha,
    WEIGHTS: tl.constexpr, GRADIENT: tl.constexpr, KIND: tl.constexpr, LABELS: tl.constexpr, STATS: tl.constexpr,
    SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, TEMPERED: tl.constexpr, BARRED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    teacher_row_ptr = teacher_ptr + row * stride_teacher
    top = tl.full((), LOWEST, tl.float32)
    plain_total = tl.full((), 0.0, tl.float32)  # at temperature 1
    tempered_top = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    teacher_top = tl.full((), LOWEST, tl.float32)
    teacher_total = tl.full((), 0.0, tl.float32)
    best = tl.full((), 0, tl.int32)
    for start in range(0, V, BLOCK_V):
        z = _load(row_ptr, start, V, width, logit_scale, softcap, float("-inf"), SOFTCAP, BLOCK_V)
        u = _load(
            teacher_row_ptr, start, V, width, teacher_scale, teacher_softcap, float("-inf"), TEACHER_SOFTCAP, BLOCK_V
        )
        if STATS:
            block_top = tl.max(z, 0)
            cols = start + tl.arange(0, BLOCK_V)
            first = tl.min(tl.where(z == block_top, cols, 2147483647), 0)
            best = tl.where(block_top > top, first, best)
        if TEMPERED:
            if LABELS:
                top, plain_total = _accumulate(z, top, plain_total)
            tempered_top, total = _accumulate(z * per_temperature, tempered_top, total)
            teacher_top, teacher_total = _accumulate(u * per_temperature, teacher_top, teacher_total)
        else:
            top, total = _accumulate(z, top, total)
            teacher_top, teacher_total = _accumulate(u, teacher_top, teacher_total)
    if not TEMPERED:
        tempered_top = top
        plain_total = total
    log_total = tl.log(total)
    log_teacher_total = tl.log(teacher_total)
    if LABELS:
        label = tl.load(labels_ptr + row)
        # Read before this program overwrites it.
        z_label = score(tl.load(row_ptr + label), logit_scale, softcap, SOFTCAP)
        tl.store(nll_ptr + row, tl.log(plain_total) + (top - z_label))
    else:
        label = -1
    if STATS:
        tl.store(correct_ptr + row, best == label)
    weight = logit_scale
    if WEIGHTS:
        weight *= tl.load(weights_ptr + row)
    soft_weight = weight * (1.0 - alpha) * per_temperature
    hard_weight = weight * alpha
    divergence = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    if KIND != _FORWARD:
        for start in range(0, V, BLOCK_V):
            inside = start + tl.arange(0, BLOCK_V) < V
            z = _load(row_ptr, start, V, width, logit_scale, softcap, 0.0, SOFTCAP, BLOCK_V)
            u = _load(teacher_row_ptr, start, V, width, teacher_scale, teacher_softcap, 0.0, TEACHER_SOFTCAP, BLOCK_V)
            log_p = (z * per_temperature - tempered_top) - log_total
            log_q = (u * per_temperature - teacher_top) - log_teacher_total
            p = tl.exp(log_p)
            ratio = _log_ratio(log_p, log_q, inside, KIND, BARRED)
            if KIND == _REVERSE:
                mean -= tl.sum(p * ratio, 0)
            else:
                log_m_over_p = _log_m_over_p(ratio, beta)
                mean -= (1.0 - beta) * tl.sum(p * log_m_over_p, 0)
                divergence += beta * tl.sum(tl.exp(log_q) * (ratio - log_m_over_p), 0)
        divergence += mean
    if GRADIENT or KIND == _FORWARD:
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            inside = cols < V
            z = _load(row_ptr, start, V, width, logit_scale, softcap, 0.0, SOFTCAP, BLOCK_V)
            u = _load(teacher_row_ptr, start, V, width, teacher_scale, teacher_softcap, 0.0, TEACHER_SOFTCAP, BLOCK_V)
            log_p = (z * per_temperature - tempered_top) - log_total
            log_q = (u * per_temperature - teacher_top) - log_teacher_total
            p = tl.exp(log_p)
            ratio = _log_ratio(log_p, log_q, inside, KIND, BARRED)
            if KIND == _FORWARD:
                q = tl.exp(log_q)
                divergence += tl.sum(q * ratio, 0)
                grad = p - q
            elif KIND == _REVERSE:
                grad = p * (-ratio - mean)
            else:
                grad = p * ((beta - 1.0) * _log_m_over_p(ratio, beta) - mean)
            if GRADIENT:
                grad *= soft_weight
                if LABELS:
                    plain = tl.exp(z - top) / plain_total
                    grad += hard_weight * tl.where(cols == label, plain - 1.0, plain)
                if SOFTCAP:
                    t = z / softcap
                    grad *= 1.0 - t * t
                tl.store(row_ptr + cols, grad.to(logits_ptr.dtype.element_ty), mask=cols < width)
    tl.store(divergence_ptr + row, divergence)


_BLOCK, _WARPS = 2048, 8


def launch(
    logits_NV: Tensor,
    teacher_NV: Tensor,
    labels_N: Tensor,
    divergence_N: Tensor,
    chip: Chip,
    *,
    token_weights_N: Tensor | None = None,
    nll_N: Tensor | None = None,
    correct_N: Tensor | None = None,
    wants_gradient: bool = True,
    has_barred: bool = False,
    beta: float = 0.0,
    temperature: float = 1.0,
    alpha: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
) -> Launch:
    """Return what fills the given outputs, and the gradient over `logits_NV` if it is wanted.

    Tensors and flags are those of `sftx_kernels.linear_kl.LogitRows`, numbers those of its `Formula`.
    """
    num_rows, V = logits_NV.shape
    width = min(logits_NV.stride(0), teacher_NV.stride(0), -(-V // 16) * 16) if num_rows else V
    kind = _FORWARD if beta == 0 else _REVERSE if beta == 1 else _JSD
    arguments: Arguments = {
        "logits_ptr": logits_NV,
        "teacher_ptr": teacher_NV,
        "labels_ptr": labels_N,
        "weights_ptr": token_weights_N,
        "divergence_ptr": divergence_N,
        "nll_ptr": nll_N,
        "correct_ptr": correct_N,
        "stride_row": logits_NV.stride(0),
        "stride_teacher": teacher_NV.stride(0),
        "V": V,
        "width": width,
        "logit_scale": float(logit_scale),
        "softcap": float(softcap or 1.0),
        "teacher_scale": float(teacher_logit_scale),
        "teacher_softcap": float(teacher_softcap or 1.0),
        "per_temperature": 1.0 / temperature,
        "beta": float(beta),
        "alpha": float(alpha),
    }
    constants = {
        "WEIGHTS": token_weights_N is not None,
        "GRADIENT": wants_gradient,
        "KIND": kind.value,
        "LABELS": nll_N is not None,
        "STATS": correct_N is not None,
        "SOFTCAP": softcap is not None,
        "TEACHER_SOFTCAP": teacher_softcap is not None,
        "TEMPERED": temperature != 1,
        "BARRED": has_barred,
        "BLOCK_V": min(_BLOCK, triton.next_power_of_2(V)),
    }
    # Logits of both are read once and the gradient is written once; some 12 operations an element.
    passes = 2 + wants_gradient
    per_row = labels_N.element_size() + 2 * divergence_N.element_size()
    work = Work(6 * passes * num_rows * V, num_rows * (passes * V * logits_NV.element_size() + per_row))
    return Launch(row_kernel, num_rows, arguments, constants, _WARPS, 2, work)


def shipped(chip: Chip) -> Iterator[tuple[str, Launch]]:
    """Yield the static report's configurations: the divergences at the heads of real models."""
    gemma: dict[str, Any] = {
        "softcap": 30.0, "logit_scale": 0.5, "teacher_softcap": 30.0, "alpha": 0.5, "temperature": 2.0
    }  # fmt: skip
    for V, num_rows in ((32000, 2048), (50257, 2048), (151936, 2048)):
        for name, beta in (("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5)):
            yield _named(name, torch.bfloat16, num_rows, V, chip, beta=beta)
    for name, beta in (("forward", 0.0), ("jsd", 0.5)):
        yield _named(name, torch.float32, 2048, 151936, chip, beta=beta)
        yield _named(f"{name}+everything", torch.bfloat16, 2048, 256000, chip, beta=beta, stats=True, **gemma)
    yield _named("forward+evaluation", torch.bfloat16, 2048, 151936, chip, stats=True, wants_gradient=False)


def _named(
    form: str, dtype: torch.dtype, num_rows: int, V: int, chip: Chip, *, stats: bool = False, **numbers: Any
) -> tuple[str, Launch]:
    row_stride = -(-V // 16) * 16
    logits_NV, teacher_NV = (torch.empty(num_rows, row_stride, dtype=dtype, device="meta")[:, :V] for _ in range(2))
    row_N = torch.empty(num_rows, device="meta")
    one = launch(
        logits_NV, teacher_NV, torch.empty(num_rows, dtype=torch.int64, device="meta"), row_N, chip,
        token_weights_N=row_N, nll_N=row_N if stats else None,
        correct_N=torch.empty(num_rows, dtype=torch.bool, device="meta") if stats else None, **numbers,
    )  # fmt: skip
    return f"linear_kl/row/{str(dtype)[6:]}/V={V}/rows={num_rows}/{form}", one
