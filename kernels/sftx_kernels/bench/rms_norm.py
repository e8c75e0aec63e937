"""This benchmark measures `rms_norm` with a residual: x, residual, frozen weight -> y, x + residual, gradients of both.

Its formula is `LlamaRMSNorm` of transformers. The peer was read in liger-kernel 0.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from sftx_kernels.bench.cases import Case, Pass, Prepared, Problem, Provider, Random
from sftx_kernels.bench.elementwise import FormulaProblem, RowsShape, moved, providers
from sftx_kernels.rms_norm import rms_norm
from sftx_kernels.triton.launch import Work

EPS: Final = 1e-5


@dataclass(frozen=True)
class RmsNormShape(RowsShape):
    """The inputs are x and residual [rows, width]."""

    op: ClassVar = "rms-norm"
    dispatched_as: ClassVar = "rms_norm"

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """Forward reads x and the residual and writes y and the sum; backward reads both gradients and the sum."""
        size, weight, rstd = self.rows * self.width, self.width * itemsize, self.rows * 4
        num_bytes = 4 * size * itemsize + weight + rstd
        return moved(num_bytes, num_bytes, 7 * size, 10 * size)

    def make_problem(self, case: Case, device: torch.device) -> Problem:
        normal = Random(case, device).normal
        x, residual, dy, d_total = (normal(self.rows, self.width) for _ in range(4))
        leaves = {"d_x": x, "d_residual": residual}
        return FormulaProblem(case, leaves, [normal(self.width)], [dy, d_total], formula)


def formula(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    total_ND = x_ND + residual_ND
    wide_ND = total_ND if total_ND.dtype == torch.float64 else total_ND.float()
    hat_ND = wide_ND * torch.rsqrt(wide_ND.pow(2).mean(-1, keepdim=True) + EPS)
    return weight_D * hat_ND.to(total_ND.dtype), total_ND


def _ours(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, *, backend: str | None) -> Any:
    return rms_norm(x_ND, weight_D, EPS, residual=residual_ND, backend=backend)


def _fused(problem: FormulaProblem) -> Prepared:
    """Call torch's own rms_norm, which rounds once."""

    def function(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        total_ND = x_ND + residual_ND
        return F.rms_norm(total_ND, weight_D.shape, weight_D, EPS), total_ND

    return problem.prepared(function)


_OP: Final = RmsNormShape.op
PROVIDERS: Final[tuple[Provider, ...]] = (
    *providers(
        _OP, _ours, ("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction"),
        lambda function, x_ND, residual_ND, weight_D: function.apply(x_ND, residual_ND, weight_D, EPS),
    ),
    Provider("torch-fused", _OP, _fused),
)  # fmt: skip
