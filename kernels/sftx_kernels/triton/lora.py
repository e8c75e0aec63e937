"""The Triton kernels of LoRA read their wide matrix once and compute dropout's mask in registers.

With x [M, K], dY [M, O], A [R, K], B [O, R] and keep, dropout's mask of ones and zeros:

    shrink      S    = (keep * x) A^T
    down        dS   = alpha dY B,  dB = alpha dY^T S,  from one read of dY
    grad_A      dA   = dS^T (keep * x)
    outer       out  = alpha keep * (L Rt), for dX with L = dS and Rt = A

alpha is LoRA's scaling times dropout's 1 / (1 - p). Sums over programs go to fp32 buffers, one slice for each, and
`sum_parts` adds them in a fixed order: no atomics, so the same input gives the same bits. `sftx_kernels.lora` calls
the functions without "launch" in their name, which run the kernels.

Shape suffixes: M rows, K in, O out, R rank, N columns, P parts. Matrices have a last stride of 1 unless stated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftx_kernels.triton.dropout import keep_mask
from sftx_kernels.triton.launch import Chip, Launch, Work, chip_of

# Larger ranks are processed in blocks, so that no rank is too large for a program's registers.
_MAX_BLOCK_R = 64
_MAX_DOWN_RANK = 32


def _block_rank(rank: int) -> int:
    """Return how many ranks a program processes at once; tl.dot needs at least 16."""
    return min(_MAX_BLOCK_R, max(16, 1 << (rank - 1).bit_length()))


def _num_bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.itemsize for t in tensors if t is not None)


# ---- S = (keep * x) A^T


@triton.jit(do_not_specialize=["M", "threshold"])
def _shrink_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr, threshold, M, K, R, stride_xm, stride_ar, stride_sm,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    num_r = tl.cdiv(R, BLOCK_R)
    first_m = (tl.program_id(0) // num_r) * BLOCK_M
    rows = first_m + tl.arange(0, BLOCK_M)
    ranks = (tl.program_id(0) % num_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    # Past the end, the last row is read again and not written: the main loop needs no mask for it.
    x_ptrs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_xm + ks[None, :]
    a_ptrs = a_ptr + tl.minimum(ranks, R - 1).to(tl.int64)[None, :] * stride_ar + ks[:, None]
    sum_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for first_k in range(0, K, BLOCK_K):
        if EVEN_K:
            x_MK = tl.load(x_ptrs)
            a_KR = tl.load(a_ptrs)
        else:
            x_MK = tl.load(x_ptrs, mask=ks[None, :] < K - first_k, other=0.0)
            a_KR = tl.load(a_ptrs, mask=ks[:, None] < K - first_k, other=0.0)
        if DROPOUT:
            x_MK = tl.where(keep_mask(seed, first_m, first_k, threshold, BLOCK_M, BLOCK_K), x_MK, 0.0)
        sum_MR = tl.dot(x_MK, a_KR, sum_MR, input_precision="ieee")
        x_ptrs += BLOCK_K
        a_ptrs += BLOCK_K
    s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * stride_sm + ranks[None, :]
    tl.store(s_ptrs, sum_MR.to(s_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (ranks[None, :] < R))


def shrink_launch(
    x_MK: Tensor, lora_A_RK: Tensor, out_MR: Tensor, chip: Chip, *, seed: Tensor | None = None, threshold: int = 0
) -> Launch:
    """Launch out_MR = (keep * x) A^T, all of one dtype. R has any size: x stays cached between blocks of ranks."""
    (M, K), R = x_MK.shape, lora_A_RK.shape[0]
    wide = x_MK.dtype == torch.float32
    block_r = _block_rank(R)
    # Two programs for each multiprocessor hide the latency of the one stream of loads.
    block_m = 64 if 128 * chip.num_sms <= M and not wide else 32
    block_k = 64 if wide else 128
    return Launch(
        _shrink_kernel,
        triton.cdiv(M, block_m) * triton.cdiv(R, block_r),
        {
            "x_ptr": x_MK,
            "a_ptr": lora_A_RK,
            "s_ptr": out_MR,
            "seed_ptr": seed,
            "threshold": threshold,
            "M": M,
            "K": K,
            "R": R,
            "stride_xm": x_MK.stride(0),
            "stride_ar": lora_A_RK.stride(0),
            "stride_sm": out_MR.stride(0),
        },
        {
            "DROPOUT": threshold > 0,
            "EVEN_K": K % block_k == 0,
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
            "BLOCK_R": block_r,
        },
        num_warps=4,
        num_stages=2 if wide or chip.shared_bytes <= 64 * 1024 else 3,
        work=Work(2 * M * K * R, _num_bytes(x_MK, lora_A_RK, out_MR)),
        uses_dot=True,
    )


# ---- dS = alpha dY B and dB = alpha dY^T S


@triton.jit(do_not_specialize=["M", "rows_per_program", "alpha"])
def _down_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr, alpha, M, O, R, rows_per_program,  # noqa: E741
    stride_dym, stride_bo, stride_sm,
    EVEN_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    num_o = tl.cdiv(O, BLOCK_O)
    part_o = tl.program_id(0) % num_o
    part_m = tl.program_id(0) // num_o
    outs = part_o * BLOCK_O + tl.arange(0, BLOCK_O)
    ranks = tl.arange(0, BLOCK_R)
    # B's tile stays in registers while the loop goes over the rows of dY and S.
    b_mask = (outs[:, None] < O) & (ranks[None, :] < R)
    b_OR = tl.load(b_ptr + outs.to(tl.int64)[:, None] * stride_bo + ranks[None, :], mask=b_mask, other=0.0)
    dB_RO = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    first = part_m * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    for first_m in range(first, last, BLOCK_M):
        rows = first_m + tl.arange(0, BLOCK_M)
        rows_64 = rows.to(tl.int64)
        dy_mask = rows[:, None] < last
        if not EVEN_O:
            dy_mask = dy_mask & (outs[None, :] < O)
        dy_MO = tl.load(dy_ptr + rows_64[:, None] * stride_dym + outs[None, :], mask=dy_mask, other=0.0)
        s_mask = (rows[None, :] < last) & (ranks[:, None] < R)
        s_RM = tl.load(s_ptr + rows_64[None, :] * stride_sm + ranks[:, None], mask=s_mask, other=0.0)
        dS_MR = tl.dot(dy_MO, b_OR, input_precision="ieee") * alpha
        dB_RO = tl.dot(s_RM, dy_MO, dB_RO, input_precision="ieee")
        ds_ptrs = ds_ptr + (part_o.to(tl.int64) * M + rows_64)[:, None] * R + ranks[None, :]
        tl.store(ds_ptrs, dS_MR, mask=(rows[:, None] < last) & (ranks[None, :] < R))
    db_ptrs = db_ptr + (part_m.to(tl.int64) * O + outs)[None, :] * R + ranks[:, None]
    tl.store(db_ptrs, dB_RO * alpha, mask=(outs[None, :] < O) & (ranks[:, None] < R))


def down_pays(rank: int) -> bool:
    """Return True if one read of dY with partial sums moves less memory than two reads by two ordinary products.

    The partial sums of dS, written and read, are 8 R / BLOCK_O bytes for each element of dY, which has 2.
    """
    return rank <= _MAX_DOWN_RANK


def down_launch(
    dy_MO: Tensor, lora_B_OR: Tensor, s_MR: Tensor, chip: Chip, *, alpha: float
) -> tuple[Launch, Tensor, Tensor]:
    """Return (launch, dS_PMR, dB_POR): partial sums of dS = alpha dY B and dB = alpha dY^T S, in fp32.

    All tensors have one dtype; R satisfies `down_pays`.
    """
    (M, O), R = dy_MO.shape, lora_B_OR.shape[1]  # noqa: E741
    wide = dy_MO.dtype == torch.float32
    small = wide or chip.shared_bytes <= 64 * 1024
    block_r = _block_rank(R)
    block_o = 128 if small else 256
    block_m = 32 if small else 64
    num_o = triton.cdiv(O, block_o)
    rows = _rows_per_program(M, num_o, block_m, chip)
    dS_PMR = dy_MO.new_empty(num_o, M, R, dtype=torch.float32)
    dB_POR = dy_MO.new_empty(triton.cdiv(M, rows), O, R, dtype=torch.float32)
    launch = Launch(
        _down_kernel,
        num_o * dB_POR.shape[0],
        {
            "dy_ptr": dy_MO,
            "b_ptr": lora_B_OR,
            "s_ptr": s_MR,
            "ds_ptr": dS_PMR,
            "db_ptr": dB_POR,
            "alpha": alpha,
            "M": M,
            "O": O,
            "R": R,
            "rows_per_program": rows,
            "stride_dym": dy_MO.stride(0),
            "stride_bo": lora_B_OR.stride(0),
            "stride_sm": s_MR.stride(0),
        },
        {"EVEN_O": O % block_o == 0, "BLOCK_M": block_m, "BLOCK_O": block_o, "BLOCK_R": block_r},
        num_warps=4 if small else 8,
        num_stages=2 if small else 3,
        # The least work has no partial sums, which only this algorithm needs.
        work=Work(4 * M * O * R, _num_bytes(dy_MO, lora_B_OR, s_MR) + (M + O) * R * 4),
        uses_dot=True,
    )
    return launch, dS_PMR, dB_POR


def _rows_per_program(M: int, num_columns: int, block_m: int, chip: Chip) -> int:
    """Return a multiple of the tile that gives about two programs for each multiprocessor."""
    parts = max(1, 2 * chip.num_sms // max(1, num_columns))
    return max(1, -(-M // (parts * block_m))) * block_m


# ---- dA = dS^T (keep * x)


@triton.jit(do_not_specialize=["M", "rows_per_program", "threshold"])
def _grad_a_kernel(
    ds_ptr, x_ptr, da_ptr, seed_ptr, threshold, M, K, R, rows_per_program, stride_dsm, stride_xm,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    num_r = tl.cdiv(R, BLOCK_R)
    num_k = tl.cdiv(K, BLOCK_K)
    ranks = (tl.program_id(0) % num_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    first_k = (tl.program_id(0) // num_r % num_k) * BLOCK_K
    part_m = tl.program_id(0) // num_r // num_k
    ks = first_k + tl.arange(0, BLOCK_K)
    sum_RK = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    first = part_m * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    for first_m in range(first, last, BLOCK_M):
        rows = first_m + tl.arange(0, BLOCK_M)
        rows_64 = rows.to(tl.int64)
        x_mask = rows[:, None] < last
        if not EVEN_K:
            x_mask = x_mask & (ks[None, :] < K)
        x_MK = tl.load(x_ptr + rows_64[:, None] * stride_xm + ks[None, :], mask=x_mask, other=0.0)
        ds_mask = (rows[None, :] < last) & (ranks[:, None] < R)
        dS_RM = tl.load(ds_ptr + rows_64[None, :] * stride_dsm + ranks[:, None], mask=ds_mask, other=0.0)
        if DROPOUT:
            x_MK = tl.where(keep_mask(seed, first_m, first_k, threshold, BLOCK_M, BLOCK_K), x_MK, 0.0)
        sum_RK = tl.dot(dS_RM, x_MK, sum_RK, input_precision="ieee")
    da_ptrs = da_ptr + (part_m.to(tl.int64) * R + ranks)[:, None] * K + ks[None, :]
    tl.store(da_ptrs, sum_RK, mask=(ranks[:, None] < R) & (ks[None, :] < K))


def grad_a_launch(
    dS_MR: Tensor, x_MK: Tensor, chip: Chip, *, seed: Tensor | None = None, threshold: int = 0
) -> tuple[Launch, Tensor]:
    """Return (launch, dA_PRK): partial sums of dA = dS^T (keep * x), in fp32. dS and x have one dtype; R any size."""
    (M, K), R = x_MK.shape, dS_MR.shape[1]
    wide = x_MK.dtype == torch.float32
    small = wide or chip.shared_bytes <= 64 * 1024
    block_r = _block_rank(R)
    block_k, block_m = 128, 32 if small else 64
    num_columns = triton.cdiv(R, block_r) * triton.cdiv(K, block_k)
    rows = _rows_per_program(M, num_columns, block_m, chip)
    dA_PRK = x_MK.new_empty(triton.cdiv(M, rows), R, K, dtype=torch.float32)
    launch = Launch(
        _grad_a_kernel,
        num_columns * dA_PRK.shape[0],
        {
            "ds_ptr": dS_MR,
            "x_ptr": x_MK,
            "da_ptr": dA_PRK,
            "seed_ptr": seed,
            "threshold": threshold,
            "M": M,
            "K": K,
            "R": R,
            "rows_per_program": rows,
            "stride_dsm": dS_MR.stride(0),
            "stride_xm": x_MK.stride(0),
        },
        {
            "DROPOUT": threshold > 0,
            "EVEN_K": K % block_k == 0,
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
            "BLOCK_R": block_r,
        },
        num_warps=4,
        num_stages=2 if small else 3,
        work=Work(2 * M * K * R, _num_bytes(dS_MR, x_MK) + R * K * 4),
        uses_dot=True,
    )
    return launch, dA_PRK


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
    rows = first_m + tl.arange(0, BLOCK_M)
    columns = first_n + tl.arange(0, BLOCK_N)
    tile_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.static_range(NUM_R):
        ranks = block * BLOCK_R + tl.arange(0, BLOCK_R)
        l_ptrs = l_ptr + rows.to(tl.int64)[:, None] * stride_lm + ranks[None, :]
        l_MR = tl.load(l_ptrs, mask=(rows[:, None] < M) & (ranks[None, :] < R), other=0.0)
        rt_ptrs = rt_ptr + ranks.to(tl.int64)[:, None] * stride_rr + columns.to(tl.int64)[None, :] * stride_rn
        rt_RN = tl.load(rt_ptrs, mask=(ranks[:, None] < R) & (columns[None, :] < N), other=0.0)
        tile_MN = tl.dot(l_MR, rt_RN, tile_MN, input_precision="ieee")
    tile_MN *= alpha
    if DROPOUT:
        seed = tl.load(seed_ptr)
        tile_MN = tl.where(keep_mask(seed, first_m, first_n, threshold, BLOCK_M, BLOCK_N), tile_MN, 0.0)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_om + columns[None, :]
    tl.store(out_ptrs, tile_MN.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


def outer_launch(
    l_MR: Tensor, rt_RN: Tensor, out_MN: Tensor, chip: Chip, *,
    alpha: float = 1.0, seed: Tensor | None = None, threshold: int = 0,
) -> Launch:  # fmt: skip
    """Launch out = alpha keep * (L Rt). All tensors have one dtype; rt_RN any strides; R any size."""
    (M, R), N = l_MR.shape, rt_RN.shape[1]
    block_m, block_n, block_r = 64, 128 if l_MR.dtype != torch.float32 else 64, _block_rank(R)
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
        work=Work(2 * M * N * R, _num_bytes(l_MR, rt_RN, out_MN)),
        uses_dot=True,
    )


# ---- the sum of the parts


@triton.jit(do_not_specialize=["num_parts"])
def _sum_parts_kernel(parts_ptr, out_ptr, num_parts, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(num_parts):
        total += tl.load(parts_ptr + offsets, mask=mask, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_parts_launch(parts: Tensor, out: Tensor) -> Launch:
    """Launch out = parts.sum(0), added in order in fp32, then rounded once to out's dtype. Both are contiguous."""
    block = 1024
    return Launch(
        _sum_parts_kernel,
        triton.cdiv(out.numel(), block),
        {"parts_ptr": parts, "out_ptr": out, "num_parts": parts.shape[0], "size": out.numel()},
        {"BLOCK": block},
        num_warps=4,
        num_stages=2,
        work=Work(parts.numel(), _num_bytes(parts, out)),
    )


# ---- running them


def shrink(x_MK: Tensor, lora_A_RK: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """Return S = (keep * x) A^T, [M, R]."""
    s_MR = x_MK.new_empty(x_MK.shape[0], lora_A_RK.shape[0])
    x_MK, lora_A_RK = _without_gaps(x_MK), _without_gaps(lora_A_RK)
    shrink_launch(x_MK, lora_A_RK, s_MR, chip_of(x_MK.device), seed=seed, threshold=threshold).run()
    return s_MR


def down(dy_MO: Tensor, lora_B_OR: Tensor, s_MR: Tensor, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return dS = alpha dY B, [M, R], and dB = alpha dY^T S, [O, R] in `dtype`."""
    chip = chip_of(dy_MO.device)
    launch, dS_PMR, dB_POR = down_launch(_without_gaps(dy_MO), _without_gaps(lora_B_OR), s_MR, chip, alpha=alpha)
    launch.run()
    return _sum_parts(dS_PMR, dy_MO.dtype), _sum_parts(dB_POR, dtype)


def grad_A(dS_MR: Tensor, x_MK: Tensor, seed: Tensor, threshold: int, dtype: torch.dtype) -> Tensor:
    """Return dA = dS^T (keep * x), [R, K] in `dtype`."""
    dS_MR, x_MK = _without_gaps(dS_MR), _without_gaps(x_MK)
    launch, dA_PRK = grad_a_launch(dS_MR, x_MK, chip_of(x_MK.device), seed=seed, threshold=threshold)
    launch.run()
    return _sum_parts(dA_PRK, dtype)


def outer(l_MR: Tensor, rt_RN: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """Return keep * (L Rt), [M, N]."""
    out_MN = l_MR.new_empty(l_MR.shape[0], rt_RN.shape[1])
    outer_launch(_without_gaps(l_MR), rt_RN, out_MN, chip_of(l_MR.device), seed=seed, threshold=threshold).run()
    return out_MN


def _without_gaps(matrix: Tensor) -> Tensor:
    """Return rows of stride 1, which the kernels read; this copies only matrices such as an expanded gradient."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    sum_parts_launch(parts, out).run()
    return out


# ---- for the static report


def shipped(chip: Chip) -> Iterator[tuple[str, Launch]]:
    """Yield the static report's configurations: Llama-3 8B's layers in bf16.

    fp32 is left out: it multiplies without tensor cores, to stay exact.
    """
    M, K, O = 8192, 4096, 14336  # noqa: E741
    seed = torch.empty((), dtype=torch.int64, device="meta")
    for R, dropouts in ((16, ("", "/dropout")), (128, ("/dropout",))):
        x_MK, A_RK, dy_MO, B_OR, s_MR = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in ((M, K), (R, K), (M, O), (O, R), (M, R))
        )
        for dropout in dropouts:
            where = f"bfloat16/M={M}/K={K}/R={R}{dropout}"
            mask, threshold = (seed, 6554) if dropout else (None, 0)
            yield f"lora/shrink/{where}", shrink_launch(x_MK, A_RK, s_MR, chip, seed=mask, threshold=threshold)
            launch, _ = grad_a_launch(s_MR, x_MK, chip, seed=mask, threshold=threshold)
            yield f"lora/grad_a/{where}", launch
            if dropout:
                launch = outer_launch(s_MR, A_RK, x_MK, chip, seed=seed, threshold=6554)
                yield f"lora/outer/{where}", launch
        if down_pays(R):
            launch, dS_PMR, _ = down_launch(dy_MO, B_OR, s_MR, chip, alpha=2.0)
            yield f"lora/down/bfloat16/M={M}/O={O}/R={R}", launch
            yield f"lora/sum_parts/bfloat16/M={M}/O={O}/R={R}", sum_parts_launch(dS_PMR, s_MR)
