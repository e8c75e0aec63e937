"""These functions compute matrix products in the dtype that is fastest on the processor.

A CPU without bf16 instructions multiplies bf16 matrices through scalar-like paths: 45 GFLOP/s where fp32 reaches 130
(2 cores with AVX-512 but no avx512_bf16, torch 2.13). There the product of half-precision matrices is computed in
fp32, which is also more exact; operands are converted a slab at a time, so that the head is never copied in full.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# A slab of a weight has this many elements, 2 MB in fp32. On the CPU above, 2 to 16 MB made no difference.
_SLAB_ELEMENTS = 1 << 19


def project(x_MK: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return x W^T + b, [M, O] in the dtype of x, written to `out` if given. All tensors have one dtype."""
    if not widens(x_MK):
        if out is None:
            return F.linear(x_MK, weight_OK, bias_O)
        if bias_O is None:
            return torch.mm(x_MK, weight_OK.T, out=out)
        return torch.addmm(bias_O, x_MK, weight_OK.T, out=out)
    y_MO = x_MK.new_empty(x_MK.shape[0], weight_OK.shape[0]) if out is None else out
    wide_MK = x_MK.float()
    for slab in _slabs(weight_OK):
        part_MS = wide_MK @ weight_OK[slab].float().T
        y_MO[:, slab] = part_MS if bias_O is None else part_MS.add_(bias_O[slab])
    return y_MO


def project_back(dy_MO: Tensor, weight_OK: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return dY W, [M, K] in the dtype of dY, written to `out` if given. Both tensors have one dtype."""
    if not widens(dy_MO):
        return torch.mm(dy_MO, weight_OK, out=out)
    sum_MK = dy_MO.new_zeros(dy_MO.shape[0], weight_OK.shape[1], dtype=torch.float32)
    for slab in _slabs(weight_OK):
        sum_MK.addmm_(dy_MO[:, slab].float(), weight_OK[slab].float())
    return sum_MK.to(dy_MO.dtype) if out is None else out.copy_(sum_MK)


def add_product_(sum_MO: Tensor, a_MR: Tensor, b_RO: Tensor, alpha: float) -> Tensor:
    """Compute sum += alpha a b, whose inner dimension is small, and return the sum. All tensors have one dtype."""
    if widens(sum_MO):
        return sum_MO.add_(a_MR.float() @ b_RO.float(), alpha=alpha)
    return sum_MO.addmm_(a_MR, b_RO, alpha=alpha)


def add_weight_gradient_(sum_OK: Tensor, dy_MO: Tensor, x_MK: Tensor) -> None:
    """Compute sum_OK += dY^T x, accumulated in the dtype of the sum, which may be wider than the operands."""
    if sum_OK.dtype == x_MK.dtype:
        sum_OK.addmm_(dy_MO.T, x_MK)
    elif sum_OK.is_cuda and torch.version.hip is None:
        torch.addmm(sum_OK, dy_MO.T, x_MK, out_dtype=sum_OK.dtype, out=sum_OK)
    else:
        wide_MK = x_MK.float() if widens(x_MK) else x_MK
        for slab in _slabs(sum_OK):
            sum_OK[slab].add_(dy_MO[:, slab].T.to(wide_MK.dtype) @ wide_MK)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums and losses of numbers of `dtype` are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widens(like: Tensor) -> bool:
    """Return True if products of tensors like this one are computed in fp32 (see `multiplies_natively`)."""
    return not multiplies_natively(like.device.type, like.dtype)


def multiplies_natively(device_type: str, dtype: torch.dtype) -> bool:
    """Return True if the device has instructions for products in `dtype`; every device but the CPU is assumed to."""
    return device_type != "cpu" or cpu_multiplies(dtype)


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Return True if this CPU has instructions for products in `dtype`."""
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512"):
        return True  # not an x86, the only kind whose instruction set is queried here
    if dtype == torch.bfloat16:
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    return True


def _slabs(weight_OK: Tensor) -> Iterator[slice]:
    step = max(1, _SLAB_ELEMENTS // max(1, weight_OK.shape[1]))
    return (slice(start, start + step) for start in range(0, weight_OK.shape[0], step))
