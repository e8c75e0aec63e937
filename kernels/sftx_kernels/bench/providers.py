"""Who computes an operation: sftx, torch, and every peer that imports. One small function each.

A provider turns a problem into a `Prepared`: a forward and the leaves whose gradients are asked for. It uses the
peer's public interface as the peer's own documentation does; what differs from the others in that is said beside it.
Nothing of a peer is imported before it is asked for, and a peer that is not installed is absent, not an error.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sftx_kernels.bench.cases import Case
from sftx_kernels.bench.problems import SCALING, LoraProblem, LossProblem

LOW_MEMORY_BYTES: Final = 64 * 1024 * 1024


class Prepared(NamedTuple):
    forward: Callable[[], tuple[Tensor, ...]]
    leaves: Mapping[str, Tensor]  # named as the values of a Reference


Obstacle = Callable[[Case, torch.device], str | None]
"""Why a provider cannot run a case on a device, None if it can."""


def _none(_case: Case, _device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    name: str
    op: str
    prepare: Callable[[Any], Prepared]  # of the operation's kind of Problem
    package: str = "torch"  # what must import
    distribution: str = "torch"  # whose version that is
    obstacle: Obstacle = _none

    @property
    def ours(self) -> bool:
        return self.package == "sftx_kernels"

    def absent(self, case: Case, device: torch.device) -> str | None:
        """Why this provider cannot run here, None if it can; the package itself is not imported."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.distribution} is not installed"
        return self.obstacle(case, device)

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


def needs_gpu(_case: Case, device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"runs on GPUs only, this is {device.type}"


def needs_half_on_gpu(case: Case, device: torch.device) -> str | None:
    return needs_gpu(case, device) or (None if case.dtype != "fp32" else "takes fp16 and bf16 only")


def _needs_half(case: Case, _device: torch.device) -> str | None:
    return None if case.dtype != "fp32" else "is torch-eager in fp32"


def _needs_torch_2_13(_case: Case, _device: torch.device) -> str | None:
    has = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if has else f"torch {torch.__version__} has no F.linear_cross_entropy"


def _needs_group(case: Case, device: torch.device) -> str | None:
    """What runs each linear of a group by itself says nothing new about a single one."""
    return None if len(getattr(case.shape, "out_features", ())) > 1 else "is sftx where there is one linear"


# ---- cross-entropy on logits


def logits_leaf(problem: LossProblem) -> Tensor:
    return problem.input_NE.detach().requires_grad_()


def logits_copy(problem: LossProblem) -> Tensor:
    """A copy of its own, for those who leave the gradient where the logits were."""
    return problem.input_NE.detach().clone().requires_grad_()


def _sftx_ce(*, inplace: bool = False, backend: str | None = None) -> Callable[[LossProblem], Prepared]:
    def prepare(problem: LossProblem) -> Prepared:
        from sftx_kernels import cross_entropy

        leaf_NV, labels_N = logits_copy(problem) if inplace else logits_leaf(problem), problem.labels_N

        def forward() -> tuple[Tensor, ...]:
            logits_NV = leaf_NV.view_as(leaf_NV) if inplace else leaf_NV  # in place it takes no leaf
            return (cross_entropy(logits_NV, labels_N, inplace=inplace, backend=backend).loss,)

        return Prepared(forward, {"d_input": leaf_NV})

    return prepare


def _eager_ce_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV, labels_N, reduction="sum")


def _upcast_ce_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """As in transformers, whose losses widen the logits to fp32."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")


def _torch_ce(loss: Callable[[Tensor, Tensor], Tensor], *, compiled: bool = False) -> Callable[[LossProblem], Prepared]:
    def prepare(problem: LossProblem) -> Prepared:
        function, logits_NV = _compile(loss) if compiled else loss, logits_leaf(problem)
        return Prepared(lambda: (function(logits_NV, problem.labels_N),), {"d_input": logits_NV})

    return prepare


# ---- cross-entropy on hidden rows and a head


def head_leaves(problem: LossProblem) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    assert problem.weight_VD is not None
    hidden_ND = problem.input_NE.detach().requires_grad_()
    weight_VD = problem.weight_VD.detach().requires_grad_(problem.trained)
    return hidden_ND, weight_VD, {"d_input": hidden_ND} | ({"d_weight": weight_VD} if problem.trained else {})


def _sftx_lce(**options: Any) -> Callable[[LossProblem], Prepared]:
    def prepare(problem: LossProblem) -> Prepared:
        from sftx_kernels import linear_cross_entropy

        hidden_ND, weight_VD, leaves = head_leaves(problem)
        labels_N, num_valid = problem.labels_N, problem.num_valid
        return Prepared(
            lambda: (linear_cross_entropy(hidden_ND, weight_VD, labels_N, num_valid=num_valid, **options).loss,),
            leaves,
        )

    return prepare


def _torch_lce(
    loss: Callable[[Tensor, Tensor], Tensor], *, compiled: bool = False
) -> Callable[[LossProblem], Prepared]:
    def prepare(problem: LossProblem) -> Prepared:
        def head(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
            return loss(F.linear(hidden_ND, weight_VD), labels_N)

        function = _compile(head) if compiled else head
        hidden_ND, weight_VD, leaves = head_leaves(problem)
        return Prepared(lambda: (function(hidden_ND, weight_VD, problem.labels_N),), leaves)

    return prepare


def _torch_fused(problem: LossProblem) -> Prepared:
    """With options: without them it multiplies the head out, which is torch-eager."""
    hidden_ND, weight_VD, leaves = head_leaves(problem)
    options, labels_N = torch.nn.LinearCrossEntropyOptions(), problem.labels_N
    return Prepared(
        lambda: (F.linear_cross_entropy(hidden_ND, weight_VD, labels_N, reduction="sum", options=options),), leaves
    )


# ---- LoRA


class LoraLeaves(NamedTuple):
    x_MK: Tensor
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]

    def named(self) -> dict[str, Tensor]:
        names = {"d_x": self.x_MK}
        names |= {f"d_A{number}": A for number, A in enumerate(self.lora_As)}
        return names | {f"d_B{number}": B for number, B in enumerate(self.lora_Bs)}


def lora_leaves(problem: LoraProblem) -> LoraLeaves:
    def fresh(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_()

    return LoraLeaves(fresh(problem.x_MK), [*map(fresh, problem.lora_As)], [*map(fresh, problem.lora_Bs)])


def _sftx_lora(*, grouped: bool = True, backend: str | None = None) -> Callable[[LoraProblem], Prepared]:
    def prepare(problem: LoraProblem) -> Prepared:
        from sftx_kernels.lora import lora_linear, lora_linears

        leaves, weights = lora_leaves(problem), problem.weights
        options: Any = {"scaling": SCALING, "dropout_p": problem.dropout, "seed": problem.seed, "backend": backend}
        if grouped and len(weights) > 1:
            return Prepared(
                lambda: lora_linears(leaves.x_MK, weights, leaves.lora_As, leaves.lora_Bs, **options), leaves.named()
            )
        triples = list(zip(weights, leaves.lora_As, leaves.lora_Bs, strict=True))
        return Prepared(
            lambda: tuple(lora_linear(leaves.x_MK, *triple, **options) for triple in triples), leaves.named()
        )

    return prepare


def _frozen_linear(problem: LoraProblem) -> Prepared:
    """The floor: the linears without any update."""
    x_MK = problem.x_MK.detach().requires_grad_()
    return Prepared(lambda: tuple(F.linear(x_MK, weight_OK) for weight_OK in problem.weights), {"d_x": x_MK})


def _eager_lora_linear(x_MK: Tensor, weight_OK: Tensor, A_RK: Tensor, B_OR: Tensor, dropout: float) -> Tensor:
    return F.linear(x_MK, weight_OK) + F.linear(F.linear(F.dropout(x_MK, dropout), A_RK), B_OR) * SCALING


def _torch_lora(*, compiled: bool = False) -> Callable[[LoraProblem], Prepared]:
    def prepare(problem: LoraProblem) -> Prepared:
        function, leaves = _compile(_eager_lora_linear) if compiled else _eager_lora_linear, lora_leaves(problem)
        triples = list(zip(problem.weights, leaves.lora_As, leaves.lora_Bs, strict=True))
        return Prepared(
            lambda: tuple(function(leaves.x_MK, *triple, problem.dropout) for triple in triples), leaves.named()
        )

    return prepare


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled for the shapes of one case: what earlier cases left behind would count as recompilations."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _sftx(name: str, op: str, prepare: Callable[[Any], Prepared], obstacle: Obstacle = _none) -> Provider:
    return Provider(name, op, prepare, "sftx_kernels", "sftx", obstacle)


OWN: Final[tuple[Provider, ...]] = (
    _sftx("sftx", "cross-entropy", _sftx_ce()),
    _sftx("sftx-inplace", "cross-entropy", _sftx_ce(inplace=True)),
    _sftx("sftx-torch", "cross-entropy", _sftx_ce(backend="torch"), needs_gpu),
    _sftx("sftx", "linear-cross-entropy", _sftx_lce()),
    _sftx("sftx-low-memory", "linear-cross-entropy", _sftx_lce(workspace_bytes=LOW_MEMORY_BYTES)),
    _sftx("sftx-torch", "linear-cross-entropy", _sftx_lce(backend="torch"), needs_gpu),
    _sftx("sftx", "lora", _sftx_lora()),
    _sftx("sftx-separate", "lora", _sftx_lora(grouped=False), _needs_group),
    _sftx("sftx-torch", "lora", _sftx_lora(backend="torch"), needs_gpu),
    _sftx("sftx-triton", "lora", _sftx_lora(backend="triton"), needs_gpu),
    _sftx("sftx-triton-fused", "lora", _sftx_lora(backend="triton-fused"), needs_gpu),
)
TORCH: Final[tuple[Provider, ...]] = (
    Provider("torch-eager", "cross-entropy", _torch_ce(_eager_ce_loss)),
    Provider("torch-eager-upcast", "cross-entropy", _torch_ce(_upcast_ce_loss), obstacle=_needs_half),
    Provider("torch-compile", "cross-entropy", _torch_ce(_upcast_ce_loss, compiled=True)),
    Provider("torch-eager", "linear-cross-entropy", _torch_lce(_eager_ce_loss)),
    Provider("torch-eager-upcast", "linear-cross-entropy", _torch_lce(_upcast_ce_loss), obstacle=_needs_half),
    Provider("torch-compile", "linear-cross-entropy", _torch_lce(_upcast_ce_loss, compiled=True)),
    Provider("torch-fused", "linear-cross-entropy", _torch_fused, obstacle=_needs_torch_2_13),
    Provider("frozen-linear", "lora", _frozen_linear),
    Provider("torch-eager", "lora", _torch_lora()),
    Provider("torch-compile", "lora", _torch_lora(compiled=True)),
)
