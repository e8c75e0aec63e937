"""`quantize_nf4` and `dequantize_nf4` implement NF4, the four-bit weights of QLoRA (arXiv:2305.14314, section 3).

A weight, flattened along its rows, is cut into blocks. Each block stores its largest magnitude (absmax, fp32), and for
each element the number of the level nearest to element / absmax. Two numbers share a byte, the first in its high
nibble, as bitsandbytes packs them.

Double quantisation stores absmax in 8 bits: its difference to the mean of all absmax (`offset`) is cut into blocks of
256, each with its largest magnitude (`nested_absmax`, fp32), and each difference is the number of the nearest of 256
levels (`nested_levels`). The absmax of 64 weights then takes 1.02 bytes instead of 4. Names are those of bitsandbytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
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


_CACHED_ELEMENTS: Final = 1 << 16

NESTED_BLOCK_SIZE: Final = 256
"""So many absmax share a nested absmax."""


class NF4Weight(NamedTuple):
    """An NF4Weight holds a weight [O, K] in four bits. `block_size` follows from the sizes."""

    codes: Tensor  # uint8, [O * K / 2]
    absmax: Tensor  # fp32, [O * K / block_size]; of a doubly quantised weight the numbers of nested levels, uint8
    shape: tuple[int, int]
    nested_absmax: Tensor | None = None  # fp32, [ceil(O * K / block_size / 256)]
    offset: Tensor | None = None  # fp32, 0-d

    @property
    def block_size(self) -> int:
        return self.shape[0] * self.shape[1] // max(1, self.absmax.numel())

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """Everything but the codes: (absmax,), or (absmax, nested_absmax, offset)."""
        if self.nested_absmax is None or self.offset is None:
            return (self.absmax,)
        return self.absmax, self.nested_absmax, self.offset


def quantize_nf4(weight_OK: Tensor, block_size: int = 64, *, double: bool = False) -> NF4Weight:
    """Return the codes of the levels nearest to a weight [O, K] of any floating dtype; `double` quantises absmax too.

    On the meta device this gives the shapes.

    Raises:
        ValueError: no matrix, a number that is not finite, or a `block_size` that is odd or does not divide its size.
    """
    if weight_OK.dim() != 2 or not weight_OK.is_floating_point():
        raise error("weight_OK", "a floating [O, K]", f"{weight_OK.dtype} of shape {list(weight_OK.shape)}")
    if block_size < 2 or block_size % 2 or weight_OK.numel() % block_size:
        shape = "x".join(map(str, weight_OK.shape))
        raise error("block_size", f"an even divisor of {weight_OK.numel()} ({shape})", block_size)
    blocks = weight_OK.detach().reshape(-1, block_size)
    absmax = blocks.abs().amax(1).float()
    check_finite(absmax)
    levels, _ = _tables(weight_OK.device)
    pairs = _nearest(blocks, absmax, levels).view(-1, 2)
    weight = NF4Weight(pairs[:, 0] << 4 | pairs[:, 1], absmax, (weight_OK.shape[0], weight_OK.shape[1]))
    if not double:
        return weight
    offset, num_blocks = absmax.mean(), absmax.numel()
    differences = F.pad(absmax - offset, (0, -num_blocks % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = differences.abs().amax(1)
    numbers = _nearest(differences, nested_absmax, nested_levels(weight_OK.device))
    return weight._replace(absmax=numbers.flatten()[:num_blocks].clone(), nested_absmax=nested_absmax, offset=offset)


def _nearest(blocks: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """Return the number (uint8) of the level nearest to each element / absmax of its row."""
    # A row of zeros is scaled by 1, and gets the level 0. Multiplying by the reciprocal is what bitsandbytes does.
    scale, bounds = (1 / torch.where(absmax == 0, 1, absmax))[:, None], (levels[1:] + levels[:-1]) / 2
    if not blocks.is_cpu or len(bounds) > 15:
        return torch.bucketize(blocks * scale, bounds).to(torch.uint8)
    # On a CPU a comparison with each bound is twice as fast as a search, in parts that the cache holds.
    numbers = torch.zeros(blocks.shape, dtype=torch.uint8)
    rows = max(1, _CACHED_ELEMENTS // blocks.shape[1])
    for some_blocks, some_scale, some_numbers in zip(*(t.split(rows) for t in (blocks, scale, numbers)), strict=True):
        scaled = some_blocks * some_scale
        for bound in bounds.tolist():
            some_numbers += (scaled > bound).view(torch.uint8)
    return numbers


def check_finite(absmax: Tensor) -> None:
    if not absmax.is_meta and not absmax.isfinite().all():
        raise error("weight_OK", "finite numbers", "inf or nan, which would take its block with it")


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
    arguments = weight.codes, list(weight.scales), list(weight.shape), dtype, backend
    if out is None:
        dense: Tensor = _dequantize_op(*arguments)
        return dense
    if out.shape != weight.shape or out.dtype != dtype or not out.is_contiguous():
        got = f"{out.dtype} of shape {list(out.shape)}, strides {list(out.stride())}"
        raise error("out", f"a contiguous {dtype} of shape {list(weight.shape)}", got)
    if torch.compiler.is_compiling():  # an op that writes to its argument is opaque to the compiler; this is not
        return out.copy_(_dequantize_op(*arguments))
    dequantize_nf4_(out, weight.codes, weight.scales, decide("nf4", out.device, dtype, requested=backend).backend)
    return out


def check_nf4(name: str, weight: NF4Weight) -> None:
    """Check that codes, scales and shape fit together. Any values of the codes are valid."""
    codes, absmax, (O, K), nested_absmax, offset = weight  # noqa: E741
    if codes.dtype != torch.uint8 or tuple(codes.shape) != (O * K // 2,) or O * K % 2:
        raise error(f"{name}.codes", f"torch.uint8 of shape [{O} * {K} / 2]", f"{codes.dtype} of {list(codes.shape)}")
    if (nested_absmax is None) != (offset is None):
        raise error(name, "nested_absmax and offset, or neither", "one of them")
    expected = torch.float32 if nested_absmax is None else torch.uint8
    if absmax.dtype != expected or absmax.device != codes.device:
        raise error(f"{name}.absmax", f"{expected} on {codes.device}", f"{absmax.dtype} on {absmax.device}")
    num_blocks = absmax.numel()
    if absmax.dim() != 1 or num_blocks == 0 != O * K or (num_blocks and (codes.numel() % num_blocks)):
        expected_shape = f"one number for each of equal blocks of {O} * {K}"
        raise error(f"{name}.absmax", expected_shape, f"shape {list(absmax.shape)}")
    for part, tensor, shape in (
        ("nested_absmax", nested_absmax, [-(-num_blocks // NESTED_BLOCK_SIZE)]),
        ("offset", offset, []),
    ):
        if tensor is not None and (
            tensor.dtype != torch.float32 or tensor.device != codes.device or list(tensor.shape) != shape
        ):
            got = f"{tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
            raise error(f"{name}.{part}", f"torch.float32 of shape {shape} on {codes.device}", got)
    if not (codes.is_contiguous() and absmax.is_contiguous()):
        raise error(name, "contiguous codes and absmax", f"strides {codes.stride()} and {absmax.stride()}")


def dequantize_nf4_(out: Tensor, codes: Tensor, scales: Sequence[Tensor], backend: str) -> None:
    """Write the dense weight to `out`, which is contiguous. Nothing is checked."""
    levels, pairs = _tables(codes.device)
    if backend != "torch":
        from sftx_kernels.triton.nf4 import dequantize_launch

        nested = (nested_levels(codes.device), NESTED_BLOCK_SIZE) if len(scales) > 1 else ()
        dequantize_launch(codes, scales, levels, out, *nested).run()
    elif out.numel():
        absmax = dense_absmax(*scales)
        # One lookup gives both values of a byte.
        values = pairs.index_select(0, codes.int()).view(absmax.shape[0], -1)
        torch.mul(values, absmax[:, None], out=out.view(absmax.shape[0], -1))


def dense_absmax(absmax: Tensor, nested_absmax: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """Return absmax in fp32. The arguments are the scales of a quantised weight."""
    if nested_absmax is None or offset is None:
        return absmax
    values = nested_levels(absmax.device).index_select(0, absmax.int())
    values *= nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: absmax.numel()]
    return values.add_(offset)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the levels, and the two values of each byte [256, 2]."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=device)
    return levels, torch.cartesian_prod(levels, levels)


@functools.cache
def nested_levels(device: torch.device) -> Tensor:
    """Return the 256 levels of the dynamic data type (arXiv:1511.04561, section 2.2), in order, from -0.993 to 1.

    Each of seven decades has twice as many levels as the one below it: the centres of equal parts of [0.1, 1] times a
    power of ten, with both signs; 0 and 1 are added.
    """
    decades = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        decades.append(10.0 ** (exponent - 6) * ((edges[1:] + edges[:-1]) / 2))
    positive = torch.cat(decades)
    return torch.cat((-positive, positive, torch.tensor([0.0, 1.0]))).sort().values.to(device)


@torch.library.custom_op("sftx::dequantize_nf4", mutates_args=())
def _dequantize_op(
    codes: Tensor, scales: list[Tensor], shape: list[int], dtype: torch.dtype, backend: str | None
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    dequantize_nf4_(out, codes, scales, decide("nf4", codes.device, dtype, requested=backend).backend)
    return out


@_dequantize_op.register_fake
def _(codes: Tensor, scales: list[Tensor], shape: list[int], dtype: torch.dtype, backend: str | None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=codes.device)
