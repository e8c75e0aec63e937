"""This benchmark measures `cross_entropy`: logits and labels -> loss and gradient of the logits.

Peers were read in liger-kernel 0.8.5, quack-kernels 0.6.5 and unsloth 2026.10.9.
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
    needs_half,
    needs_hopper,
    own_provider,
)
from sftx_kernels.cross_entropy import IGNORE_INDEX, cross_entropy
from sftx_kernels.triton.launch import Work

UPSTREAM: Final = 0.5
"""This is the upstream gradient of a loss: exact in every dtype, and not 1, which some implementations special-case."""

_CHUNK_ELEMENTS = 1 << 27  # of fp64 logits in a reference: 1 GB


@dataclass(frozen=True)
class CrossEntropyShape(Shape):
    """The inputs are logits [rows, vocab] and labels."""

    op: ClassVar = "cross-entropy"
    dispatched_as: ClassVar = "cross_entropy"
    vocab: int
    logits: str = "random"  # or "zipf": the softmax follows Zipf's law, roughly as that of a trained model

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocab}" + (" zipf" if self.logits == "zipf" else "")

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """Count for each logit 3 operations for the sum of exponentials (subtract, exp, add) and 3 for the gradient."""
        read, written = num_valid * self.vocab * itemsize, self.rows * self.vocab * itemsize
        flops, labels = 3 * num_valid * self.vocab, self.rows * 8
        return {
            "forward": Work(flops, read + labels),
            "backward": Work(flops, read + written + labels),
            "both": Work(2 * flops, read + written + labels),
        }

    def make_problem(self, case: Case, device: torch.device) -> Problem:
        random = Random(case, device)
        bias_V = class_bias(random, self.vocab, self.logits)
        logits_NV = (random.normal(self.rows, self.vocab).float() + bias_V).to(case.torch_dtype)
        return LossProblem(case, logits_NV, None, make_labels(random, case, bias_V), case.num_valid)


def class_bias(random: Random, vocab: int, logits: str) -> Tensor:
    """Return what is added to the logits: for Zipf, the token of rank k gets -log k, so about the probability 1/k."""
    ranks_V = random.permutation(vocab) + 1
    return -ranks_V.float().log() if logits == "zipf" else torch.zeros(vocab, device=ranks_V.device)


def make_labels(random: Random, case: Case, bias_V: Tensor) -> Tensor:
    labels_N = bias_V.softmax(0).multinomial(case.shape.rows, replacement=True, generator=random.generator)
    labels_N[random.permutation(case.shape.rows)[case.num_valid :]] = IGNORE_INDEX
    return labels_N


@dataclass
class LossProblem:
    """A LossProblem has the inputs of a cross-entropy, on logits (`weight_VD` is None) or on hidden rows and a head."""

    case: Case
    input_NE: Tensor  # logits [N, V] or hidden rows [N, D]
    weight_VD: Tensor | None
    labels_N: Tensor
    num_valid: int
    trained: bool = False  # the head gets a gradient

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.full_like(outputs[0], UPSTREAM)]

    def reference(self, flops_per_s: float) -> Reference:
        """Return loss, d_input and, where the head trains, d_weight, computed chunk by chunk."""
        valid_M = (self.labels_N != IGNORE_INDEX).nonzero().squeeze(1)
        rows_M = affordable_rows(valid_M, self.case, flops_per_s)
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


# ---- providers

LossFunction = Callable[[Tensor, Tensor], Tensor]


def eager_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV, labels_N, reduction="sum")


def upcast_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Widen the logits to fp32 first, as the losses of transformers do."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")


def _prepared(problem: LossProblem, loss: LossFunction, *, overwrites: bool = False) -> Prepared:
    """Prepare a loss of (logits, labels); one that overwrites its logits gets a copy."""
    logits_NV = problem.input_NE.detach()
    logits_NV = (logits_NV.clone() if overwrites else logits_NV).requires_grad_()
    return Prepared(lambda: (loss(logits_NV, problem.labels_N),), {"d_input": logits_NV})


def _sftx(*, inplace: bool = False, backend: str | None = None) -> Callable[[LossProblem], Prepared]:
    def loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        logits_NV = logits_NV.view_as(logits_NV) if inplace else logits_NV  # inplace accepts no leaf
        return cross_entropy(logits_NV, labels_N, inplace=inplace, backend=backend).loss

    return lambda problem: _prepared(problem, loss, overwrites=inplace)


def _liger(problem: LossProblem) -> Prepared:
    """Liger overwrites the logits with their gradient, in the forward."""
    liger_cross_entropy = import_from("liger_kernel.transformers.functional", "liger_cross_entropy")
    return _prepared(problem, lambda z_NV, y_N: liger_cross_entropy(z_NV, y_N, reduction="sum"), overwrites=True)


def _quack(*, inplace: bool) -> Callable[[LossProblem], Prepared]:
    def prepare(problem: LossProblem) -> Prepared:
        quack_cross_entropy = import_from("quack.cross_entropy", "cross_entropy")

        def loss(logits_NV: Tensor, labels_N: Tensor) -> Any:
            return quack_cross_entropy(logits_NV, labels_N, reduction="sum", inplace_backward=inplace)

        return _prepared(problem, loss, overwrites=inplace)

    return prepare


def _unsloth(problem: LossProblem) -> Prepared:
    """Unsloth overwrites the logits with their gradient, in the backward. It takes [batch, length, vocab]."""
    fast_cross_entropy_loss = import_from("unsloth.kernels.cross_entropy_loss", "fast_cross_entropy_loss")
    return _prepared(
        problem, lambda z_NV, y_N: fast_cross_entropy_loss(z_NV[None], y_N[None], n_items=1), overwrites=True
    )


_OP: Final = CrossEntropyShape.op
PROVIDERS: Final[tuple[Provider, ...]] = (
    own_provider("sftx", _OP, _sftx()),
    own_provider("sftx-inplace", _OP, _sftx(inplace=True)),
    own_provider("sftx-torch", _OP, _sftx(backend="torch"), needs_gpu),
    Provider("torch-eager", _OP, lambda problem: _prepared(problem, eager_loss)),
    Provider("torch-eager-upcast", _OP, lambda problem: _prepared(problem, upcast_loss), obstacle=needs_half),
    Provider("torch-compile", _OP, lambda problem: _prepared(problem, compiled(upcast_loss))),
    Provider("liger-kernel", _OP, _liger, "liger_kernel", "liger-kernel", needs_gpu),
    Provider("quack", _OP, _quack(inplace=False), "quack", "quack-kernels", needs_hopper),
    Provider("quack-inplace", _OP, _quack(inplace=True), "quack", "quack-kernels", needs_hopper),
    # Last, because importing it patches transformers and peft.
    Provider("unsloth", _OP, _unsloth, "unsloth", "unsloth", needs_gpu),
)
