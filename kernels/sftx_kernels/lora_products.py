"""The products of a LoRA linear layer in plain torch, with as few passes over wide tensors as torch allows.

`TorchProducts` is the interface too: `gpu.lora_products.TritonProducts` replaces those that kernels do better.

Shape suffixes: M rows, C rows of a chunk, K in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sftx_kernels.dropout import dropped_mask, keep_scale, threshold_of
from sftx_kernels.gemm import accumulator, add_weight_gradient_, project, project_back, widens

# On CPU, dY is read in chunks of about this many elements (3 MB in fp32), so that the second product finds it in the
# cache: 4.7 ms for both against 6.0 on one core (M 2048, O 1536, R 16); with smaller chunks two cores wait.
_CACHED_ELEMENTS = 3 << 18


class TorchProducts:
    """The products of one forward or one backward, whose dropout is a function of `seed`.

    All matrices are of one dtype. With keep the mask of ones and zeros, drop(x) is keep * x * keep_scale; the scale is
    left to the caller, who has a factor to multiply it into.
    """

    def __init__(self, dropout_p: float, seed: Tensor | None) -> None:
        self._threshold = threshold_of(dropout_p)
        self.keep_scale = keep_scale(self._threshold)
        self._seed = seed
        self._dropped_MK: Tensor | None = None

    def shrink(self, x_MK: Tensor, lora_A_RK: Tensor) -> Tensor:
        """S = (keep * x) A^T, [M, R]."""
        return _mm(self._drop(x_MK), lora_A_RK.T)

    def linear(
        self, x_MK: Tensor, weight_OK: Tensor, bias_O: Tensor | None, s_MR: Tensor, lora_B_OR: Tensor, alpha: float
    ) -> Tensor:
        """x W^T + b + alpha S B^T, [M, O]."""
        # The update goes in place onto the fresh output of the base: no second [M, O].
        return _add_product_(project(x_MK, weight_OK, bias_O), s_MR, lora_B_OR.T, alpha)

    def down(
        self, dy_MO: Tensor, lora_B_OR: Tensor, s_MR: Tensor, alpha: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """dS = alpha dY B, [M, R], and dB = alpha dY^T S, [O, R] in `dtype`."""
        (num_rows, O), R = dy_MO.shape, lora_B_OR.shape[1]  # noqa: E741
        product = torch.float32 if widens(dy_MO) else dy_MO.dtype
        scaled_B_OR = lora_B_OR.to(product) * alpha
        dS_MR = dy_MO.new_empty(num_rows, R)
        # [R, O] and then transposed: 0.99 ms against 1.44 for dY^T S (fp32, the shape above, two cores).
        dB_RO = dy_MO.new_zeros(R, O, dtype=accumulator(dy_MO.dtype))
        for chunk in _chunks(dy_MO):
            dy_CO = dy_MO[chunk].to(product)
            if dS_MR.dtype == product:
                torch.mm(dy_CO, scaled_B_OR, out=dS_MR[chunk])
            else:
                dS_MR[chunk] = dy_CO @ scaled_B_OR
            add_weight_gradient_(dB_RO, s_MR[chunk].to(product), dy_CO)
        return dS_MR, dB_RO.mul_(alpha).T.to(dtype).contiguous()

    def grad_A(self, dS_MR: Tensor, x_MK: Tensor, dtype: torch.dtype) -> Tensor:
        """dA = dS^T (keep * x), [R, K] in `dtype`."""
        return weight_gradient(dS_MR, self._drop(x_MK)).to(dtype)

    def grad_x(self, branches: Iterable[tuple[Tensor, Tensor]], dS_MR: Tensor, lora_A_RK: Tensor) -> Tensor:
        """The sum of dY W over `branches` of (dY [M, O], W [O, K]), plus keep * (dS A): [M, K]."""
        dX_MK: Tensor | None = None
        for dy_MO, weight_OK in branches:
            if dX_MK is None:
                dX_MK = project_back(dy_MO, weight_OK)
            elif widens(dX_MK):
                dX_MK.add_(project_back(dy_MO, weight_OK))
            else:
                dX_MK.addmm_(dy_MO, weight_OK)
        assert dX_MK is not None
        if self._threshold:
            return dX_MK.add_(_mm(dS_MR, lora_A_RK).masked_fill_(self._dropped(dX_MK), 0))
        return _add_product_(dX_MK, dS_MR, lora_A_RK, 1.0)

    def _drop(self, x_MK: Tensor) -> Tensor:
        """keep * x."""
        return x_MK.masked_fill(self._dropped(x_MK), 0) if self._threshold else x_MK

    def _dropped(self, x_MK: Tensor) -> Tensor:
        if self._dropped_MK is None:
            assert self._seed is not None
            self._dropped_MK = dropped_mask(x_MK.shape, self._threshold, int(self._seed), x_MK.device)
        return self._dropped_MK


def _chunks(wide_MO: Tensor) -> Iterator[slice]:
    """Of the rows: on CPU as many as stay in the cache from one product to the next."""
    num_rows, O = wide_MO.shape  # noqa: E741
    step = max(64, _CACHED_ELEMENTS // max(1, O) // 64 * 64) if wide_MO.is_cpu else max(1, num_rows)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def weight_gradient(dy_MO: Tensor, x_MK: Tensor) -> Tensor:
    """dY^T x, [O, K], summed and returned in fp32 at least."""
    if dy_MO.dtype == accumulator(dy_MO.dtype):
        return dy_MO.T @ x_MK
    sum_OK = dy_MO.new_zeros(dy_MO.shape[1], x_MK.shape[1], dtype=accumulator(dy_MO.dtype))
    add_weight_gradient_(sum_OK, dy_MO, x_MK)
    return sum_OK


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype) if widens(a) else a @ b


def _add_product_(sum_MO: Tensor, a_MR: Tensor, b_RO: Tensor, alpha: float) -> Tensor:
    """sum += alpha a b, whose inner dimension is small."""
    if widens(sum_MO):
        return sum_MO.add_(a_MR.float() @ b_RO.float(), alpha=alpha)
    return sum_MO.addmm_(a_MR, b_RO, alpha=alpha)
