"""Small kernels for the tests of the static report: some pass every gate, the others each fail one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sftx_kernels.triton.launch import Chip, Launch, Work


@triton.jit
def row_sum(x_ptr, y_ptr, bias_ptr, V, stride_x, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total_V = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        total_V += tl.load(x_ptr + row * stride_x + cols, mask=cols < V, other=0.0).to(tl.float32)
    total = tl.sum(total_V)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row)
    tl.store(y_ptr + row, total)


@triton.jit
def product(
    x_ptr, w_ptr, y_ptr, K, O, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: E741
    ALSO_PLAIN: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(O, BLOCK_O)
    rows = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = (tl.program_id(0) % tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    total_MO = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x_MK = tl.load(x_ptr + rows[:, None] * K + inner[None, :])
        w_OK = tl.load(w_ptr + outs[:, None] * K + inner[None, :])
        total_MO = tl.dot(x_MK, w_OK.T, total_MO)
        if ALSO_PLAIN:
            total_MO = tl.dot(x_MK.to(tl.float32), w_OK.to(tl.float32).T, total_MO, input_precision="ieee")
    tl.store(y_ptr + rows[:, None] * O + outs[None, :], total_MO.to(y_ptr.dtype.element_ty))


def _row_sum(V: int, stride: int, *, block: int = 1024, warps: int = 4, bias: bool = False) -> Launch:
    x_NV = torch.empty_strided((64, V), (stride, 1), dtype=torch.bfloat16, device="meta")
    y_N = torch.empty(64, device="meta")
    arguments = {"x_ptr": x_NV, "y_ptr": y_N, "bias_ptr": y_N if bias else None, "V": V, "stride_x": stride}
    return Launch(row_sum, 64, arguments, {"BLOCK_V": block}, warps, 2, Work(64 * V, 64 * V * 2 + 64 * 4))


def _product(block: int, stages: int, *, also_plain: bool = False) -> Launch:
    M, K, O = 256, 1024, 512  # noqa: E741
    x_MK, w_OK, y_MO = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((M, K), (O, K), (M, O)))
    arguments = {"x_ptr": x_MK, "w_ptr": w_OK, "y_ptr": y_MO, "K": K, "O": O}
    constants = {"BLOCK_M": block, "BLOCK_O": block, "BLOCK_K": 64, "ALSO_PLAIN": also_plain}
    work = Work(2 * M * K * O, 2 * (M * K + O * K + M * O))
    return Launch(product, (M // block) * (O // block), arguments, constants, 8, stages, work, uses_dot=True)


def shipped(chip: Chip) -> Iterator[tuple[str, Launch]]:
    yield "good/row-sum", _row_sum(4096, 4096)
    yield "good/row-sum/alike", _row_sum(8192, 8192)
    yield "good/product", _product(128, 3 if chip.shared_bytes > 64 * 1024 else 2)
    if chip.arch not in ("sm_90", "gfx942"):
        return
    # 128 threads have about as many registers as this row has columns.
    yield "bad/spills", _row_sum(65536, 65536, block=65536 if chip.arch == "gfx942" else 32768)
    # Rows that begin anywhere cannot be read by vectors.
    yield "bad/scalar-loads", _row_sum(4095, 4095)
    yield "bad/shared", _product(128, 8 if chip.arch == "sm_90" else 4)
    if chip.arch == "sm_90":  # whose tensor cores have no full fp32; CDNA's have
        yield "bad/does-not-compile", _row_sum(4096, 4096, block=1000)
        yield "bad/plain-dot", _product(32, 2, also_plain=True)
    plain = _row_sum(4096, 4096, bias=True)
    yield "bad/no-tensor-core", dataclasses.replace(plain, uses_dot=True)
