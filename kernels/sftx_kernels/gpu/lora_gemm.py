"""The products of LoRA with a wide result, written once.

    outer   out = alpha keep * (L Rt)
    gemm    C   = X W + alpha keep * (L Rt) + bias

In gemm, a linear layer and its low-rank update in one, the accumulator begins as the rank-R product, masked where
there is dropout, and the main loop goes on from there, so that the update costs neither a pass over C nor a rounding.
Forward: X is x, W is the weight transposed, L is S, Rt is B^T. Backward: X is dY, W the weight, L is dS, Rt is A.

Shape suffixes: M rows, K what is summed over, N columns of C, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftx_kernels.gpu.launch import Chip, Launch, Work
from sftx_kernels.gpu.lora import block_rank, num_bytes
from sftx_kernels.gpu.philox import keep_mask


@triton.jit
def low_rank_tile(
    l_ptr, rt_ptr, seed_ptr, alpha, threshold, first_m, first_n, M, N, R, stride_lm, stride_rr, stride_rn,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    NUM_R: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of alpha keep * (L Rt), in fp32."""
    rows = first_m + tl.arange(0, BLOCK_M)
    columns = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    tile_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.static_range(NUM_R):
        ranks = block * BLOCK_R + tl.arange(0, BLOCK_R)
        l_ptrs = l_ptr + rows.to(tl.int64)[:, None] * stride_lm + ranks[None, :]
        l_MR = tl.load(l_ptrs, mask=(rows[:, None] < M) & (ranks[None, :] < R), other=0.0)
        rt_ptrs = rt_ptr + ranks.to(tl.int64)[:, None] * stride_rr + columns[None, :] * stride_rn
        rt_RN = tl.load(rt_ptrs, mask=(ranks[:, None] < R) & (columns[None, :] < N), other=0.0)
        tile_MN = tl.dot(l_MR, rt_RN, tile_MN, input_precision="ieee")
    tile_MN *= alpha
    if DROPOUT:
        seed = tl.load(seed_ptr)
        tile_MN = tl.where(keep_mask(seed, first_m, first_n, threshold, BLOCK_M, BLOCK_N), tile_MN, 0.0)
    return tile_MN


# ---- out = alpha keep * (L Rt)


@triton.jit(do_not_specialize=["M", "threshold", "alpha"])
def _outer_kernel(
    l_ptr, rt_ptr, out_ptr, seed_ptr, alpha, threshold, M, N, R, stride_lm, stride_rr, stride_rn, stride_om,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    NUM_R: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    first_m = (tl.program_id(0) // num_n) * BLOCK_M
    first_n = (tl.program_id(0) % num_n) * BLOCK_N
    tile_MN = low_rank_tile(
        l_ptr, rt_ptr, seed_ptr, alpha, threshold, first_m, first_n, M, N, R, stride_lm, stride_rr, stride_rn,
        DROPOUT, BLOCK_M, BLOCK_N, BLOCK_R, NUM_R,
    )  # fmt: skip
    rows = first_m + tl.arange(0, BLOCK_M)
    columns = first_n + tl.arange(0, BLOCK_N)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_om + columns[None, :]
    tl.store(out_ptrs, tile_MN.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


def outer_launch(
    l_MR: Tensor, rt_RN: Tensor, out_MN: Tensor, chip: Chip, *,
    alpha: float = 1.0, seed: Tensor | None = None, threshold: int = 0,
) -> Launch:  # fmt: skip
    """out = alpha keep * (L Rt). All of one dtype; rt_RN of any strides; R of any size."""
    (M, R), N = l_MR.shape, rt_RN.shape[1]
    block_m, block_n, block_r = 64, 128 if l_MR.dtype != torch.float32 else 64, block_rank(R)
    return Launch(
        _outer_kernel,
        triton.cdiv(M, block_m) * triton.cdiv(N, block_n),
        {
            "l_ptr": l_MR,
            "rt_ptr": rt_RN,
            "out_ptr": out_MN,
            "seed_ptr": seed,
            "alpha": alpha,
            "threshold": threshold,
            "M": M,
            "N": N,
            "R": R,
            "stride_lm": l_MR.stride(0),
            "stride_rr": rt_RN.stride(0),
            "stride_rn": rt_RN.stride(1),
            "stride_om": out_MN.stride(0),
        },
        {
            "DROPOUT": threshold > 0,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_R": block_r,
            "NUM_R": triton.cdiv(R, block_r),
        },
        num_warps=4,
        num_stages=1,
        work=Work(2 * M * N * R, num_bytes(l_MR, rt_RN, out_MN)),
        uses_dot=True,
    )


# ---- C = X W + alpha keep * (L Rt) + bias


@triton.jit(do_not_specialize=["M", "threshold", "alpha"])
def _gemm_kernel(
    x_ptr, w_ptr, l_ptr, rt_ptr, bias_ptr, c_ptr, seed_ptr, alpha, threshold, M, N, K, R,
    stride_xm, stride_wk, stride_wn, stride_lm, stride_rr, stride_rn, stride_cm,
    DROPOUT: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_R: tl.constexpr,
):  # fmt: skip
    # Programs that run at one time share rows of x and columns of W: tiles go in columns of GROUP_M.
    num_m = tl.cdiv(M, BLOCK_M)
    num_in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    group_m = tl.program_id(0) // num_in_group * GROUP_M
    height = tl.minimum(num_m - group_m, GROUP_M)
    first_m = (group_m + tl.program_id(0) % num_in_group % height) * BLOCK_M
    first_n = (tl.program_id(0) % num_in_group // height) * BLOCK_N

    sum_MN = low_rank_tile(
        l_ptr, rt_ptr, seed_ptr, alpha, threshold, first_m, first_n, M, N, R, stride_lm, stride_rr, stride_rn,
        DROPOUT, BLOCK_M, BLOCK_N, BLOCK_R, NUM_R,
    )  # fmt: skip
    rows = first_m + tl.arange(0, BLOCK_M)
    columns = first_n + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Past the end, the last row is read again and not written: the main loop needs no mask for it.
    x_ptrs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_xm + ks[None, :]
    w_ptrs = w_ptr + ks[:, None] * stride_wk + columns.to(tl.int64)[None, :] * stride_wn
    for first_k in range(0, K, BLOCK_K):
        if EVEN_K:  # noqa: SIM108 (one branch is compiled)
            x_MK = tl.load(x_ptrs)
        else:
            x_MK = tl.load(x_ptrs, mask=ks[None, :] < K - first_k, other=0.0)
        if EVEN_K and EVEN_N:
            w_KN = tl.load(w_ptrs)
        else:
            w_KN = tl.load(w_ptrs, mask=(ks[:, None] < K - first_k) & (columns[None, :] < N), other=0.0)
        sum_MN = tl.dot(x_MK, w_KN, sum_MN, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    if BIAS:
        sum_MN += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    c_ptrs = c_ptr + rows.to(tl.int64)[:, None] * stride_cm + columns[None, :]
    tl.store(c_ptrs, sum_MN.to(c_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


class _Tile(NamedTuple):
    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


def _tile(dtype: torch.dtype, chip: Chip, *, dropout: bool) -> _Tile:
    if dtype == torch.float32:
        return _Tile(128, 64, 16, 8, 2)  # plain FMA: tensor cores would round to tf32
    if not chip.arch.startswith("sm_"):
        return _Tile(128, 128, 32, 4, 2)
    if dropout or chip.shared_bytes < 200 * 1024:
        # The mask is made in registers beside the accumulator, and there is no room for 256 columns.
        return _Tile(128, 128, 64, 8, 3)
    return _Tile(128, 256, 64, 8, 3)


def gemm_launch(
    x_MK: Tensor, weight_KN: Tensor, l_MR: Tensor, rt_RN: Tensor, out_MN: Tensor, chip: Chip, *,
    alpha: float = 1.0, bias_N: Tensor | None = None, seed: Tensor | None = None, threshold: int = 0,
) -> Launch:  # fmt: skip
    """out = X W + alpha keep * (L Rt) + bias. All of one dtype; weight_KN and rt_RN of any strides."""
    (M, K), N, R = x_MK.shape, weight_KN.shape[1], l_MR.shape[1]
    tile = _tile(x_MK.dtype, chip, dropout=threshold > 0)
    return Launch(
        _gemm_kernel,
        triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),
        {
            "x_ptr": x_MK,
            "w_ptr": weight_KN,
            "l_ptr": l_MR,
            "rt_ptr": rt_RN,
            "bias_ptr": bias_N,
            "c_ptr": out_MN,
            "seed_ptr": seed,
            "alpha": alpha,
            "threshold": threshold,
            "M": M,
            "N": N,
            "K": K,
            "R": R,
            "stride_xm": x_MK.stride(0),
            "stride_wk": weight_KN.stride(0),
            "stride_wn": weight_KN.stride(1),
            "stride_lm": l_MR.stride(0),
            "stride_rr": rt_RN.stride(0),
            "stride_rn": rt_RN.stride(1),
            "stride_cm": out_MN.stride(0),
        },
        {
            "DROPOUT": threshold > 0,
            "BIAS": bias_N is not None,
            "EVEN_K": K % tile.k == 0,
            "EVEN_N": N % tile.n == 0,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "BLOCK_R": block_rank(R),
            "GROUP_M": 8,
            "NUM_R": triton.cdiv(R, block_rank(R)),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        work=Work(2 * M * N * (K + R), num_bytes(x_MK, weight_KN, l_MR, rt_RN, bias_N, out_MN)),
        uses_dot=True,
    )


# ---- for the static report


def shipped(chip: Chip) -> Iterator[tuple[str, Launch]]:
    """Llama-3 8B's layers in bf16. (fp32 multiplies without tensor cores, to stay exact.)"""
    M, K, O = 8192, 4096, 14336  # noqa: E741
    seed = torch.empty((), dtype=torch.int64, device="meta")
    for R in (16, 128):
        x_MK, W_OK, A_RK, y_MO, B_OR, s_MR, bias_O = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in ((M, K), (O, K), (R, K), (M, O), (O, R), (M, R), (O,))
        )
        where = f"bfloat16/M={M}/K={K}/O={O}/R={R}"
        yield f"lora/gemm/forward/{where}", gemm_launch(x_MK, W_OK.T, s_MR, B_OR.T, y_MO, chip, bias_N=bias_O)
        yield f"lora/gemm/backward/{where}", gemm_launch(y_MO, W_OK, s_MR, A_RK, x_MK, chip)
        launch = gemm_launch(y_MO, W_OK, s_MR, A_RK, x_MK, chip, seed=seed, threshold=6554)
        yield f"lora/gemm/backward/{where}/dropout", launch
        launch = outer_launch(s_MR, A_RK, x_MK, chip, seed=seed, threshold=6554)
        yield f"lora/outer/bfloat16/M={M}/K={K}/R={R}/dropout", launch
