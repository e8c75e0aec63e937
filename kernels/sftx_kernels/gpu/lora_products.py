"""The products of a LoRA linear layer with Triton kernels; what cuBLAS does as well is left to it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sftx_kernels.gpu.launch import Chip, chip_of
from sftx_kernels.gpu.lora import down_launch, down_pays, grad_a_launch, shrink_launch, sum_parts_launch
from sftx_kernels.gpu.lora_gemm import gemm_launch, outer_launch
from sftx_kernels.lora_products import TorchProducts


class TritonProducts(TorchProducts):
    """`fused` says who makes the large products: one kernel together with the low-rank update, or cuBLAS."""

    def __init__(self, dropout_p: float, seed: Tensor | None, device: torch.device, *, fused: bool) -> None:
        super().__init__(dropout_p, seed)
        self._fused = fused
        self._kernels = fused or self._threshold > 0
        self._chip: Chip = chip_of(device)
        self._device_seed = seed if self._threshold else None
        if self._device_seed is not None and self._device_seed.device != device:
            # a fill, not a copy from the host's memory, which would wait
            self._device_seed = torch.full((), int(self._device_seed), dtype=torch.int64, device=device)

    def shrink(self, x_MK: Tensor, lora_A_RK: Tensor) -> Tensor:
        if not self._kernels:
            return super().shrink(x_MK, lora_A_RK)
        s_MR = x_MK.new_empty(x_MK.shape[0], lora_A_RK.shape[0])
        launch = shrink_launch(
            _rows(x_MK), _rows(lora_A_RK), s_MR, self._chip, seed=self._device_seed, threshold=self._threshold
        )
        launch.run()
        return s_MR

    def linear(
        self, x_MK: Tensor, weight_OK: Tensor, bias_O: Tensor | None, s_MR: Tensor, lora_B_OR: Tensor, alpha: float
    ) -> Tensor:
        if not self._fused:
            return super().linear(x_MK, weight_OK, bias_O, s_MR, lora_B_OR, alpha)
        y_MO = x_MK.new_empty(x_MK.shape[0], weight_OK.shape[0])
        bias_O = None if bias_O is None else bias_O.contiguous()
        # no mask: what is dropped is the update's input, so that S is without it already
        gemm_launch(_rows(x_MK), weight_OK.T, s_MR, lora_B_OR.T, y_MO, self._chip, alpha=alpha, bias_N=bias_O).run()
        return y_MO

    def down(
        self, dy_MO: Tensor, lora_B_OR: Tensor, s_MR: Tensor, alpha: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        if not down_pays(lora_B_OR.shape[1]):
            return super().down(dy_MO, lora_B_OR, s_MR, alpha, dtype)
        launch, dS_PMR, dB_POR = down_launch(_rows(dy_MO), _rows(lora_B_OR), s_MR, self._chip, alpha=alpha)
        launch.run()
        return _sum(dS_PMR, dy_MO.dtype), _sum(dB_POR, dtype)

    def grad_A(self, dS_MR: Tensor, x_MK: Tensor, dtype: torch.dtype) -> Tensor:
        if not self._kernels:
            return super().grad_A(dS_MR, x_MK, dtype)
        launch, dA_PRK = grad_a_launch(
            _rows(dS_MR), _rows(x_MK), self._chip, seed=self._device_seed, threshold=self._threshold
        )
        launch.run()
        return _sum(dA_PRK, dtype)

    def grad_x(self, branches: Iterable[tuple[Tensor, Tensor]], dS_MR: Tensor, lora_A_RK: Tensor) -> Tensor:
        if not self._kernels:
            return super().grad_x(branches, dS_MR, lora_A_RK)
        dX_MK = dS_MR.new_empty(dS_MR.shape[0], lora_A_RK.shape[1])
        dS_MR, seed, threshold = _rows(dS_MR), self._device_seed, self._threshold
        branches = iter(branches)
        if self._fused:
            dy_MO, weight_OK = next(branches)
            gemm_launch(
                _rows(dy_MO), weight_OK, dS_MR, lora_A_RK, dX_MK, self._chip, seed=seed, threshold=threshold
            ).run()
        else:
            outer_launch(dS_MR, lora_A_RK, dX_MK, self._chip, seed=seed, threshold=threshold).run()
        for dy_MO, weight_OK in branches:
            dX_MK.addmm_(dy_MO, weight_OK)
        return dX_MK


def _rows(matrix: Tensor) -> Tensor:
    """Rows without gaps, which the kernels read; a copy only of what has others, such as an expanded gradient."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    sum_parts_launch(parts, out).run()
    return out
