"""DoRA (arXiv:2402.09353): the norms of the rows of W + s B A, without making that matrix.

    ||W + s B A||^2 = ||W||^2 + 2 s sum_r B (W A^T) + s^2 sum_r (B (A A^T)) B        for each row

||W||^2 is computed once. What is left for each step reads W once and writes [O, R], in chunks of rows, so that no
temporary has the size of W, also when W is NF4 or bf16. All of it is plain torch in fp32 (fp64 for fp64 weights): in
bf16 the sum would keep no more than the first two or three digits of a small change. When an update almost cancels a
row, the terms cancel too; the sum is therefore never taken below a millionth of ||W||^2.

Shape suffixes: O out, K in, R rank, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from sftx_kernels.gemm import accumulator
from sftx_kernels.int8 import Int8Weight
from sftx_kernels.nf4 import NF4Weight, dense_absmax
from sftx_kernels.quantized import QuantizedWeight, dequantize

_CHUNK_ELEMENTS: Final = 1 << 22  # of W; 16 MiB in fp32
_SMALLEST: Final = 1e-6


@torch.no_grad()
def squared_row_norms(weight: Tensor | QuantizedWeight) -> Tensor:
    """Return the squared norm of each row of a weight [O, K], [O] in fp32 or fp64."""
    return torch.cat([chunk_CK.square().sum(1) for chunk_CK in _chunks(weight)])


@torch.no_grad()
def updated_row_norms(
    weight: Tensor | QuantizedWeight, squared_norms_O: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float
) -> Tensor:
    """Return the norm of each row of W + scaling * B A, [O] in fp32 or fp64, without a gradient.

    Args:
        weight: [O, K], of any floating dtype and strides, or a quantised one.
        squared_norms_O: what `squared_row_norms` returned for the weight.
        lora_A, lora_B: [R, K], [O, R].
    """
    A_RK, B_OR = lora_A.to(squared_norms_O.dtype), lora_B.to(squared_norms_O.dtype)
    with torch.autocast(A_RK.device.type, enabled=False):
        WA_OR = torch.cat([chunk_CK @ A_RK.T for chunk_CK in _chunks(weight)])
        cross_O = (B_OR * WA_OR).sum(1)
        update_O = ((B_OR @ (A_RK @ A_RK.T)) * B_OR).sum(1)
        squares_O = squared_norms_O + 2 * scaling * cross_O + scaling**2 * update_O
        return torch.maximum(squares_O, _SMALLEST * squared_norms_O).sqrt()


def _chunks(weight: Tensor | QuantizedWeight) -> Iterator[Tensor]:
    """Yield the rows of a weight in fp32 or fp64, a chunk after the other."""
    rows, columns = weight.shape
    absmax = None if isinstance(weight, Tensor) else dense_absmax(*weight.scales)
    # So that the chunks of an NF4 weight begin with its blocks.
    unit = weight.block_size if isinstance(weight, NF4Weight) else 1
    step = max(1, _CHUNK_ELEMENTS // max(1, columns) // unit) * unit
    for start in range(0, rows, step):
        end = min(rows, start + step)
        if isinstance(weight, Tensor):
            yield weight[start:end].to(accumulator(weight.dtype))
            continue
        assert absmax is not None
        if isinstance(weight, NF4Weight):
            first, last = start * columns, end * columns
            codes = weight.codes[first // 2 : last // 2]
            part: QuantizedWeight = NF4Weight(codes, absmax[first // unit : last // unit], (end - start, columns))
        else:
            part = Int8Weight(weight.codes[start:end], absmax[start:end])
        yield dequantize(part, torch.float32)
