"""This benchmark measures `linear_cross_entropy`: hidden rows, the head's weight and labels -> loss and gradients.

Peers were read in liger-kernel 0.8.5, cut-cross-entropy 25.1.1 and quack-kernels 0.6.5.
"""

from __future__ import annotations

from collections.abc import Callable
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
    Shape,
    compiled,
    import_from,
    needs_gpu,
    needs_half,
    needs_hopper,
    own_provider,
)
from sftx_kernels.bench.cross_entropy import (
    LossFunction,
    LossProblem,
    class_bias,
    eager_loss,
    make_labels,
    upcast_loss,
)
from sftx_kernels.linear_cross_entropy import linear_cross_entropy
from sftx_kernels.triton.launch import Work

LOW_MEMORY_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True)
class LinearCrossEntropyShape(Shape):
    """The inputs are hidden rows [rows, hidden], the head's weight [vocab, hidden] and labels."""

    op: ClassVar = "linear-cross-entropy"
    dispatched_as: ClassVar = "cross_entropy"
    hidden: int
    vocab: int
    trained: bool = False  # the head gets a gradient
    logits: str = "random"  # or "zipf", as for cross-entropy

    def __str__(self) -> str:
        kind = "trained" if self.trained else "frozen"
        return f"{self.rows}x{self.hidden}x{self.vocab} {kind}" + (" zipf" if self.logits == "zipf" else "")

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """Count 2MDV for the logits of the M valid rows, as much for dX, and as much for dW if the head trains."""
        product = 2 * num_valid * self.hidden * self.vocab
        weight = self.vocab * self.hidden * itemsize
        read = num_valid * self.hidden * itemsize + weight + self.rows * 8
        written = self.rows * self.hidden * itemsize + self.trained * weight
        back = (1 + self.trained) * product
        return {
            "forward": Work(product, read),
            "backward": Work(back, read + written),
            "both": Work(product + back, read + written),
        }

    def make_problem(self, case: Case, device: torch.device) -> Problem:
        random = Random(case, device)
        bias_V = class_bias(random, self.vocab, self.logits)
        hidden_ND = random.normal(self.rows, self.hidden)
        weight_VD = random.normal(self.vocab, self.hidden, std=self.hidden**-0.5)
        if self.logits == "zipf":  # a last feature that is 1 in every row carries the bias through the product
            hidden_ND[:, -1], weight_VD[:, -1] = 1.0, bias_V.to(case.torch_dtype)
        labels_N = make_labels(random, case, bias_V)
        return LossProblem(case, hidden_ND, weight_VD, labels_N, case.num_valid, self.trained)


# ---- providers

Loss = Callable[[Tensor, Tensor, Tensor], Any]
"""A Loss is a function of (hidden_ND, weight_VD, labels_N)."""


def _prepared(problem: LossProblem, loss: Loss) -> Prepared:
    assert problem.weight_VD is not None
    hidden_ND = problem.input_NE.detach().requires_grad_()
    weight_VD = problem.weight_VD.detach().requires_grad_(problem.trained)
    leaves = {"d_input": hidden_ND} | ({"d_weight": weight_VD} if problem.trained else {})
    return Prepared(lambda: (loss(hidden_ND, weight_VD, problem.labels_N),), leaves)


def _sftx(**options: Any) -> Callable[[LossProblem], Prepared]:
    def prepare(problem: LossProblem) -> Prepared:
        return _prepared(problem, lambda *a: linear_cross_entropy(*a, num_valid=problem.num_valid, **options).loss)

    return prepare


def _torch(loss: LossFunction, *, is_compiled: bool = False) -> Callable[[LossProblem], Prepared]:
    def head(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        return loss(F.linear(hidden_ND, weight_VD), labels_N)

    return lambda problem: _prepared(problem, compiled(head) if is_compiled else head)


def _needs_torch_2_13(_case: Case, _device: torch.device) -> str | None:
    has = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if has else f"torch {torch.__version__} has no F.linear_cross_entropy"


def _torch_fused(problem: LossProblem) -> Prepared:
    """Pass options: without them torch materialises the logits, which is torch-eager."""
    options = torch.nn.LinearCrossEntropyOptions()
    return _prepared(problem, lambda *a: F.linear_cross_entropy(*a, reduction="sum", options=options))


def _peer(module: str, name: str) -> Callable[[LossProblem], Prepared]:
    """Prepare a peer's function of (hidden, weight, labels, reduction="sum")."""

    def prepare(problem: LossProblem) -> Prepared:
        function = import_from(module, name)
        return _prepared(problem, lambda *a: function(*a, reduction="sum"))

    return prepare


def _needs_half_on_gpu(case: Case, device: torch.device) -> str | None:
    return needs_gpu(case, device) or (None if case.dtype != "fp32" else "takes fp16 and bf16 only")


_OP: Final = LinearCrossEntropyShape.op
_liger = _peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
# By default it skips blocks whose gradient is under eps / 32, which its error shows.
_cut_cross_entropy = _peer("cut_cross_entropy", "linear_cross_entropy")
_quack = _peer("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
PROVIDERS: Final[tuple[Provider, ...]] = (
    own_provider("sftx", _OP, _sftx()),
    own_provider("sftx-low-memory", _OP, _sftx(workspace_bytes=LOW_MEMORY_BYTES)),
    own_provider("sftx-torch", _OP, _sftx(backend="torch"), needs_gpu),
    Provider("torch-eager", _OP, _torch(eager_loss)),
    Provider("torch-eager-upcast", _OP, _torch(upcast_loss), obstacle=needs_half),
    Provider("torch-compile", _OP, _torch(upcast_loss, is_compiled=True)),
    Provider("torch-fused", _OP, _torch_fused, obstacle=_needs_torch_2_13),
    Provider("liger-kernel", _OP, _liger, "liger_kernel", "liger-kernel", needs_gpu),
    Provider(
        "cut-cross-entropy", _OP, _cut_cross_entropy, "cut_cross_entropy", "cut-cross-entropy", _needs_half_on_gpu
    ),
    Provider("quack", _OP, _quack, "quack", "quack-kernels", needs_hopper),
)
