"""These kernels compute the cross-entropy loss, its statistics and its gradient from rows of logits.

A program processes a row: it scans it once, online (Milakov and Gimelshein, arXiv:1805.02867), for the maximum, the sum
of exponentials and the statistics, then reads it again for the gradient. The second reading comes from the L2 cache as
far as the rows in flight fit it; a row that fits the registers of one program (`ONE_BLOCK`) is read once. Where there
are fewer rows than the chip has room for, several programs share a row: one launch scans, a second one writes.

The formula is that of `sftx_kernels.cross_entropy`. All arithmetic is fp32. Offsets into the logits are int64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftx_kernels.triton.launch import Arguments, Chip, Launch, Work

LOWEST = tl.constexpr(-3.0e38)  # finite, so that lowest - lowest is 0


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) loses its digits near 0, where the series (to x^9) has them.
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = a * (1.0 + s * (-0.33333334 + s * (0.13333334 + s * (-0.053968254 + s * 0.021869488))))
    t = tl.where(a < 0.25, near, far)
    return tl.where(x < 0, -t, t)


@triton.jit
def score(raw, logit_scale, softcap, SOFTCAP: tl.constexpr):
    z = raw.to(tl.float32) * logit_scale
    if SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _accumulate(z, cols, inside, top, total, z_sum, ez_sum, best, SMOOTHING: tl.constexpr, STATS: tl.constexpr):
    """Update the running sums of a row with a block of scores, which are -inf where not `inside`."""
    block_top = tl.max(z, 0)
    if STATS:
        first = tl.min(tl.where(z == block_top, cols, 2147483647), 0)
        best = tl.where(block_top > top, first, best)
    new_top = tl.maximum(top, block_top)
    shrink = tl.exp(top - new_top)
    from_top = z - new_top
    e = tl.exp(from_top)
    if STATS:  # sum of e * (z - top), which moves with the top
        ez_sum = shrink * (ez_sum + (top - new_top) * total) + tl.sum(e * tl.where(e > 0, from_top, 0.0), 0)
    if SMOOTHING:
        z_sum += tl.sum(tl.where(inside, z, 0.0), 0)
    return new_top, total * shrink + tl.sum(e, 0), z_sum, ez_sum, best


@triton.jit
def _scan(
    row_ptr, begin, end, logit_scale, softcap,
    SMOOTHING: tl.constexpr, STATS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Return (top, total, z_sum, ez_sum, best) of columns begin to end. Full blocks have no mask: loads stay wide."""
    top = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    z_sum = tl.full((), 0.0, tl.float32)
    ez_sum = tl.full((), 0.0, tl.float32)
    best = tl.full((), 0, tl.int32)
    full_end = begin + (end - begin) // BLOCK_V * BLOCK_V
    for start in range(begin, full_end, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = score(tl.load(row_ptr + cols), logit_scale, softcap, SOFTCAP)
        top, total, z_sum, ez_sum, best = _accumulate(
            z, cols, cols < end, top, total, z_sum, ez_sum, best, SMOOTHING, STATS
        )
    if full_end < end:
        cols = full_end + tl.arange(0, BLOCK_V)
        inside = cols < end
        z = score(tl.load(row_ptr + cols, mask=inside, other=0.0), logit_scale, softcap, SOFTCAP)
        z = tl.where(inside, z, float("-inf"))
        top, total, z_sum, ez_sum, best = _accumulate(
            z, cols, inside, top, total, z_sum, ez_sum, best, SMOOTHING, STATS
        )
    return top, total, z_sum, ez_sum, best


@triton.jit
def _slope(z, cols, label, top, total, lse, weight, logit_scale, softcap, smoothing, z_loss, V, SOFTCAP: tl.constexpr):
    """Return d loss / d raw logit.

    exp(z - lse) would lose as many digits as the lse has before its point. At the label, numbers close to 1 cancel, so
    the z-loss's small part is added last.
    """
    p = tl.exp(z - top) / total
    grad = p - smoothing / V
    grad = tl.where(cols == label, grad - (1.0 - smoothing), grad)
    grad = (weight * logit_scale) * (grad + (2.0 * z_loss * lse) * p)
    if SOFTCAP:
        t = z / softcap
        grad *= 1.0 - t * t
    return grad


@triton.jit
def _write_gradient(
    row_ptr, grad_ptr, begin, end, label, top, total, lse, weight, logit_scale, softcap, smoothing, z_loss, V,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    full_end = begin + (end - begin) // BLOCK_V * BLOCK_V
    for start in range(begin, full_end, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = score(tl.load(row_ptr + cols), logit_scale, softcap, SOFTCAP)
        grad = _slope(z, cols, label, top, total, lse, weight, logit_scale, softcap, smoothing, z_loss, V, SOFTCAP)
        tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty))
    if full_end < end:
        cols = full_end + tl.arange(0, BLOCK_V)
        inside = cols < end
        z = score(tl.load(row_ptr + cols, mask=inside, other=0.0), logit_scale, softcap, SOFTCAP)
        grad = _slope(z, cols, label, top, total, lse, weight, logit_scale, softcap, smoothing, z_loss, V, SOFTCAP)
        tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _write_zeros(grad_ptr, begin, end, BLOCK_V: tl.constexpr):
    for start in range(begin, end, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        tl.store(grad_ptr + cols, tl.zeros((BLOCK_V,), grad_ptr.dtype.element_ty), mask=cols < end)


@triton.jit
def _write_loss(
    row, top, total, z_sum, ez_sum, best, z_label, label, weight, smoothing, z_loss, V,
    loss_ptr, lse_ptr, entropy_ptr, correct_ptr, SMOOTHING: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Write the loss of a row and its statistics, and return the lse.

    The loss is computed from z - top, so that a small loss keeps its digits.
    """
    log_total = tl.log(total)
    lse = top + log_total
    loss = log_total + (1.0 - smoothing) * (top - z_label) + z_loss * lse * lse
    if SMOOTHING:
        loss += smoothing * (top - z_sum / V)
    tl.store(loss_ptr + row, loss * weight)
    tl.store(lse_ptr + row, lse)
    if STATS:
        tl.store(entropy_ptr + row, log_total - ez_sum / total)
        tl.store(correct_ptr + row, best == label)
    return lse


@triton.jit
def _write_ignored(row, loss_ptr, lse_ptr, entropy_ptr, correct_ptr, STATS: tl.constexpr):
    tl.store(loss_ptr + row, 0.0)
    tl.store(lse_ptr + row, 0.0)
    if STATS:
        tl.store(entropy_ptr + row, 0.0)
        tl.store(correct_ptr + row, False)


@triton.jit
def row_kernel(
    logits_ptr, grad_ptr, labels_ptr, weights_ptr, loss_ptr, lse_ptr, entropy_ptr, correct_ptr,
    stride_row, stride_grad, V, ignore_index, logit_scale, softcap, smoothing, z_loss,
    WEIGHTS: tl.constexpr, GRADIENT: tl.constexpr, SCAN: tl.constexpr, SMOOTHING: tl.constexpr, STATS: tl.constexpr,
    SOFTCAP: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute one row in each program. Without SCAN the lse is an input and only the gradient is computed."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        if SCAN:
            _write_ignored(row, loss_ptr, lse_ptr, entropy_ptr, correct_ptr, STATS)
        if GRADIENT:
            _write_zeros(grad_ptr + row * stride_grad, 0, V, BLOCK_V)
        return
    weight = 1.0
    if WEIGHTS:
        weight = tl.load(weights_ptr + row)
    if ONE_BLOCK:
        cols = tl.arange(0, BLOCK_V)
        inside = cols < V
        raw = tl.load(row_ptr + cols, mask=inside, other=0.0)
    if SCAN:
        # Read before this program may overwrite it.
        z_label = score(tl.load(row_ptr + label), logit_scale, softcap, SOFTCAP)
        if ONE_BLOCK:
            top = tl.full((), LOWEST, tl.float32)
            zero = tl.full((), 0.0, tl.float32)
            z = tl.where(inside, score(raw, logit_scale, softcap, SOFTCAP), float("-inf"))
            top, total, z_sum, ez_sum, best = _accumulate(
                z, cols, inside, top, zero, zero, zero, tl.full((), 0, tl.int32), SMOOTHING, STATS
            )
        else:
            top, total, z_sum, ez_sum, best = _scan(
                row_ptr, 0, V, logit_scale, softcap, SMOOTHING, STATS, SOFTCAP, BLOCK_V
            )
        lse = _write_loss(
            row, top, total, z_sum, ez_sum, best, z_label, label, weight, smoothing, z_loss, V,
            loss_ptr, lse_ptr, entropy_ptr, correct_ptr, SMOOTHING, STATS,
        )  # fmt: skip
    else:
        lse = tl.load(lse_ptr + row)
        top = lse
        total = 1.0
    if GRADIENT:
        if ONE_BLOCK:
            z = score(raw, logit_scale, softcap, SOFTCAP)
            grad = _slope(z, cols, label, top, total, lse, weight, logit_scale, softcap, smoothing, z_loss, V, SOFTCAP)
            tl.store(grad_ptr + row * stride_grad + cols, grad.to(grad_ptr.dtype.element_ty), mask=inside)
        else:
            _write_gradient(
                row_ptr, grad_ptr + row * stride_grad, 0, V, label, top, total, lse, weight, logit_scale, softcap,
                smoothing, z_loss, V, SOFTCAP, BLOCK_V,
            )  # fmt: skip


@triton.jit
def scan_kernel(
    logits_ptr, labels_ptr, partial_ptr, best_ptr, z_label_ptr, stride_row, V, ignore_index, logit_scale, softcap,
    SMOOTHING: tl.constexpr, STATS: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Scan SPAN columns of a row in each of SPLITS programs, and store the sums in partial_ptr [rows, 4, SPLITS]."""
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        return
    row_ptr = logits_ptr + row * stride_row
    begin = split * SPAN
    end = tl.minimum(begin + SPAN, V)
    if (label >= begin) & (label < end):
        tl.store(z_label_ptr + row, score(tl.load(row_ptr + label), logit_scale, softcap, SOFTCAP))
    top, total, z_sum, ez_sum, best = _scan(
        row_ptr, begin, end, logit_scale, softcap, SMOOTHING, STATS, SOFTCAP, BLOCK_V
    )
    at = partial_ptr + row * (4 * SPLITS) + split
    tl.store(at, top)
    tl.store(at + SPLITS, total)
    tl.store(at + 2 * SPLITS, z_sum)
    tl.store(at + 3 * SPLITS, ez_sum)
    tl.store(best_ptr + row * SPLITS + split, best)


@triton.jit
def split_kernel(
    logits_ptr, grad_ptr, labels_ptr, weights_ptr, partial_ptr, best_ptr, z_label_ptr,
    loss_ptr, lse_ptr, entropy_ptr, correct_ptr,
    stride_row, stride_grad, V, ignore_index, logit_scale, softcap, smoothing, z_loss,
    WEIGHTS: tl.constexpr, GRADIENT: tl.constexpr, SMOOTHING: tl.constexpr, STATS: tl.constexpr,
    SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Combine the sums of all scans of a row and write the gradient of this program's columns."""
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    label = tl.load(labels_ptr + row)
    begin = split * SPAN
    end = tl.minimum(begin + SPAN, V)
    if label == ignore_index:
        if split == 0:
            _write_ignored(row, loss_ptr, lse_ptr, entropy_ptr, correct_ptr, STATS)
        if GRADIENT:
            _write_zeros(grad_ptr + row * stride_grad, begin, end, BLOCK_V)
        return
    weight = 1.0
    if WEIGHTS:
        weight = tl.load(weights_ptr + row)
    splits = tl.arange(0, SPLITS)
    at = partial_ptr + row * (4 * SPLITS) + splits
    tops = tl.load(at)
    top = tl.max(tops, 0)
    shrink = tl.exp(tops - top)
    totals = tl.load(at + SPLITS)
    total = tl.sum(totals * shrink, 0)
    z_sum = tl.sum(tl.load(at + 2 * SPLITS), 0)
    ez_sum = tl.sum(shrink * (tl.load(at + 3 * SPLITS) + (tops - top) * totals), 0)
    bests = tl.load(best_ptr + row * SPLITS + splits)
    best = tl.min(tl.where(tops == top, bests, 2147483647), 0)
    # All programs of a row write the same values, so their order does not matter.
    lse = _write_loss(
        row, top, total, z_sum, ez_sum, best, tl.load(z_label_ptr + row), label, weight, smoothing, z_loss, V,
        loss_ptr, lse_ptr, entropy_ptr, correct_ptr, SMOOTHING, STATS,
    )  # fmt: skip
    if GRADIENT:
        _write_gradient(
            logits_ptr + row * stride_row, grad_ptr + row * stride_grad, begin, end, label, top, total, lse, weight,
            logit_scale, softcap, smoothing, z_loss, V, SOFTCAP, BLOCK_V,
        )  # fmt: skip


@triton.jit
def scale_kernel(grad_ptr, factor_ptr, stride_row, stride_factor, V, BLOCK_V: tl.constexpr):
    """Multiply each row by its factor, one program for each row; a row whose factor is 1 is not touched."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row * stride_factor)
    if factor == 1.0:
        return
    row_ptr = grad_ptr + row * stride_row
    full_end = V // BLOCK_V * BLOCK_V
    for start in range(0, full_end, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        grad = tl.load(row_ptr + cols).to(tl.float32) * factor
        tl.store(row_ptr + cols, grad.to(grad_ptr.dtype.element_ty))
    if full_end < V:
        cols = full_end + tl.arange(0, BLOCK_V)
        inside = cols < V
        grad = tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(row_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=inside)


# A row up to this long is held in registers: 32 fp32 numbers a thread, two programs a multiprocessor.
_ONE_BLOCK = 16384
_BLOCK, _WARPS = 4096, 8
# Programs share a row where one program for each row would leave most of the chip idle.
_PROGRAMS_PER_SM, _BLOCKS_PER_SPLIT = 2, 2


def num_splits(num_rows: int, V: int, chip: Chip) -> int:
    """Return how many programs share a row, a power of two."""
    room = _PROGRAMS_PER_SM * chip.num_sms // max(1, num_rows)
    most = V // (_BLOCKS_PER_SPLIT * _BLOCK)
    return max(1, 1 << max(0, min(room, most).bit_length() - 1))


def launches(
    logits_NV: Tensor,
    labels_N: Tensor,
    lse_N: Tensor,
    chip: Chip,
    *,
    token_weights_N: Tensor | None = None,
    loss_N: Tensor | None = None,
    entropy_N: Tensor | None = None,
    correct_N: Tensor | None = None,
    grad_NV: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = None,
    splits: int | None = None,
) -> list[Launch]:
    """Return what fills the given outputs: one launch, or two where programs share a row.

    Tensors are those of `sftx_kernels.cross_entropy.LogitRows`, numbers those of its `Formula`. `splits` overrides
    `num_splits`.
    """
    num_rows, V = logits_NV.shape
    splits = num_splits(num_rows, V, chip) if splits is None else splits
    scan_numbers: Arguments = {
        "V": V,
        "ignore_index": -1 if ignore_index is None else ignore_index,
        "logit_scale": float(logit_scale),
        "softcap": float(softcap or 1.0),
    }
    numbers: Arguments = {**scan_numbers, "smoothing": float(label_smoothing), "z_loss": float(z_loss)}
    tensors: Arguments = {
        "logits_ptr": logits_NV,
        "grad_ptr": grad_NV,
        "labels_ptr": labels_N,
        "weights_ptr": token_weights_N,
        "loss_ptr": loss_N,
        "lse_ptr": lse_N,
        "entropy_ptr": entropy_N,
        "correct_ptr": correct_N,
        "stride_row": logits_NV.stride(0),
        "stride_grad": 0 if grad_NV is None else grad_NV.stride(0),
    }
    flags = {"SMOOTHING": label_smoothing > 0, "STATS": entropy_N is not None, "SOFTCAP": softcap is not None}
    writes = {"WEIGHTS": token_weights_N is not None, "GRADIENT": grad_NV is not None}
    # Logits are read once and their gradient written once; some 8 operations an element.
    passes = 1 + (grad_NV is not None)
    per_row = labels_N.element_size() + 2 * lse_N.element_size()
    work = Work(4 * passes * num_rows * V, num_rows * (passes * V * logits_NV.element_size() + per_row))
    if splits == 1 or loss_N is None:
        block = triton.next_power_of_2(V)
        one_block = block <= _ONE_BLOCK and V % 16 == 0
        warps = max(1, min(16, block // 1024)) if one_block else _WARPS
        block_size = block if one_block else min(_BLOCK, block)
        constants = {**writes, "SCAN": loss_N is not None, **flags, "ONE_BLOCK": one_block, "BLOCK_V": block_size}
        return [Launch(row_kernel, num_rows, _in_order(row_kernel, tensors, numbers), constants, warps, 2, work)]
    partials: Arguments = {
        "partial_ptr": lse_N.new_empty(num_rows, 4, splits),
        "best_ptr": labels_N.new_empty(num_rows, splits, dtype=torch.int32),
        "z_label_ptr": lse_N.new_empty(num_rows),
    }
    span = triton.cdiv(triton.cdiv(V, splits), _BLOCK) * _BLOCK
    constants = {**flags, "SPLITS": splits, "SPAN": span, "BLOCK_V": _BLOCK}
    scan_work = Work(4 * num_rows * V, num_rows * V * logits_NV.element_size())
    scan = _in_order(scan_kernel, tensors, partials, scan_numbers)
    split = _in_order(split_kernel, tensors, partials, numbers)
    return [
        Launch(scan_kernel, num_rows * splits, scan, constants, _WARPS, 2, scan_work),
        Launch(split_kernel, num_rows * splits, split, {**writes, **constants}, _WARPS, 2, work),
    ]


def _in_order(kernel: Any, *arguments: Arguments) -> Arguments:
    """Return those of the arguments that a kernel has, in its order."""
    merged: Arguments = {name: value for part in arguments for name, value in part.items()}
    return {name: merged[name] for name in kernel.arg_names if name in merged}


def scale_launch(grad_NV: Tensor, factor_N: Tensor) -> Launch:
    """Launch grad_NV *= factor_N[:, None], in place."""
    num_rows, V = grad_NV.shape
    arguments: Arguments = {
        "grad_ptr": grad_NV,
        "factor_ptr": factor_N,
        "stride_row": grad_NV.stride(0),
        "stride_factor": factor_N.stride(0),
        "V": V,
    }
    work = Work(num_rows * V, 2 * num_rows * V * grad_NV.element_size())
    return Launch(scale_kernel, num_rows, arguments, {"BLOCK_V": _BLOCK}, _WARPS, 2, work)


def shipped(chip: Chip) -> Iterator[tuple[str, Launch]]:
    """Yield the static report's configurations: the forms that real heads lead to."""
    gemma: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "logit_scale": 0.5}
    for dtype in (torch.bfloat16, torch.float32):
        for V, num_rows in ((1024, 8192), (16384, 4096), (32000, 8192), (50257, 4096), (128256, 2048), (128256, 16)):
            yield from _named(dtype, num_rows, V, chip)
    yield from _named(torch.float16, 2048, 128256, chip)
    yield from _named(torch.bfloat16, 2048, 256000, chip, stats=True, **gemma)
    yield from _named(torch.bfloat16, 2048, 128256, chip, gradient=False, stats=True)
    yield from _named(torch.bfloat16, 2048, 128256, chip, scan=False)
    grad_NV = torch.empty(8192, 32000, dtype=torch.bfloat16, device="meta")
    yield "cross_entropy/scale/bfloat16/V=32000/rows=8192", scale_launch(grad_NV, torch.empty(8192, device="meta"))


def _named(
    dtype: torch.dtype, num_rows: int, V: int, chip: Chip, *, gradient: bool = True, stats: bool = False,
    scan: bool = True, **numbers: Any,
) -> Iterator[tuple[str, Launch]]:  # fmt: skip
    row_stride = -(-V // 16) * 16  # as linear_cross_entropy allocates its logits
    logits_NV = torch.empty(num_rows, row_stride, dtype=dtype, device="meta")[:, :V]
    row_N = torch.empty(num_rows, device="meta")
    parts = {"scan": scan, "gradient": gradient, "stats": stats, "softcap": "softcap" in numbers}
    form = "+".join(name for name, is_on in parts.items() if is_on)
    for launch in launches(
        logits_NV, torch.empty(num_rows, dtype=torch.int64, device="meta"), row_N, chip,
        token_weights_N=row_N, loss_N=row_N if scan else None, entropy_N=row_N if stats else None,
        correct_N=torch.empty(num_rows, dtype=torch.bool, device="meta") if stats else None,
        grad_NV=logits_NV if gradient else None, ignore_index=-100, **numbers,
    ):  # fmt: skip
        kernel = launch.kernel.__name__.removesuffix("_kernel")
        yield f"cross_entropy/{kernel}/{str(dtype)[6:]}/V={V}/rows={num_rows}/{form}", launch
