"""This kernel dequantises NF4 codes and scales to a dense weight, in one pass over both."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftx_kernels.triton.launch import Chip, Launch, Work


@triton.jit
def _dequantize_kernel(
    codes_ptr, absmax_ptr, levels_ptr, out_ptr, num_codes, HALF_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_codes
    codes = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    # The 16 levels are half a cache line, so a warp's lookups are one access; so are those of the scales.
    absmax = tl.load(absmax_ptr + offsets // HALF_BLOCK, mask=mask, other=0.0)
    high = tl.load(levels_ptr + (codes >> 4)) * absmax
    low = tl.load(levels_ptr + (codes & 15)) * absmax
    values = tl.reshape(tl.join(high, low), (2 * BLOCK,))
    places = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + places, values.to(out_ptr.dtype.element_ty), mask=places < 2 * num_codes)


def dequantize_launch(codes: Tensor, absmax: Tensor, levels: Tensor, out: Tensor) -> Launch:
    """Launch out = levels[code] * absmax, high nibble first; `out` is contiguous, with two elements for each code."""
    block = 2048  # 16 bytes of codes for each thread
    sizes = codes.numel() + absmax.numel() * 4 + out.numel() * out.itemsize
    return Launch(
        _dequantize_kernel,
        triton.cdiv(codes.numel(), block),
        {"codes_ptr": codes, "absmax_ptr": absmax, "levels_ptr": levels, "out_ptr": out, "num_codes": codes.numel()},
        {"HALF_BLOCK": codes.numel() // max(1, absmax.numel()), "BLOCK": block},
        num_warps=4,
        num_stages=1,
        work=Work(out.numel(), sizes),
    )


def shipped(chip: Chip) -> Iterator[tuple[str, Launch]]:
    """Yield the static report's configurations: Llama-3 8B's largest layer."""
    shape, device = (14336, 4096), "meta"
    codes = torch.empty(shape[0] * shape[1] // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(2 * codes.numel() // 64, device=device)
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.empty(shape, dtype=dtype, device=device)
        launch = dequantize_launch(codes, absmax, torch.empty(16, device=device), out)
        yield f"nf4/dequantize/{str(dtype)[6:]}/{shape[0]}x{shape[1]}", launch
