"""These functions are shared by the losses over a head that never materialise its logits.

Rows whose label is ignored are left out, the others are processed chunk by chunk, and the gradients of hidden states
and head are made with the logits, so that backward only scales them.

Shape suffixes: N rows (tokens), M rows that are not ignored, C rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sftx_kernels.checks import error
from sftx_kernels.cross_entropy import check_labels
from sftx_kernels.gemm import add_weight_gradient_, multiplies_natively, project_back


def default_chunk_rows(
    vocab_size: int, dtype: torch.dtype, device_type: str, workspace_bytes: int | None, *, head_trains: bool
) -> int:
    """Return how many rows have their logits made at once when no count is given.

    Small chunks read the head's weight again and again, whatever V and D, so the count depends on the device.
    """
    if device_type == "cpu":
        rows = 256 if multiplies_natively(device_type, dtype) else 192
    else:
        rows = 4096 if head_trains else 2048
    return rows if workspace_bytes is None else min(rows, workspace_bytes // (vocab_size * dtype.itemsize))


def logits_buffer(num_rows: int, vocab_size: int, like: Tensor, *, aligned: bool) -> Tensor:
    """Return memory for a chunk of logits, [num_rows, V], of the dtype and on the device of `like`.

    The Triton kernels load 16 bytes at once if each row begins at a multiple of 16 elements, as it does if `aligned`.
    """
    row_stride = -(-vocab_size // 16) * 16 if aligned else vocab_size
    return like.new_empty(num_rows, row_stride)[:, :vocab_size]


@torch.library.custom_op("sftx::trained_rows", mutates_args=())
def valid_rows(labels_N: Tensor, num_valid: int | None, ignore_index: int, num_classes: int) -> Tensor:
    """Return rows_M, the indices of the labels other than ignore_index."""
    check_labels(labels_N, ignore_index, num_classes)
    if num_valid is None or labels_N.is_cpu:
        rows_M = (labels_N != ignore_index).nonzero().squeeze(1)
        if num_valid is not None and num_valid != rows_M.shape[0]:
            raise error("num_valid", f"{rows_M.shape[0]}, the number of labels other than {ignore_index}", num_valid)
        return rows_M
    # A num_valid that is too large pads with -1, for which index_select raises on the device.
    return (labels_N != ignore_index).nonzero_static(size=num_valid).squeeze(1)


@valid_rows.register_fake
def _(labels_N: Tensor, num_valid: int | None, ignore_index: int, num_classes: int) -> Tensor:
    return labels_N.new_empty(torch.library.get_ctx().new_dynamic_size() if num_valid is None else num_valid)


def take(values_N: Tensor, rows_M: Tensor | None) -> Tensor:
    return values_N if rows_M is None else values_N.index_select(0, rows_M)


def scatter(values_M: Tensor, rows_M: Tensor | None, num_rows: int) -> Tensor:
    """Invert `take`, with 0 at ignored rows."""
    if rows_M is None:
        return values_M
    return values_M.new_zeros(num_rows, *values_M.shape[1:]).index_copy_(0, rows_M, values_M)


@dataclass(frozen=True)
class HeadGradients:
    """The gradients of hidden states, head and bias that are wanted; a gradient that is None is not computed."""

    dX_MD: Tensor | None  # dtype of the products
    dW_VD: Tensor | None  # fp32, or fp64 for products in fp64; a sum over chunks that starts at 0
    db_V: Tensor | None  # as dW

    @property
    def any_wanted(self) -> bool:
        return any(gradient is not None for gradient in (self.dX_MD, self.dW_VD, self.db_V))

    def add_(self, chunk: slice, grad_CV: Tensor, x_CD: Tensor, weight_VD: Tensor) -> None:
        """Add what a chunk contributes, from the gradient of its logits."""
        if self.dX_MD is not None:
            project_back(grad_CV, weight_VD, out=self.dX_MD[chunk])
        if self.dW_VD is not None:
            add_weight_gradient_(self.dW_VD, grad_CV, x_CD)
        if self.db_V is not None:
            self.db_V.add_(grad_CV.sum(0, dtype=self.db_V.dtype))


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tensor * factor in `dtype`, without the wider product in between: gigabytes for dW of a large head.

    A factor has as many dimensions as the tensor: then torch multiplies in fp32 and rounds once, while it may first
    round a 0-d factor to bf16.
    """
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))
