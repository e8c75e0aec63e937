"""`quantize_nf4` and `dequantize_nf4` implement NF4, the four-bit weights of QLoRA (arXiv:2305.14314, section 3).

A weight, flattened along its rows, is cut into blocks. Each block stores its largest magnitude (absmax, fp32), and for
each element the number of the level nearest to element / absmax. Two numbers share a byte, the first in its high
nibble, as bitsandbytes packs them.

A layer that holds such a weight keeps the codes as a uint8 `Parameter(requires_grad=False)` and absmax as an fp32
buffer: a mixed-precision policy, which casts parameters, then leaves both alone.
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sftx_kernels.checks import error
from sftx_kernels.dispatch import decide

LEVELS: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""These are the levels of appendix E: quantiles of the normal distribution and 0, scaled to [-1, 1]."""


class NF4Weight(NamedTuple):
    """An NF4Weight holds a weight [O, K] in four bits. `block_size` follows from the sizes."""

    codes: Tensor  # uint8, [O * K / 2]
    absmax: Tensor  # fp32, [O * K / block_size]
    shape: tuple[int, int]

    @property
    def block_size(self) -> int:
        return self.shape[0] * self.shape[1] // max(1, self.absmax.numel())


def quantize_nf4(weight_OK: Tensor, block_size: int = 64) -> NF4Weight:
    """Return the codes of the levels nearest to a weight [O, K] of any floating dtype.

    Raises:
        ValueError: no matrix, a number that is not finite, or a `block_size` that is odd or does not divide its size.
    """
    if weight_OK.dim() != 2 or not weight_OK.is_floating_point():
        raise error("weight_OK", "a floating [O, K]", f"{weight_OK.dtype} of shape {list(weight_OK.shape)}")
    if not weight_OK.isfinite().all():
        raise error("weight_OK", "finite numbers", "inf or nan, which would take its block with it")
    if block_size < 2 or block_size % 2 or weight_OK.numel() % block_size:
        shape = "x".join(map(str, weight_OK.shape))
        raise error("block_size", f"an even divisor of {weight_OK.numel()} ({shape})", block_size)
    blocks = weight_OK.detach().reshape(-1, block_size).float()
    absmax = blocks.abs().amax(1)
    levels = torch.tensor(LEVELS, device=weight_OK.device)
    # A block of zeros divides by 1 instead of 0, and gets level 7, which is 0.
    scaled = blocks / torch.where(absmax == 0, 1, absmax)[:, None]
    numbers = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1, 2)
    return NF4Weight(numbers[:, 0] << 4 | numbers[:, 1], absmax, (weight_OK.shape[0], weight_OK.shape[1]))


def dequantize_nf4(
    weight: NF4Weight, dtype: torch.dtype, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Return the dense weight [O, K] in `dtype`, each value rounded once; written to `out`, contiguous, if given.

    `backend` is for `dispatch.decide`. No gradient flows to a quantised weight.

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    check_nf4("weight", weight)
    if not dtype.is_floating_point:
        raise error("dtype", "a floating dtype", dtype)
    if out is None:
        dense: Tensor = _dequantize_op(weight.codes, weight.absmax, list(weight.shape), dtype, backend)
        return dense
    if out.shape != weight.shape or out.dtype != dtype or not out.is_contiguous():
        got = f"{out.dtype} of shape {list(out.shape)}, strides {list(out.stride())}"
        raise error("out", f"a contiguous {dtype} of shape {list(weight.shape)}", got)
    if torch.compiler.is_compiling():  # an op that writes to its argument is opaque to the compiler; this is not
        return out.copy_(_dequantize_op(weight.codes, weight.absmax, list(weight.shape), dtype, backend))
    dequantize_into_(out, weight.codes, weight.absmax, decide("nf4", out.device, dtype, requested=backend).backend)
    return out


def check_nf4(name: str, weight: NF4Weight) -> None:
    """Check that codes, absmax and shape fit together. Any values of the codes are valid."""
    codes, absmax, (O, K) = weight  # noqa: E741
    if codes.dtype != torch.uint8 or tuple(codes.shape) != (O * K // 2,) or O * K % 2:
        raise error(f"{name}.codes", f"torch.uint8 of shape [{O} * {K} / 2]", f"{codes.dtype} of {list(codes.shape)}")
    if absmax.dtype != torch.float32 or absmax.device != codes.device:
        raise error(f"{name}.absmax", f"torch.float32 on {codes.device}", f"{absmax.dtype} on {absmax.device}")
    num_blocks = absmax.numel()
    if absmax.dim() != 1 or num_blocks == 0 != O * K or (num_blocks and (codes.numel() % num_blocks)):
        expected = f"one number for each of equal blocks of {O} * {K}"
        raise error(f"{name}.absmax", expected, f"shape {list(absmax.shape)}")
    if not (codes.is_contiguous() and absmax.is_contiguous()):
        raise error(name, "contiguous codes and absmax", f"strides {codes.stride()} and {absmax.stride()}")


def dequantize_into_(out: Tensor, codes: Tensor, absmax: Tensor, backend: str) -> None:
    """Write the dense weight to `out`, which is contiguous. Nothing is checked."""
    levels, pairs = _tables(codes.device)
    if backend != "torch":
        from sftx_kernels.triton.nf4 import dequantize_launch

        dequantize_launch(codes, absmax, levels, out).run()
    elif out.numel():
        # One lookup gives both values of a byte.
        values = pairs.index_select(0, codes.int()).view(absmax.shape[0], -1)
        torch.mul(values, absmax[:, None], out=out.view(absmax.shape[0], -1))


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the levels, and the two values of each byte [256, 2]."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=device)
    return levels, torch.cartesian_prod(levels, levels)


@torch.library.custom_op("sftx::dequantize_nf4", mutates_args=())
def _dequantize_op(codes: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype, backend: str | None) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    dequantize_into_(out, codes, absmax, decide("nf4", codes.device, dtype, requested=backend).backend)
    return out


@_dequantize_op.register_fake
def _(codes: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype, backend: str | None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=codes.device)
