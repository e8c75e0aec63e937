"""This benchmark measures `rotary`: q, k, cos, sin -> q and k rotated and both gradients.

Its formula is `apply_rotary_pos_emb` of transformers. The peer was read in liger-kernel 0.6; it overwrites q and k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from sftx_kernels.bench.cases import Case, Pass, Problem, Provider, Random, Shape
from sftx_kernels.bench.elementwise import FormulaProblem, moved, providers
from sftx_kernels.rotary import rotary
from sftx_kernels.triton.launch import Work


@dataclass(frozen=True)
class RotaryShape(Shape):
    """The inputs are q [1, heads, rows, head_dim] and k [1, kv_heads, rows, head_dim], transposed [1, rows, ...]."""

    op: ClassVar = "rotary"
    dispatched_as: ClassVar = "rotary"
    has_labels: ClassVar = False
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.heads}+{self.kv_heads}x{self.head_dim}"

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """Read and write q and k, or their gradients, and read the half of cos and sin that says all."""
        size = self.rows * (self.heads + self.kv_heads) * self.head_dim
        num_bytes = (2 * size + self.rows * self.head_dim) * itemsize
        return moved(num_bytes, num_bytes, 3 * size, 3 * size)

    def make_problem(self, case: Case, device: torch.device) -> Problem:
        normal = Random(case, device).normal
        q, k, dq, dk = (
            normal(1, self.rows, heads, self.head_dim).transpose(1, 2) for heads in (self.heads, self.kv_heads) * 2
        )
        exponent = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
        angle = torch.arange(self.rows, device=device)[None, :, None].float() * 10_000.0**-exponent
        angle = torch.cat((angle, angle), -1)
        constants = [angle.cos().to(case.torch_dtype), angle.sin().to(case.torch_dtype)]
        return FormulaProblem(case, {"d_q": q, "d_k": k}, constants, [dq, dk], formula)


def formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos[:, None], sin[:, None]

    def turned(x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return torch.cat((-two, one), -1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


PROVIDERS: Final[tuple[Provider, ...]] = providers(
    RotaryShape.op, rotary, ("liger_kernel.transformers.functional", "liger_rope"),
    lambda function, q, k, cos, sin: function(q, k, cos, sin),
)  # fmt: skip
