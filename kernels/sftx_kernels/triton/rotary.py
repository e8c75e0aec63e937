"""This kernel computes `rotary`, whose formula is in `sftx_kernels.rotary`: queries and keys in one launch, either way.

A program processes all heads of a token, so that its cos and sin are read once. Tensors have any strides but along the
last dimension, where it is 1. All arithmetic is fp32; offsets are int64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftx_kernels.triton.launch import Arguments, Chip, Launch, Work


@triton.jit
def _rotate_heads(
    in_ptr, out_ptr, stride_in, stride_out, cos, sin, num_heads, half, rest,
    REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rotate the heads of a token, and copy the `rest` dimensions from 2 * half on; REST is a block of them, or 0."""
    heads = tl.arange(0, BLOCK_H)[:, None]
    dims = tl.arange(0, BLOCK_R)[None, :]
    inside = (heads < num_heads) & (dims < half)
    source = in_ptr + heads * stride_in + dims
    target = out_ptr + heads * stride_out + dims
    one = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (one * cos - two * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + half, (two * cos + one * sin).to(out_ptr.dtype.element_ty), mask=inside)
    if REST:
        dims = tl.arange(0, REST)[None, :]
        inside = (heads < num_heads) & (dims < rest)
        passed = tl.load(in_ptr + heads * stride_in + 2 * half + dims, mask=inside)
        tl.store(out_ptr + heads * stride_out + 2 * half + dims, passed, mask=inside)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, angle_stride_b, angle_stride_t,
    q_out_stride_b, q_out_stride_h, q_out_stride_t, k_out_stride_b, k_out_stride_h, k_out_stride_t,
    T, q_heads, k_heads, half, rest,
    INVERSE: tl.constexpr, REST: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // T).to(tl.int64)
    t = (tl.program_id(0) % T).to(tl.int64)
    dims = tl.arange(0, BLOCK_R)
    at = b * angle_stride_b + t * angle_stride_t + dims
    cos = tl.load(cos_ptr + at, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + at, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    _rotate_heads(
        q_ptr + b * q_stride_b + t * q_stride_t, q_out_ptr + b * q_out_stride_b + t * q_out_stride_t,
        q_stride_h, q_out_stride_h, cos, sin, q_heads, half, rest, REST, Q_BLOCK, BLOCK_R,
    )  # fmt: skip
    _rotate_heads(
        k_ptr + b * k_stride_b + t * k_stride_t, k_out_ptr + b * k_out_stride_b + t * k_out_stride_t,
        k_stride_h, k_out_stride_h, cos, sin, k_heads, half, rest, REST, K_BLOCK, BLOCK_R,
    )  # fmt: skip


_ELEMENTS_PER_WARP = 512  # 8 of each half a thread


def launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, *, inverse: bool) -> Launch:
    """Launch the rotation of q and k into `q_out` and `k_out`, or with `inverse` the rotation back."""
    B, q_heads, T, D = q.shape
    k_heads, R = k.shape[1], cos.shape[2]
    half, rest = R // 2, D - R
    arguments: Arguments = {
        "q_ptr": q, "k_ptr": k, "cos_ptr": cos, "sin_ptr": sin, "q_out_ptr": q_out, "k_out_ptr": k_out,
        **_strides("q", q), **_strides("k", k),
        "angle_stride_b": cos.stride(0) if cos.shape[0] > 1 else 0, "angle_stride_t": cos.stride(1),
        **_strides("q_out", q_out), **_strides("k_out", k_out),
        "T": T, "q_heads": q_heads, "k_heads": k_heads, "half": half, "rest": rest,
    }  # fmt: skip
    blocks = {
        "Q_BLOCK": triton.next_power_of_2(q_heads),
        "K_BLOCK": triton.next_power_of_2(k_heads),
        "BLOCK_R": triton.next_power_of_2(half),
    }
    constants = {"INVERSE": inverse, "REST": triton.next_power_of_2(rest) if rest else 0, **blocks}
    warps = max(1, min(16, 2 * blocks["Q_BLOCK"] * blocks["BLOCK_R"] // _ELEMENTS_PER_WARP))
    num_elements = B * T * (q_heads + k_heads) * D
    angle_bytes = 2 * cos.shape[0] * T * half * cos.element_size()  # of each table only the first half is read
    work = Work(3 * B * T * (q_heads + k_heads) * R, 2 * num_elements * q.element_size() + angle_bytes)
    return Launch(rotary_kernel, B * T, arguments, constants, warps, 1, work)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_stride_{axis}": x.stride(at) for axis, at in (("b", 0), ("h", 1), ("t", 2))}


def shipped(chip: Chip) -> Iterator[tuple[str, Launch]]:
    """Yield the static report's configurations: heads of real models, a transposed [B, T, H, D] each."""
    for dtype, q_heads, k_heads, D, R in (
        (torch.bfloat16, 9, 3, 64, 64), (torch.bfloat16, 32, 8, 128, 128), (torch.bfloat16, 64, 8, 128, 128),
        (torch.bfloat16, 32, 32, 80, 32), (torch.float16, 32, 8, 128, 128), (torch.float32, 32, 8, 128, 128),
    ):  # fmt: skip
        q, k = (
            torch.empty(2, 4096, heads, D, dtype=dtype, device="meta").transpose(1, 2) for heads in (q_heads, k_heads)
        )
        cos = torch.empty(1, 4096, R, dtype=dtype, device="meta")
        name = f"rotary/{str(dtype)[6:]}/heads={q_heads}+{k_heads}/D={D}" + (f"/R={R}" if R < D else "")
        yield name, launch(q, k, cos, cos, q, k, inverse=False)
