"""This benchmark measures `linear_kl`: hidden rows and heads of a student and a teacher -> divergence and gradients.

Peers were read in liger-kernel 0.8.5 and trl 1.16.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    import_from,
    needs_gpu,
    own_provider,
)
from sftx_kernels.bench.cross_entropy import UPSTREAM, make_labels
from sftx_kernels.cross_entropy import IGNORE_INDEX
from sftx_kernels.linear_kl import TeacherHead, linear_kl
from sftx_kernels.triton.launch import Work

DIVERGENCES: Final = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}
"""The beta of each divergence."""

_CHUNK_ELEMENTS = 1 << 26  # of fp64 logits of each model in a reference: 0.5 GB


@dataclass(frozen=True)
class LinearKLShape(Shape):
    """The inputs are hidden rows [rows, hidden] and [rows, teacher_hidden], a head of each, and labels.

    The labels only say which rows count.
    """

    op: ClassVar = "linear-kl"
    dispatched_as: ClassVar = "linear_kl"
    hidden: int
    teacher_hidden: int
    vocab: int
    divergence: str = "forward"
    trained: bool = False  # the student's head gets a gradient

    def __str__(self) -> str:
        kind = "trained" if self.trained else "frozen"
        return f"{self.rows}x{self.hidden}/{self.teacher_hidden}x{self.vocab} {self.divergence} {kind}"

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """Count 2MDV and 2MHV for the logits of the M valid rows, 2MDV for dX, and 2MDV for dW if the head trains."""
        product, teacher = (2 * num_valid * width * self.vocab for width in (self.hidden, self.teacher_hidden))
        weight = self.vocab * self.hidden * itemsize
        read = (num_valid + self.vocab) * (self.hidden + self.teacher_hidden) * itemsize + self.rows * 8
        written = self.rows * self.hidden * itemsize + self.trained * weight
        back = (1 + self.trained) * product
        return {
            "forward": Work(product + teacher, read),
            "backward": Work(back, num_valid * self.hidden * itemsize + weight + written),
            "both": Work(product + teacher + back, read + written),
        }

    def make_problem(self, case: Case, device: torch.device) -> Problem:
        random = Random(case, device)
        hidden_ND, teacher_NH = random.normal(self.rows, self.hidden), random.normal(self.rows, self.teacher_hidden)
        weight_VD = random.normal(self.vocab, self.hidden, std=self.hidden**-0.5)
        teacher_VH = random.normal(self.vocab, self.teacher_hidden, std=self.teacher_hidden**-0.5)
        labels_N = make_labels(random, case, torch.zeros(self.vocab, device=device))
        return KLProblem(case, self, hidden_ND, weight_VD, teacher_NH, teacher_VH, labels_N)


@dataclass
class KLProblem:
    """A KLProblem has the inputs of a call, whose loss is a sum."""

    case: Case
    shape: LinearKLShape
    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_NH: Tensor
    teacher_VH: Tensor
    labels_N: Tensor

    @property
    def beta(self) -> float:
        return DIVERGENCES[self.shape.divergence]

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.full_like(outputs[0], UPSTREAM)]

    def reference(self, flops_per_s: float) -> Reference:
        """Return loss, d_input and, where the head trains, d_weight, computed by autograd chunk by chunk."""
        valid_M = (self.labels_N != IGNORE_INDEX).nonzero().squeeze(1)
        rows_M = affordable_rows(valid_M, self.case, flops_per_s)
        weight_VD = self.weight_VD.double().requires_grad_(self.shape.trained)
        teacher_VH = self.teacher_VH.double()
        d_input_ND = torch.zeros_like(self.hidden_ND, dtype=torch.float64)
        loss = torch.zeros((), dtype=torch.float64, device=self.hidden_ND.device)
        for rows_C in rows_M.split(max(1, _CHUNK_ELEMENTS // self.shape.vocab)):
            x_CD = self.hidden_ND[rows_C].double().requires_grad_()
            log_q_CV = F.linear(self.teacher_NH[rows_C].double(), teacher_VH).log_softmax(1)
            chunk = divergence(F.linear(x_CD, weight_VD).log_softmax(1), log_q_CV, self.beta).sum()
            (chunk * UPSTREAM).backward()
            loss += chunk.detach()
            assert x_CD.grad is not None
            d_input_ND[rows_C] = x_CD.grad
        if rows_M.shape != valid_M.shape:
            return Reference({"d_input": d_input_ND[rows_M]}, rows_M, f"d_input of {len(rows_M)} rows")
        values = {"loss": loss, "d_input": d_input_ND}
        if self.shape.trained:
            values["d_weight"] = torch.zeros_like(weight_VD) if weight_VD.grad is None else weight_VD.grad
        return Reference(values, None, "all rows")


# ---- providers


def divergence(log_p_NV: Tensor, log_q_NV: Tensor, beta: float) -> Tensor:
    """Return the divergence of each row as TRL and Liger compute it, term by term by `F.kl_div`."""

    def kl(of_NV: Tensor, from_NV: Tensor) -> Tensor:
        return F.kl_div(from_NV, of_NV, reduction="none", log_target=True).sum(1)

    if beta == 0:
        return kl(log_q_NV, log_p_NV)
    if beta == 1:
        return kl(log_p_NV, log_q_NV)
    shares = torch.tensor([1 - beta, beta], dtype=log_p_NV.dtype, device=log_p_NV.device).log()
    log_m_NV = torch.logsumexp(torch.stack((log_p_NV + shares[0], log_q_NV + shares[1])), 0)
    return beta * kl(log_q_NV, log_m_NV) + (1 - beta) * kl(log_p_NV, log_m_NV)


Loss = Callable[[Tensor, Tensor, KLProblem], Any]
"""A Loss is a function of the student's (hidden_ND, weight_VD), and of the problem for all else."""


def _prepared(problem: KLProblem, loss: Loss) -> Prepared:
    hidden_ND = problem.hidden_ND.detach().requires_grad_()
    weight_VD = problem.weight_VD.detach().requires_grad_(problem.shape.trained)
    leaves = {"d_input": hidden_ND} | ({"d_weight": weight_VD} if problem.shape.trained else {})
    return Prepared(lambda: (loss(hidden_ND, weight_VD, problem),), leaves)


def _sftx(**options: Any) -> Callable[[KLProblem], Prepared]:
    def loss(hidden_ND: Tensor, weight_VD: Tensor, problem: KLProblem) -> Tensor:
        teacher, num_valid = TeacherHead(problem.teacher_NH, problem.teacher_VH), problem.case.num_valid
        return linear_kl(
            hidden_ND, weight_VD, problem.labels_N, teacher, num_valid=num_valid, beta=problem.beta, **options
        ).loss

    return lambda problem: _prepared(problem, loss)


def _torch(*, is_compiled: bool = False) -> Callable[[KLProblem], Prepared]:
    """Materialise the logits of both, of the rows that count, with softmax in fp32."""

    def dense(
        hidden_ND: Tensor, weight_VD: Tensor, teacher_NH: Tensor, teacher_VH: Tensor, rows_M: Tensor, beta: float
    ) -> Tensor:
        with torch.no_grad():
            log_q_MV = F.linear(teacher_NH[rows_M], teacher_VH).float().log_softmax(1)
        return divergence(F.linear(hidden_ND[rows_M], weight_VD).float().log_softmax(1), log_q_MV, beta).sum()

    def prepare(problem: KLProblem) -> Prepared:
        function = compiled(dense) if is_compiled else dense
        rows_M = (problem.labels_N != IGNORE_INDEX).nonzero().squeeze(1)

        def loss(hidden_ND: Tensor, weight_VD: Tensor, problem: KLProblem) -> Tensor:
            return function(hidden_ND, weight_VD, problem.teacher_NH, problem.teacher_VH, rows_M, problem.beta)

        return _prepared(problem, loss)

    return prepare


def _liger(problem: KLProblem) -> Prepared:
    """Its loss is a mean over the rows that count, and it always computes the gradient of the head."""
    make = import_from("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    function = make(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=problem.beta)
    num_valid = max(1, problem.case.num_valid)

    def loss(hidden_ND: Tensor, weight_VD: Tensor, problem: KLProblem) -> Any:
        mean = function(hidden_ND, weight_VD, problem.teacher_NH, problem.teacher_VH, problem.labels_N)
        return mean * num_valid

    return _prepared(problem, loss)


_OP: Final = LinearKLShape.op
PROVIDERS: Final[tuple[Provider, ...]] = (
    own_provider("sftx", _OP, _sftx()),
    own_provider("sftx-torch", _OP, _sftx(backend="torch"), needs_gpu),
    Provider("torch-eager", _OP, _torch()),
    Provider("torch-compile", _OP, _torch(is_compiled=True)),
    Provider("liger-kernel", _OP, _liger, "liger_kernel", "liger-kernel"),
)
