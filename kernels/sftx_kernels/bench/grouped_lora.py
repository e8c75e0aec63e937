"""This benchmark measures `grouped_lora_linear`: rows sorted by expert, stacked weights, updates -> output, gradients.

The groups are uneven, as a router makes them: group e has a share of the rows that falls as 1 / (e + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from sftx_kernels.bench.cases import (
    Case,
    Pass,
    Prepared,
    Problem,
    Provider,
    Random,
    Reference,
    Shape,
    affordable_rows,
    compiled,
    own_provider,
)
from sftx_kernels.bench.lora import SCALING
from sftx_kernels.grouped_lora import grouped_lora_linear
from sftx_kernels.triton.launch import Work


@dataclass(frozen=True)
class GroupedLoraShape(Shape):
    """The input x [rows, in_features] is sorted by expert; each has a linear layer and an update of this rank."""

    op: ClassVar = "grouped-lora"
    dispatched_as: ClassVar = "lora_linear"
    has_labels: ClassVar = False
    floor: ClassVar = "frozen-linear"
    experts: int
    in_features: int
    width: int  # out_features of each expert
    rank: int = 16

    def __str__(self) -> str:
        return f"{self.rows}x{self.in_features}x{self.width} e{self.experts} r{self.rank}"

    def ends(self) -> list[int]:
        """Return the end of each expert's rows. Where rows are few, the last experts have none."""
        weights = torch.arange(1, self.experts + 1, dtype=torch.float64).reciprocal()
        ends: list[int] = (weights.cumsum(0) / weights.sum() * self.rows).round().long().tolist()
        return ends

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """Count what `LoraShape` counts: each row has the products of its own expert alone.

        The weights of the experts that have rows are read, each once a pass.
        """
        M, K, R, O = self.rows, self.in_features, self.rank, self.width  # noqa: E741
        active = sum(start < end for start, end in pairwise([0, *self.ends()]))
        base, down, up = 2 * M * K * O, 2 * M * K * R, 2 * M * R * O
        x, y, weight, lora = M * K, M * O, active * O * K, active * (K + O) * R
        forward = Work(base + down + up, (x + weight + lora + y) * itemsize)
        backward = Work(base + 2 * down + 2 * up, (y + weight + lora + x + x + lora) * itemsize)
        both = Work(forward.flops + backward.flops, forward.num_bytes + backward.num_bytes)
        return {"forward": forward, "backward": backward, "both": both}

    def make_problem(self, case: Case, device: torch.device) -> Problem:
        M, E, K, R, O = self.rows, self.experts, self.in_features, self.rank, self.width  # noqa: E741
        normal = Random(case, device).normal
        return GroupedLoraProblem(
            case,
            self.ends(),
            normal(M, K),
            normal(E, O, K, std=K**-0.5),
            normal(E, R, K, std=K**-0.5),
            normal(E, O, R, std=R**-0.5),
            normal(M, O),
        )


@dataclass
class GroupedLoraProblem:
    """A GroupedLoraProblem has stacked layers. Its values are called y0, d_x, d_A and d_B."""

    case: Case
    ends: list[int]
    x_MK: Tensor
    weight_EOK: Tensor
    lora_A: Tensor  # [E, R, K]
    lora_B: Tensor  # [E, O, R]
    dy_MO: Tensor

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [self.dy_MO.to(y.dtype) for y in outputs]

    def reference(self, flops_per_s: float) -> Reference | None:
        """Return the exact output and gradients, of some rows where fp64 is too slow for all."""
        all_rows = torch.arange(self.x_MK.shape[0], device=self.x_MK.device)
        rows_C = affordable_rows(all_rows, self.case, flops_per_s)
        has_all_rows = rows_C.shape == all_rows.shape
        x_CK, dy_CO = self.x_MK[rows_C].double(), self.dy_MO[rows_C].double()
        y_CO, d_x_CK = torch.zeros_like(dy_CO), torch.zeros_like(x_CK)
        d_A, d_B = (
            torch.zeros_like(self.lora_A, dtype=torch.float64),
            torch.zeros_like(self.lora_B, dtype=torch.float64),
        )
        for e, (start, end) in enumerate(pairwise([0, *self.ends])):
            mine = (rows_C >= start) & (rows_C < end)
            W_OK, A_RK, B_OR = (stack[e].double() for stack in (self.weight_EOK, self.lora_A, self.lora_B))
            x, dy = x_CK[mine], dy_CO[mine]
            y_CO[mine] = x @ W_OK.T + SCALING * (x @ A_RK.T @ B_OR.T)
            d_x_CK[mine] = dy @ W_OK + SCALING * (dy @ B_OR @ A_RK)
            d_A[e], d_B[e] = SCALING * (dy @ B_OR).T @ x, SCALING * dy.T @ (x @ A_RK.T)
        values = {"y0": y_CO, "d_x": d_x_CK}
        if has_all_rows:
            return Reference(values | {"d_A": d_A, "d_B": d_B}, None, "all rows")
        return Reference(values, rows_C, f"{len(rows_C)} rows")


# ---- providers


def _prepared(problem: GroupedLoraProblem, function: Callable[..., Tensor], *rest: Any) -> Prepared:
    """Prepare a function of (x, weight, A, B, *rest)."""
    x, A, B = (t.detach().requires_grad_() for t in (problem.x_MK, problem.lora_A, problem.lora_B))
    return Prepared(lambda: (function(x, problem.weight_EOK, A, B, *rest),), {"d_x": x, "d_A": A, "d_B": B})


def _sftx(problem: GroupedLoraProblem) -> Prepared:
    offsets_E = torch.tensor(problem.ends, dtype=torch.int32, device=problem.x_MK.device)

    def function(x_MK: Tensor, weight_EOK: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return grouped_lora_linear(x_MK, weight_EOK, lora_A, lora_B, offsets_E, scaling=SCALING)

    return _prepared(problem, function)


def _loop(x_MK: Tensor, weight_EOK: Tensor, ends: list[int]) -> Tensor:
    return torch.cat([F.linear(x_MK[start:end], weight_EOK[e]) for e, (start, end) in enumerate(pairwise([0, *ends]))])


def _frozen_linear(problem: GroupedLoraProblem) -> Prepared:
    """Compute the linears without any update: the floor."""
    x_MK = problem.x_MK.detach().requires_grad_()
    return Prepared(lambda: (_loop(x_MK, problem.weight_EOK, problem.ends),), {"d_x": x_MK})


def _torch(*, is_compiled: bool = False) -> Callable[[GroupedLoraProblem], Prepared]:
    def function(x_MK: Tensor, weight_EOK: Tensor, lora_A: Tensor, lora_B: Tensor, ends: list[int]) -> Tensor:
        update = [
            F.linear(F.linear(x_MK[start:end], lora_A[e]), lora_B[e])
            for e, (start, end) in enumerate(pairwise([0, *ends]))
        ]
        return _loop(x_MK, weight_EOK, ends) + SCALING * torch.cat(update)

    return lambda problem: _prepared(problem, compiled(function) if is_compiled else function, problem.ends)


def _added_weights(problem: GroupedLoraProblem) -> Prepared:
    """Add every expert's B A to its weight, as PEFT (0.21) does, and multiply with the sum."""

    def function(x_MK: Tensor, weight_EOK: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return _loop(x_MK, torch.baddbmm(weight_EOK, lora_B, lora_A, alpha=SCALING), problem.ends)

    return _prepared(problem, function)


_OP: Final = GroupedLoraShape.op
PROVIDERS: Final[tuple[Provider, ...]] = (
    own_provider("sftx", _OP, _sftx),
    Provider("frozen-linear", _OP, _frozen_linear),
    Provider("torch-eager", _OP, _torch()),
    Provider("torch-compile", _OP, _torch(is_compiled=True)),
    Provider("added-weights", _OP, _added_weights),
)
