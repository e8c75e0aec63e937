"""These kernels compute `rms_norm`, whose formula is in `sftx_kernels.rms_norm`, and its gradients.

Forward is one launch with the addition of the residual and all casts: a program holds ROWS whole rows in registers, so
that each input is read once. Backward is one launch as well. Where the weight trains, a program processes several tiles
of rows and adds up its share of the weight's gradient in registers; the shares are summed afterwards, in a fixed order.

All arithmetic is fp32. Rows have no gaps; offsets are int64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftx_kernels.triton.launch import Arguments, Chip, Launch, Work


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr, num_rows, D, eps, weight_offset,
    RESIDUAL: tl.constexpr, CAST_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        h += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = h.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
        h = total.to(tl.float32)  # what is normalised is the rounded sum
    rstd = tl.rsqrt(tl.sum(h * h, 1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    hat = h * rstd[:, None]
    if CAST_FIRST:
        if RESIDUAL:
            hat = hat.to(total_ptr.dtype.element_ty).to(tl.float32)
        else:
            hat = hat.to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32) + weight_offset
    tl.store(y_ptr + at, (hat * weight[None, :]).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr, d_total_ptr, total_ptr, rstd_ptr, weight_ptr, dx_ptr, dw_ptr, num_rows, D, weight_offset,
    D_TOTAL: tl.constexpr, WEIGHT: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Process TILES tiles of ROWS rows; dw_ptr [programs, D] gets this program's share of the weight's gradient."""
    cols = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32) + weight_offset
    if WEIGHT:
        dw = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(TILES):
        rows = (tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
        at = rows[:, None] * D + cols[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        hat = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd[:, None]
        if WEIGHT:
            dw += tl.sum(dy * hat, 0)
        g = dy * weight[None, :]
        dx = rstd[:, None] * (g - hat * (tl.sum(g * hat, 1) / D)[:, None])
        if D_TOTAL:
            dx += tl.load(d_total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * D + cols, dw, mask=cols < D)


# A tile has at least this many elements: short rows, such as those of a head, share a program.
_TILE = 2048
_ELEMENTS_PER_WARP = 512  # 16 a thread: with 32 the backward spilled on sm_80
# Programs that add up a trained weight's gradient: each writes D fp32 numbers, which are read again.
_PROGRAMS_PER_SM = 2


def _tile(D: int) -> tuple[int, int, int]:
    """Return (ROWS, BLOCK_D, warps)."""
    block = triton.next_power_of_2(D)
    rows = max(1, _TILE // block)
    return rows, block, max(2, min(32, rows * block // _ELEMENTS_PER_WARP))


def forward_launch(
    x_ND: Tensor, residual_ND: Tensor | None, weight_D: Tensor, y_ND: Tensor, total_ND: Tensor | None, rstd_N: Tensor,
    *, eps: float, weight_offset: float, cast_before_weight: bool,
) -> Launch:  # fmt: skip
    num_rows, D = x_ND.shape
    rows, block, warps = _tile(D)
    arguments: Arguments = {
        "x_ptr": x_ND, "residual_ptr": residual_ND, "weight_ptr": weight_D, "y_ptr": y_ND, "total_ptr": total_ND,
        "rstd_ptr": rstd_N, "num_rows": num_rows, "D": D, "eps": eps, "weight_offset": weight_offset,
    }  # fmt: skip
    constants = {
        "RESIDUAL": residual_ND is not None, "CAST_FIRST": cast_before_weight, "ROWS": rows, "BLOCK_D": block
    }  # fmt: skip
    work = Work(
        (6 + (residual_ND is not None)) * num_rows * D, _bytes(x_ND, residual_ND, weight_D, y_ND, total_ND, rstd_N)
    )
    return Launch(forward_kernel, triton.cdiv(num_rows, rows), arguments, constants, warps, 1, work)


def backward_launch(
    dy_ND: Tensor, d_total_ND: Tensor | None, total_ND: Tensor, rstd_N: Tensor, weight_D: Tensor, dx_ND: Tensor,
    chip: Chip, *, weight_offset: float, wants_weight: bool,
) -> tuple[Launch, Tensor | None]:  # fmt: skip
    """Return the launch, and the shares of the weight's gradient [programs, D] that it fills, if wanted."""
    num_rows, D = dx_ND.shape
    rows, block, warps = _tile(D)
    num_tiles = triton.cdiv(num_rows, rows)
    tiles = triton.cdiv(num_tiles, _PROGRAMS_PER_SM * chip.num_sms) if wants_weight else 1
    tiles = triton.next_power_of_2(max(1, tiles))  # few values: each is compiled
    grid = triton.cdiv(num_tiles, tiles)
    dw_PD = dx_ND.new_empty(grid, D, dtype=torch.float32) if wants_weight else None
    arguments: Arguments = {
        "dy_ptr": dy_ND, "d_total_ptr": d_total_ND, "total_ptr": total_ND, "rstd_ptr": rstd_N, "weight_ptr": weight_D,
        "dx_ptr": dx_ND, "dw_ptr": dw_PD, "num_rows": num_rows, "D": D, "weight_offset": weight_offset,
    }  # fmt: skip
    constants = {
        "D_TOTAL": d_total_ND is not None, "WEIGHT": wants_weight, "TILES": tiles, "ROWS": rows, "BLOCK_D": block
    }  # fmt: skip
    work = Work(
        (9 + (d_total_ND is not None) + 2 * wants_weight) * num_rows * D,
        _bytes(dy_ND, d_total_ND, total_ND, rstd_N, weight_D, dx_ND, dw_PD),
    )
    return Launch(backward_kernel, grid, arguments, constants, warps, 1, work), dw_PD


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def shipped(chip: Chip) -> Iterator[tuple[str, Launch]]:
    """Yield the static report's configurations: hidden sizes of real models, and the norm of a head."""
    for dtype in (torch.bfloat16, torch.float32):
        for num_rows, D in ((262144, 128), (8192, 576), (8192, 2048), (8192, 4096), (8192, 8192)):
            yield from _named(dtype, num_rows, D, chip, residual=D > 128)
    yield from _named(torch.bfloat16, 8192, 4096, chip, residual=True, wants_weight=True)
    yield from _named(torch.bfloat16, 8192, 3072, chip, residual=False, weight_offset=1.0, cast_before_weight=False)
    yield from _named(torch.float16, 8192, 4096, chip, residual=True)


def _named(
    dtype: torch.dtype, num_rows: int, D: int, chip: Chip, *, residual: bool, wants_weight: bool = False,
    weight_offset: float = 0.0, cast_before_weight: bool = True,
) -> Iterator[tuple[str, Launch]]:  # fmt: skip
    x_ND = torch.empty(num_rows, D, dtype=dtype, device="meta")
    weight_D = torch.empty(D, dtype=dtype, device="meta")
    rstd_N = torch.empty(num_rows, device="meta")
    more_ND = x_ND if residual else None
    parts = {"residual": residual, "gemma": not cast_before_weight, "weight": wants_weight}
    form = "+".join(name for name, is_on in parts.items() if is_on) or "plain"
    name = f"{str(dtype)[6:]}/D={D}/rows={num_rows}/{form}"
    if not wants_weight:
        yield f"rms_norm/forward/{name}", forward_launch(
            x_ND, more_ND, weight_D, x_ND, more_ND, rstd_N,
            eps=1e-5, weight_offset=weight_offset, cast_before_weight=cast_before_weight,
        )  # fmt: skip
    launch, _ = backward_launch(
        x_ND, more_ND, x_ND, rstd_N, weight_D, x_ND, chip, weight_offset=weight_offset, wants_weight=wants_weight
    )
    yield f"rms_norm/backward/{name}", launch
