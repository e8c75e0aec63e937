"""The inputs of a case, made from a fixed seed on the device, and what the answer is in fp64.

The reference goes over the rows chunk by chunk. Where fp64 is slow (a large case on a CPU, a consumer GPU) it is
made for as many rows as fit a time, and then only what belongs to a row is compared: the gradient of the input,
for LoRA the output too. The result says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sftx_kernels import IGNORE_INDEX
from sftx_kernels.bench.cases import Case, CrossEntropyShape, LinearCrossEntropyShape, LoraShape

UPSTREAM = 0.5
"""The gradient that a loss gets: exact in every dtype, and not 1, which some implementations look for."""
SCALING = 2.0

_SEED = 0
_REFERENCE_S = 10.0
_CHUNK_ELEMENTS = 1 << 27  # of fp64 logits: 1 GB


@dataclass(frozen=True)
class Reference:
    """Exact values by name; `rows` says which rows they are of, None for all."""

    values: Mapping[str, Tensor]
    rows: Tensor | None
    note: str

    def error(self, actual: Mapping[str, Tensor]) -> tuple[float, str]:
        """The largest relative norm of the error of a value, and that value's name."""
        errors = {}
        for name, exact in self.values.items():
            value = actual[name].detach()
            value = value if self.rows is None else value.index_select(0, self.rows)
            norm = exact.norm().item()
            errors[name] = (value.double() - exact).norm().item() / (norm or 1.0)
        # NaN is the worst of all, which max by itself does not know.
        worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
        return errors[worst], worst


@dataclass
class LossProblem:
    """Cross-entropy, on logits or on hidden rows and a head (then `weight_VD` is not None)."""

    case: Case
    input_NE: Tensor  # logits [N, V] or hidden rows [N, D]
    weight_VD: Tensor | None
    labels_N: Tensor
    num_valid: int

    @property
    def trained(self) -> bool:
        return isinstance(self.case.shape, LinearCrossEntropyShape) and self.case.shape.trained

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.full_like(outputs[0], UPSTREAM)]

    def reference(self, flops_per_s: float) -> Reference:
        """loss, d_input and, where the head trains, d_weight."""
        valid_M = (self.labels_N != IGNORE_INDEX).nonzero().squeeze(1)
        rows_M = _affordable(valid_M, self.case.least()["both"].flops, flops_per_s)
        weight_VD = None if self.weight_VD is None else self.weight_VD.double()
        V = self.input_NE.shape[1] if weight_VD is None else weight_VD.shape[0]
        d_input_NE = torch.zeros_like(self.input_NE, dtype=torch.float64)
        d_weight_VD = torch.zeros_like(weight_VD) if weight_VD is not None and self.trained else None
        loss = torch.zeros((), dtype=torch.float64, device=self.input_NE.device)
        for rows_C in rows_M.split(max(1, _CHUNK_ELEMENTS // V)):
            x_CE = self.input_NE[rows_C].double()
            logits_CV = x_CE if weight_VD is None else x_CE @ weight_VD.T
            log_p_CV, labels_C1 = logits_CV.log_softmax(1), self.labels_N[rows_C, None]
            loss -= log_p_CV.gather(1, labels_C1).sum()
            d_CV = log_p_CV.exp_()
            d_CV.scatter_add_(1, labels_C1, d_CV.new_full(labels_C1.shape, -1.0))
            d_CV *= UPSTREAM
            d_input_NE[rows_C] = d_CV if weight_VD is None else d_CV @ weight_VD
            if d_weight_VD is not None:
                d_weight_VD.addmm_(d_CV.T, x_CE)
        if rows_M.shape != valid_M.shape:
            return Reference({"d_input": d_input_NE[rows_M]}, rows_M, f"d_input of {len(rows_M)} rows")
        values = {"loss": loss, "d_input": d_input_NE}
        return Reference(values if d_weight_VD is None else values | {"d_weight": d_weight_VD}, None, "all rows")


@dataclass
class LoraProblem:
    """Linears that share x. The names of its values: y0, d_x, d_A0, d_B0, y1, ..."""

    case: Case
    x_MK: Tensor
    weights: list[Tensor]  # [O, K] each
    lora_As: list[Tensor]  # [R, K]
    lora_Bs: list[Tensor]  # [O, R]
    upstreams: list[Tensor]  # [M, O]
    dropout: float
    seed: Tensor = field(default_factory=lambda: torch.tensor(7))  # 0-d int64, on the host

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [dy.view(y.shape).to(y.dtype) for dy, y in zip(self.upstreams, outputs, strict=True)]

    def reference(self, flops_per_s: float) -> Reference | None:
        """None with dropout: each provider draws a mask of its own."""
        if self.dropout:
            return None
        all_rows = torch.arange(self.x_MK.shape[0], device=self.x_MK.device)
        rows_C = _affordable(all_rows, self.case.least()["both"].flops, flops_per_s)
        whole = rows_C.shape == all_rows.shape
        x_CK = self.x_MK[rows_C].double()
        d_x_CK = torch.zeros_like(x_CK)
        values = {}
        for number, tensors in enumerate(zip(self.weights, self.lora_As, self.lora_Bs, self.upstreams, strict=True)):
            weight_OK, A_RK, B_OR = (tensor.double() for tensor in tensors[:3])
            dy_CO, s_CR = tensors[3][rows_C].double(), x_CK @ A_RK.T
            ds_CR = SCALING * (dy_CO @ B_OR)
            values[f"y{number}"] = x_CK @ weight_OK.T + SCALING * (s_CR @ B_OR.T)
            d_x_CK += dy_CO @ weight_OK + ds_CR @ A_RK
            if whole:
                values[f"d_A{number}"] = ds_CR.T @ x_CK
                values[f"d_B{number}"] = SCALING * (dy_CO.T @ s_CR)
        values["d_x"] = d_x_CK
        return Reference(values, None, "all rows") if whole else Reference(values, rows_C, f"{len(rows_C)} rows")


Problem = LossProblem | LoraProblem


def make_problem(case: Case, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(_SEED)
    shape, dtype = case.shape, case.torch_dtype

    def normal(*sizes: int, std: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).mul_(std).to(dtype)

    if isinstance(shape, LoraShape):
        M, K, R, outs = shape.rows, shape.in_features, shape.rank, shape.out_features
        return LoraProblem(
            case,
            normal(M, K),
            [normal(size, K, std=K**-0.5) for size in outs],
            [normal(R, K, std=K**-0.5) for _ in outs],
            [normal(size, R, std=R**-0.5) for size in outs],
            [normal(M, size) for size in outs],
            shape.dropout,
        )
    N, V = shape.rows, shape.vocab
    # Zipf: the token of rank k has logit -log k on top of the noise, so about the probability 1/k.
    ranks_V = torch.randperm(V, generator=generator, device=device) + 1
    bias_V = -ranks_V.float().log() if shape.logits == "zipf" else torch.zeros(V, device=device)
    weight_VD = None
    if isinstance(shape, CrossEntropyShape):
        input_NE = (normal(N, V).float() + bias_V).to(dtype)
    else:
        # A last feature that is 1 in every row carries the bias through the head's product.
        input_NE, weight_VD = normal(N, shape.hidden), normal(V, shape.hidden, std=shape.hidden**-0.5)
        if shape.logits == "zipf":
            input_NE[:, -1], weight_VD[:, -1] = 1.0, bias_V.to(dtype)
    labels_N = bias_V.softmax(0).multinomial(N, replacement=True, generator=generator)
    labels_N[torch.randperm(N, generator=generator, device=device)[case.num_valid :]] = IGNORE_INDEX
    return LossProblem(case, input_NE, weight_VD, labels_N, case.num_valid)


def _affordable(rows: Tensor, flops: int, flops_per_s: float) -> Tensor:
    """As many of the rows, evenly spread, as the reference's share of `flops` allows."""
    share = _REFERENCE_S * flops_per_s / max(1, flops)
    if share >= 1 or not len(rows):
        return rows
    count = max(1, int(len(rows) * share))
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).long()]
