"""This module has what the benchmarks of `rms_norm`, `swiglu` and `rotary` share: problems that are a formula in torch.

These operations move bytes and multiply no matrices, so their least time is that of reading each input once and writing
each output once, in forward and again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from sftx_kernels.bench.cases import (
    Case,
    Pass,
    Prepared,
    Provider,
    Reference,
    Shape,
    compiled,
    import_from,
    needs_gpu,
    own_provider,
)
from sftx_kernels.triton.launch import Work

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class RowsShape(Shape):
    """A RowsShape has inputs of rows that are independent of one another, [rows, width] each."""

    has_labels: ClassVar = False
    width: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}"


@dataclass
class FormulaProblem:
    """A FormulaProblem has the inputs of a function of (*leaves, *constants); `formula` is that function in torch."""

    case: Case
    leaves: Mapping[str, Tensor]  # by the name of their gradient
    constants: Sequence[Tensor]
    upstreams: Sequence[Tensor]
    formula: Callable[..., Outputs]

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [upstream.to(y.dtype) for upstream, y in zip(self.upstreams, outputs, strict=True)]

    def reference(self, flops_per_s: float) -> Reference:
        """Return the outputs and gradients of the formula in fp64. Without products there is time for all rows."""
        leaves = [leaf.double().requires_grad_() for leaf in self.leaves.values()]
        outputs = _as_tuple(self.formula(*leaves, *(c.double() for c in self.constants)))
        gradients = torch.autograd.grad(outputs, leaves, self.upstream(outputs))
        values = {f"y{number}": y.detach().reshape(-1, y.shape[-1]) for number, y in enumerate(outputs)}
        return Reference(values | dict(zip(self.leaves, gradients, strict=True)), None, "all rows")

    def prepared(self, function: Callable[..., Outputs], *, overwrites: bool = False) -> Prepared:
        """Prepare a function of (*leaves, *constants); one that overwrites its leaves gets copies."""
        leaves = {
            name: (leaf.detach().clone(memory_format=torch.preserve_format) if overwrites else leaf.detach())
            for name, leaf in self.leaves.items()
        }
        for leaf in leaves.values():
            leaf.requires_grad_()
        return Prepared(lambda: _as_tuple(function(*leaves.values(), *self.constants)), leaves)


def _as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def moved(forward_bytes: int, backward_bytes: int, forward_flops: int, backward_flops: int) -> dict[Pass, Work]:
    """Return the least work of each pass."""
    return {
        "forward": Work(forward_flops, forward_bytes),
        "backward": Work(backward_flops, backward_bytes),
        "both": Work(forward_flops + backward_flops, forward_bytes + backward_bytes),
    }


LIGER: Final = "liger_kernel"


def providers(
    op: str, ours: Callable[..., Outputs], liger: tuple[str, str], call_liger: Callable[..., Outputs]
) -> tuple[Provider, ...]:
    """Return the providers of an operation.

    Args:
        ours: a function of (*leaves, *constants, backend=...).
        liger: module and name of liger-kernel's function, which `call_liger` gets first, then (*leaves, *constants).
    """

    def sftx(backend: str | None) -> Callable[[FormulaProblem], Prepared]:
        return lambda problem: problem.prepared(lambda *inputs: ours(*inputs, backend=backend))

    def peer(problem: FormulaProblem) -> Prepared:
        function: Any = import_from(*liger)
        return problem.prepared(lambda *inputs: call_liger(function, *inputs), overwrites=True)

    return (
        own_provider("sftx", op, sftx(None)),
        own_provider("sftx-torch", op, sftx("torch"), needs_gpu),
        Provider("torch-eager", op, lambda problem: problem.prepared(problem.formula)),
        Provider("torch-compile", op, lambda problem: problem.prepared(compiled(problem.formula))),
        Provider("liger-kernel", op, peer, LIGER, "liger-kernel", needs_gpu),
    )
