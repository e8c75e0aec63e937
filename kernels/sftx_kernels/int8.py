"""`quantize_int8` implements the weights of LLM.int8() (arXiv:2208.07339, section 2.1): a scale for each row.

A row stores its largest magnitude (absmax, fp32) and each element as round(127 * element / absmax). Inputs stay in
their own dtype, unlike in LLM.int8(), which quantises them as well: the weight is dequantised for each product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sftx_kernels.checks import error
from sftx_kernels.nf4 import check_finite


class Int8Weight(NamedTuple):
    """An Int8Weight holds a weight [O, K] in eight bits."""

    codes: Tensor  # int8, [O, K]
    absmax: Tensor  # fp32, [O]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def scales(self) -> tuple[Tensor, ...]:
        return (self.absmax,)


def quantize_int8(weight_OK: Tensor) -> Int8Weight:
    """Return a weight [O, K] of any floating dtype in eight bits. On the meta device this gives the shapes.

    Raises:
        ValueError: no matrix, or a number that is not finite.
    """
    if weight_OK.dim() != 2 or not weight_OK.is_floating_point():
        raise error("weight_OK", "a floating [O, K]", f"{weight_OK.dtype} of shape {list(weight_OK.shape)}")
    weight_OK = weight_OK.detach()
    absmax = weight_OK.abs().amax(1).float()
    check_finite(absmax)
    scale = (127.0 / torch.where(absmax == 0, 1, absmax))[:, None]
    return Int8Weight((weight_OK * scale).round_().to(torch.int8), absmax)


def check_int8(name: str, weight: Int8Weight) -> None:
    """Check that codes and absmax fit together."""
    codes, absmax = weight
    if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.is_contiguous():
        raise error(f"{name}.codes", "a contiguous torch.int8 [O, K]", f"{codes.dtype} of shape {list(codes.shape)}")
    if absmax.dtype != torch.float32 or absmax.shape != codes.shape[:1] or absmax.device != codes.device:
        got = f"{absmax.dtype} of shape {list(absmax.shape)} on {absmax.device}"
        raise error(f"{name}.absmax", f"torch.float32 of shape [{codes.shape[0]}] on {codes.device}", got)


def dequantize_int8_(out: Tensor, codes: Tensor, scales: Sequence[Tensor]) -> None:
    """Write the dense weight to `out`. Nothing is checked."""
    torch.mul(codes, (scales[0] * (1 / 127))[:, None], out=out)
