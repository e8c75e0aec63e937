"""This kernel dequantises NF4 codes and scales, which may be quantised too, to a dense weight in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftx_kernels.triton.launch import Chip, Launch, Work


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    nested_levels_ptr,
    levels_ptr,
    out_ptr,
    num_codes,
    HALF_BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_codes
    codes = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    # The 16 levels are half a cache line, so a warp's lookups are one access; so are those of the scales.
    block = offsets // HALF_BLOCK
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED_BLOCK:
        level = tl.load(nested_levels_ptr + absmax.to(tl.int32))
        absmax = level * tl.load(nested_absmax_ptr + block // NESTED_BLOCK, mask=mask, other=0.0) + tl.load(offset_ptr)
    high = tl.load(levels_ptr + (codes >> 4)) * absmax
    low = tl.load(levels_ptr + (codes & 15)) * absmax
    values = tl.reshape(tl.join(high, low), (2 * BLOCK,))
    places = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + places, values.to(out_ptr.dtype.element_ty), mask=places < 2 * num_codes)


def dequantize_launch(
    codes: Tensor,
    scales: Sequence[Tensor],
    levels: Tensor,
    out: Tensor,
    nested_levels: Tensor | None = None,
    nested_block_size: int = 0,
) -> Launch:
    """Launch out = levels[code] * absmax, high nibble first; `out` is contiguous, with two elements for each code.

    `scales` are those of `NF4Weight`; the last two arguments belong to doubly quantised ones.
    """
    block = 2048  # 16 bytes of codes for each thread
    absmax, (nested_absmax, offset) = scales[0], scales[1:] or (None, None)
    num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in (codes, *scales, out))
    multiplications = out.numel() if nested_absmax is None else out.numel() + 2 * absmax.numel()
    return Launch(
        _dequantize_kernel,
        triton.cdiv(codes.numel(), block),
        {
            "codes_ptr": codes,
            "absmax_ptr": absmax,
            "nested_absmax_ptr": nested_absmax,
            "offset_ptr": offset,
            "nested_levels_ptr": nested_levels,
            "levels_ptr": levels,
            "out_ptr": out,
            "num_codes": codes.numel(),
        },
        {
            "HALF_BLOCK": codes.numel() // max(1, absmax.numel()),
            "NESTED_BLOCK": nested_block_size,
            "BLOCK": block,
        },
        num_warps=4,
        num_stages=1,
        fuses=False,  # so that a doubly quantised absmax has the bits that plain torch gives it
        work=Work(multiplications, num_bytes),
    )


def shipped(chip: Chip) -> Iterator[tuple[str, Launch]]:
    """Yield the static report's configurations: Llama-3 8B's largest layer."""
    shape, device = (14336, 4096), "meta"
    codes = torch.empty(shape[0] * shape[1] // 2, dtype=torch.uint8, device=device)
    num_blocks = 2 * codes.numel() // 64
    absmax = torch.empty(num_blocks, device=device)
    nested = (
        torch.empty(num_blocks, dtype=torch.uint8, device=device),
        torch.empty(num_blocks // 256, device=device),
        torch.empty((), device=device),
    )
    levels, nested_levels = torch.empty(16, device=device), torch.empty(256, device=device)
    for double in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            out = torch.empty(shape, dtype=dtype, device=device)
            if double:
                launch = dequantize_launch(codes, nested, levels, out, nested_levels, 256)
            else:
                launch = dequantize_launch(codes, (absmax,), levels, out)
            kind = "dequantize-double" if double else "dequantize"
            yield f"nf4/{kind}/{str(dtype)[6:]}/{shape[0]}x{shape[1]}", launch
