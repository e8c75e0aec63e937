"""This benchmark measures `lora_linear` and `lora_linears`: x, linears, updates -> outputs, gradients of x, A and B.

Peers were read in unsloth 2026.10.9 and peft 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple

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
    import_from,
    needs_gpu,
    own_provider,
)
from sftx_kernels.lora import lora_linear, lora_linears
from sftx_kernels.nf4 import NF4Weight, quantize_nf4
from sftx_kernels.quantized import dequantize
from sftx_kernels.triton.launch import Work

SCALING = 2.0


@dataclass(frozen=True)
class LoraShape(Shape):
    """The input x [rows, in_features] goes through linears of these out_features, each with an update of this rank."""

    op: ClassVar = "lora"
    dispatched_as: ClassVar = "lora_linear"
    has_labels: ClassVar = False
    floor: ClassVar = "frozen-linear"
    in_features: int
    out_features: tuple[int, ...]  # several: linears that share x, as q, k and v do
    rank: int = 16
    dropout: float = 0.0
    nf4: bool = False  # sftx gets the weights in four bits with quantised scales, the others the same weights dense

    def __str__(self) -> str:
        outs = "+".join(map(str, self.out_features))
        dropout = f" p{self.dropout:g}" if self.dropout else ""
        return f"{self.rows}x{self.in_features}x{outs} r{self.rank}{dropout}{' nf4' * self.nf4}"

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """Count in forward x W^T, S = x A^T, S B^T; in backward dY W, dS = dY B, dS A, dA = dS^T x, dB = dY^T S.

        x, dY and W are read once in each pass that needs them; S, which is small, is neither read nor written.
        """
        M, K, R, outs, num = self.rows, self.in_features, self.rank, sum(self.out_features), len(self.out_features)
        base, down, up = 2 * M * K * outs, 2 * M * K * R * num, 2 * M * R * outs
        x, y, lora = M * K, M * outs, (num * K + outs) * R
        weight = round(outs * K * (1 / 2 + 1 / 64 + 4 / (64 * 256))) if self.nf4 else outs * K * itemsize
        forward = Work(base + down + up, (x + lora + y) * itemsize + weight)
        backward = Work(base + 2 * down + 2 * up, (y + lora + x + x + lora) * itemsize + weight)
        both = Work(forward.flops + backward.flops, forward.num_bytes + backward.num_bytes)
        return {"forward": forward, "backward": backward, "both": both}

    def make_problem(self, case: Case, device: torch.device) -> Problem:
        M, K, R, outs = self.rows, self.in_features, self.rank, self.out_features
        normal = Random(case, device).normal
        x_MK = normal(M, K)
        weights = [normal(size, K, std=K**-0.5) for size in outs]
        quantized = [quantize_nf4(weight_OK, double=True) for weight_OK in weights] if self.nf4 else None
        return LoraProblem(
            case,
            x_MK,
            weights if quantized is None else [dequantize(weight, x_MK.dtype) for weight in quantized],
            [normal(R, K, std=K**-0.5) for _ in outs],
            [normal(size, R, std=R**-0.5) for size in outs],
            [normal(M, size) for size in outs],
            self.dropout,
            quantized,
        )


@dataclass
class LoraProblem:
    """A LoraProblem has linears that share x. Its values are called y0, d_x, d_A0, d_B0, y1, ..."""

    case: Case
    x_MK: Tensor
    weights: list[Tensor]  # [O, K] each
    lora_As: list[Tensor]  # [R, K]
    lora_Bs: list[Tensor]  # [O, R]
    upstreams: list[Tensor]  # [M, O]
    dropout: float
    quantized: list[NF4Weight] | None = None  # `weights` in four bits
    seed: Tensor = field(default_factory=lambda: torch.tensor(7))  # 0-d int64, on the host

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [dy.view(y.shape).to(y.dtype) for dy, y in zip(self.upstreams, outputs, strict=True)]

    def reference(self, flops_per_s: float) -> Reference | None:
        """Return the exact outputs and gradients; None with dropout, since each provider draws its own mask."""
        if self.dropout:
            return None
        all_rows = torch.arange(self.x_MK.shape[0], device=self.x_MK.device)
        rows_C = affordable_rows(all_rows, self.case, flops_per_s)
        has_all_rows = rows_C.shape == all_rows.shape
        x_CK = self.x_MK[rows_C].double()
        d_x_CK = torch.zeros_like(x_CK)
        values = {}
        for number, tensors in enumerate(zip(self.weights, self.lora_As, self.lora_Bs, self.upstreams, strict=True)):
            weight_OK, A_RK, B_OR = (tensor.double() for tensor in tensors[:3])
            dy_CO, s_CR = tensors[3][rows_C].double(), x_CK @ A_RK.T
            ds_CR = SCALING * (dy_CO @ B_OR)
            values[f"y{number}"] = x_CK @ weight_OK.T + SCALING * (s_CR @ B_OR.T)
            d_x_CK += dy_CO @ weight_OK + ds_CR @ A_RK
            if has_all_rows:
                values[f"d_A{number}"] = ds_CR.T @ x_CK
                values[f"d_B{number}"] = SCALING * (dy_CO.T @ s_CR)
        values["d_x"] = d_x_CK
        if has_all_rows:
            return Reference(values, None, "all rows")
        return Reference(values, rows_C, f"{len(rows_C)} rows")


# ---- providers


class _Leaves(NamedTuple):
    x_MK: Tensor
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]

    @classmethod
    def of(cls, problem: LoraProblem) -> _Leaves:
        fresh = [tensor.detach().requires_grad_() for tensor in (problem.x_MK, *problem.lora_As, *problem.lora_Bs)]
        num = len(problem.lora_As)
        return cls(fresh[0], fresh[1 : 1 + num], fresh[1 + num :])

    def named(self) -> dict[str, Tensor]:
        names = {"d_x": self.x_MK}
        names |= {f"d_A{number}": A for number, A in enumerate(self.lora_As)}
        return names | {f"d_B{number}": B for number, B in enumerate(self.lora_Bs)}


def _prepared_separately(
    problem: LoraProblem, linear: Callable[..., Tensor], weights: Sequence[Tensor | NF4Weight] | None = None
) -> Prepared:
    """Prepare a function of (x, weight, A, B), called for each linear."""
    leaves = _Leaves.of(problem)
    triples = list(zip(weights or problem.weights, leaves.lora_As, leaves.lora_Bs, strict=True))
    return Prepared(lambda: tuple(linear(leaves.x_MK, *triple) for triple in triples), leaves.named())


def _sftx(*, grouped: bool = True, backend: str | None = None) -> Callable[[LoraProblem], Prepared]:
    def prepare(problem: LoraProblem) -> Prepared:
        options: Any = {"scaling": SCALING, "dropout_p": problem.dropout, "seed": problem.seed, "backend": backend}
        weights: Sequence[Tensor | NF4Weight] = problem.quantized or problem.weights
        if not grouped or len(weights) == 1:
            return _prepared_separately(problem, lambda *tensors: lora_linear(*tensors, **options), weights)
        leaves = _Leaves.of(problem)
        x_MK, lora_As, lora_Bs = leaves
        return Prepared(lambda: lora_linears(x_MK, weights, lora_As, lora_Bs, **options), leaves.named())

    return prepare


def _needs_group(case: Case, _device: torch.device) -> str | None:
    return None if len(getattr(case.shape, "out_features", ())) > 1 else "is sftx where there is one linear"


def _frozen_linear(problem: LoraProblem) -> Prepared:
    """Compute the linears without any update: the floor."""
    x_MK = problem.x_MK.detach().requires_grad_()
    return Prepared(lambda: tuple(F.linear(x_MK, weight_OK) for weight_OK in problem.weights), {"d_x": x_MK})


def _torch(*, is_compiled: bool = False) -> Callable[[LoraProblem], Prepared]:
    def linear(x_MK: Tensor, weight_OK: Tensor, A_RK: Tensor, B_OR: Tensor, dropout: float) -> Tensor:
        return F.linear(x_MK, weight_OK) + F.linear(F.linear(F.dropout(x_MK, dropout), A_RK), B_OR) * SCALING

    def prepare(problem: LoraProblem) -> Prepared:
        function: Callable[..., Tensor] = compiled(linear) if is_compiled else linear
        return _prepared_separately(problem, lambda *tensors: function(*tensors, problem.dropout))

    return prepare


def _peft(problem: LoraProblem) -> Prepared:
    """Use PEFT's LoRA layers, with A and B in the dtype of the base as for every provider here."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [str(number) for number in range(len(problem.weights))]
    rank = problem.lora_As[0].shape[0]
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), lora_dropout=problem.dropout, target_modules=names)
    linears = torch.nn.ModuleList()
    for weight_OK in problem.weights:
        linear = torch.nn.Linear(weight_OK.shape[1], weight_OK.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight_OK, requires_grad=False)
        linears.append(linear)
    layers: Any = inject_adapter_in_model(config, linears)
    for layer, A_RK, B_OR in zip(layers, problem.lora_As, problem.lora_Bs, strict=True):
        layer.lora_A["default"].weight = torch.nn.Parameter(A_RK.detach())
        layer.lora_B["default"].weight = torch.nn.Parameter(B_OR.detach())
    leaves = _Leaves.of(problem)._replace(
        lora_As=[layer.lora_A["default"].weight for layer in layers],
        lora_Bs=[layer.lora_B["default"].weight for layer in layers],
    )
    return Prepared(lambda: tuple(layer(leaves.x_MK) for layer in layers), leaves.named())


def _unsloth(problem: LoraProblem) -> Prepared:
    """Use LoRA_W for one linear, LoRA_QKV for three; the latter not in place, which would overwrite x in each round."""
    single, grouped = (import_from("unsloth.kernels.fast_lora", name) for name in ("LoRA_W", "LoRA_QKV"))
    leaves, dropout = _Leaves.of(problem), problem.dropout or None
    linears: list[Any] = []
    for weight_OK, A_RK, B_OR in zip(problem.weights, leaves.lora_As, leaves.lora_Bs, strict=True):
        linears += [weight_OK, None, A_RK, B_OR, SCALING]

    def forward() -> tuple[Tensor, ...]:
        x_1MK = leaves.x_MK[None]  # it takes [batch, length, K]
        if len(problem.weights) == 1:
            return (single.apply(x_1MK, *linears, dropout),)
        outputs: tuple[Tensor, ...] = grouped.apply(x_1MK, *linears, False, dropout and (dropout,) * 3)
        return outputs

    return Prepared(forward, leaves.named())


def _needs_one_or_three(case: Case, device: torch.device) -> str | None:
    count = len(getattr(case.shape, "out_features", ()))
    return needs_gpu(case, device) or (None if count in (1, 3) else f"has no function for {count} linears")


_OP: Final = LoraShape.op
PROVIDERS: Final[tuple[Provider, ...]] = (
    own_provider("sftx", _OP, _sftx()),
    own_provider("sftx-separate", _OP, _sftx(grouped=False), _needs_group),
    own_provider("sftx-torch", _OP, _sftx(backend="torch"), needs_gpu),
    Provider("frozen-linear", _OP, _frozen_linear),
    Provider("torch-eager", _OP, _torch()),
    Provider("torch-compile", _OP, _torch(is_compiled=True)),
    Provider("peft", _OP, _peft, "peft", "peft"),
    # Last, because importing it patches transformers and peft.
    Provider("unsloth", _OP, _unsloth, "unsloth", "unsloth", _needs_one_or_three),
)
