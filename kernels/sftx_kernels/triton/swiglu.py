"""These kernels compute `swiglu`, whose formula is in `sftx_kernels.swiglu`, and its gradients, in one launch each way.

A program processes BLOCK columns of a row, so rows of gate and up may have gaps. gelu's tanh form is
x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3), since (1 + tanh z) / 2 = sigmoid(2 z).

All arithmetic is fp32; the result is rounded once. Offsets are int64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftx_kernels.triton.launch import Arguments, Chip, Launch, Work

_TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBE = tl.constexpr(0.044715)


@triton.jit
def _activation(x, GELU: tl.constexpr):
    """Return a(x) and a'(x)."""
    if GELU:
        square = x * x * _CUBE
        s = tl.sigmoid(x * (1.0 + square) * _TWICE_ROOT)
        slope = s + x * s * (1.0 - s) * (1.0 + 3.0 * square) * _TWICE_ROOT
    else:
        s = tl.sigmoid(x)
        slope = s * (1.0 + x * (1.0 - s))
    return x * s, slope


@triton.jit
def forward_kernel(
    gate_ptr, up_ptr, y_ptr, stride_gate, stride_up, D, BLOCKS, GELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    cols = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    gate = tl.load(gate_ptr + row * stride_gate + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + cols, mask=inside, other=0.0).to(tl.float32)
    active, _ = _activation(gate, GELU)
    tl.store(y_ptr + row * D + cols, (active * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, stride_dy, stride_gate, stride_up, D, BLOCKS,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    cols = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    dy = tl.load(dy_ptr + row * stride_dy + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + cols, mask=inside, other=0.0).to(tl.float32)
    active, slope = _activation(gate, GELU)
    at = row * D + cols
    tl.store(d_gate_ptr + at, (dy * up * slope).to(d_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(d_up_ptr + at, (dy * active).to(d_up_ptr.dtype.element_ty), mask=inside)


_BLOCK, _WARPS = 2048, 8  # 8 elements a thread: one load of 16 bytes of each bf16 input


def _plan(D: int) -> tuple[int, int, int]:
    """Return (blocks of a row, BLOCK, warps)."""
    block = min(_BLOCK, triton.next_power_of_2(D))
    return triton.cdiv(D, block), block, max(1, _WARPS * block // _BLOCK)


def forward_launch(gate_ND: Tensor, up_ND: Tensor, y_ND: Tensor, *, gelu: bool) -> Launch:
    """Launch the forward; the stride along D is 1, and y has no gaps."""
    num_rows, D = gate_ND.shape
    blocks, block, warps = _plan(D)
    arguments: Arguments = {
        "gate_ptr": gate_ND, "up_ptr": up_ND, "y_ptr": y_ND, "stride_gate": gate_ND.stride(0),
        "stride_up": up_ND.stride(0), "D": D, "BLOCKS": blocks,
    }  # fmt: skip
    work = Work(6 * num_rows * D, 3 * num_rows * D * gate_ND.element_size())
    return Launch(forward_kernel, num_rows * blocks, arguments, {"GELU": gelu, "BLOCK": block}, warps, 1, work)


def backward_launch(
    dy_ND: Tensor, gate_ND: Tensor, up_ND: Tensor, d_gate_ND: Tensor, d_up_ND: Tensor, *, gelu: bool
) -> Launch:
    """Launch the backward; the stride along D is 1, and the gradients of gate and up have no gaps."""
    num_rows, D = gate_ND.shape
    blocks, block, warps = _plan(D)
    arguments: Arguments = {
        "dy_ptr": dy_ND, "gate_ptr": gate_ND, "up_ptr": up_ND, "d_gate_ptr": d_gate_ND, "d_up_ptr": d_up_ND,
        "stride_dy": dy_ND.stride(0), "stride_gate": gate_ND.stride(0), "stride_up": up_ND.stride(0), "D": D,
        "BLOCKS": blocks,
    }  # fmt: skip
    work = Work(12 * num_rows * D, 5 * num_rows * D * gate_ND.element_size())
    return Launch(backward_kernel, num_rows * blocks, arguments, {"GELU": gelu, "BLOCK": block}, warps, 1, work)


def shipped(chip: Chip) -> Iterator[tuple[str, Launch]]:
    """Yield the static report's configurations: feed-forward layers of real models."""
    for dtype, D, gelu in (
        (torch.bfloat16, 1536, False), (torch.bfloat16, 8192, False), (torch.bfloat16, 14336, False),
        (torch.bfloat16, 16384, True), (torch.float16, 14336, False), (torch.float32, 14336, False),
    ):  # fmt: skip
        x_ND = torch.empty(8192, D, dtype=dtype, device="meta")
        name = f"{str(dtype)[6:]}/D={D}/rows=8192/{'gelu_tanh' if gelu else 'silu'}"
        yield f"swiglu/forward/{name}", forward_launch(x_ND, x_ND, x_ND, gelu=gelu)
        yield f"swiglu/backward/{name}", backward_launch(x_ND, x_ND, x_ND, x_ND, x_ND, gelu=gelu)
