"""This benchmark measures `swiglu`: gate, up -> silu(gate) * up and both gradients.

The peer was read in liger-kernel 0.6; its backward overwrites gate and up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from sftx_kernels.bench.cases import Case, Pass, Problem, Provider, Random
from sftx_kernels.bench.elementwise import FormulaProblem, RowsShape, moved, providers
from sftx_kernels.swiglu import swiglu
from sftx_kernels.triton.launch import Work


@dataclass(frozen=True)
class SwigluShape(RowsShape):
    """The inputs are gate and up [rows, width]."""

    op: ClassVar = "swiglu"
    dispatched_as: ClassVar = "swiglu"

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """Forward reads two and writes one; backward reads three and writes two."""
        size = self.rows * self.width
        return moved(3 * size * itemsize, 5 * size * itemsize, 6 * size, 12 * size)

    def make_problem(self, case: Case, device: torch.device) -> Problem:
        normal = Random(case, device).normal
        gate, up, dy = (normal(self.rows, self.width) for _ in range(3))
        return FormulaProblem(case, {"d_gate": gate, "d_up": up}, [], [dy], formula)


def formula(gate_ND: Tensor, up_ND: Tensor) -> Tensor:
    return F.silu(gate_ND) * up_ND


PROVIDERS: Final[tuple[Provider, ...]] = providers(
    SwigluShape.op, swiglu, ("liger_kernel.transformers.functional", "liger_swiglu"),
    lambda function, gate_ND, up_ND: function(gate_ND, up_ND),
)  # fmt: skip
