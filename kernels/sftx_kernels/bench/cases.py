"""This module has what the benchmarks of all operations share: cases, problems, exact results and providers.

A case is an operation's shape with a dtype and a share of ignored rows. Its least work counts the products that the
gradients need, each operand read once and each result written once. Ignored rows need neither products nor reads, but
their zero gradients are written; a frozen weight gets no gradient. Work may move between the passes (a loss that makes
its gradient in the forward has almost none left in the backward), so only `both` compares providers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from sftx_kernels.triton.launch import Work

Pass = Literal["forward", "backward", "both"]
PASSES: Final[tuple[Pass, ...]] = get_args(Pass)
DTYPES: Final[Mapping[str, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_SEED = 0
_REFERENCE_S = 10.0


@dataclass(frozen=True)
class Shape:
    """A Shape has the sizes of one operation's inputs; `str` of it is their name in tables and results."""

    op: ClassVar[str]
    dispatched_as: ClassVar[str]  # the operation's name in `sftx_kernels.dispatch`
    has_labels: ClassVar[bool] = True
    floor: ClassVar[str | None] = None  # the provider that computes less than the operation, for comparison
    rows: int

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """Return the least work of each pass, with `num_valid` rows that are not ignored."""
        raise NotImplementedError

    def make_problem(self, case: Case, device: torch.device) -> Problem:
        """Return the inputs of a case with this shape, made from a fixed seed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Case:
    shape: Shape
    dtype: str  # a key of DTYPES
    mask: float = 0.0  # the share of rows whose label is ignored

    @property
    def op(self) -> str:
        return self.shape.op

    @property
    def num_valid(self) -> int:
        return self.shape.rows - round(self.shape.rows * self.mask)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def least(self) -> dict[Pass, Work]:
        return self.shape.least(self.num_valid, self.torch_dtype.itemsize)

    def __str__(self) -> str:
        return f"{self.op} {self.shape}, {self.dtype}" + (f", {self.mask:.0%} masked" if self.shape.has_labels else "")


# ---- inputs and exact results


class Problem(Protocol):
    case: Case

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the upstream gradient of each output."""
        ...

    def reference(self, flops_per_s: float) -> Reference | None:
        """Return the results in fp64 of as many rows as `flops_per_s` allows; None if providers differ by design."""
        ...


def make_problem(case: Case, device: torch.device) -> Problem:
    return case.shape.make_problem(case, device)


class Random:
    """A Random generates a case's inputs from one fixed seed, on the case's device, in its dtype."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(_SEED)
        self._device, self._dtype = device, case.torch_dtype

    def normal(self, *sizes: int, std: float = 1.0) -> Tensor:
        values = torch.randn(sizes, generator=self.generator, device=self._device, dtype=torch.float32)
        return values.mul_(std).to(self._dtype)

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self.generator, device=self._device)


@dataclass(frozen=True)
class Reference:
    """A Reference has exact values by name, of the rows `rows` (None: of all rows)."""

    values: Mapping[str, Tensor]
    rows: Tensor | None
    note: str

    def error(self, actual: Mapping[str, Tensor]) -> tuple[float, str]:
        """Return the largest relative error (norm of the difference over the norm), and the name of that value."""
        errors = {}
        for name, exact in self.values.items():
            value = actual[name].detach()
            value = value if self.rows is None else value.index_select(0, self.rows)
            norm = exact.norm().item()
            errors[name] = (value.double() - exact).norm().item() / (norm or 1.0)
        # NaN is the largest error, which max alone does not know.
        worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
        return errors[worst], worst


def affordable_rows(rows: Tensor, case: Case, flops_per_s: float) -> Tensor:
    """Return as many of the row indices, evenly spread, as an fp64 reference has time for.

    fp64 is slow for a large case on a CPU or a consumer GPU. A reference of some rows compares only values that belong
    to a row: the gradient of the input, and for LoRA the output.
    """
    share = _REFERENCE_S * flops_per_s / max(1, case.least()["both"].flops)
    if share >= 1 or not len(rows):
        return rows
    count = max(1, int(len(rows) * share))
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).long()]


# ---- providers


class Prepared(NamedTuple):
    forward: Callable[[], tuple[Tensor, ...]]
    leaves: Mapping[str, Tensor]  # the inputs that get gradients, named as the values of a Reference


Obstacle = Callable[[Case, torch.device], str | None]
"""An Obstacle returns why a provider cannot run a case on a device, None if it can."""


def _no_obstacle(_case: Case, _device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """A Provider is an implementation of an operation; `prepare` turns a problem into a forward and its leaves.

    It calls the peer's public interface as the peer's documentation does. The peer is imported when it is prepared; one
    that is not installed is absent, which is not an error.
    """

    name: str
    op: str
    prepare: Callable[[Any], Prepared]  # takes the operation's Problem
    package: str = "torch"  # must be importable
    distribution: str = "torch"  # its version is reported
    obstacle: Obstacle = _no_obstacle

    @property
    def ours(self) -> bool:
        return self.package == "sftx_kernels"

    def absent(self, case: Case, device: torch.device) -> str | None:
        """Return why this provider cannot run here, None if it can; its package is not imported."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.distribution} is not installed"
        return self.obstacle(case, device)

    def version(self) -> str | None:
        return installed_version(self.distribution)


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_provider(name: str, op: str, prepare: Callable[[Any], Prepared], obstacle: Obstacle = _no_obstacle) -> Provider:
    return Provider(name, op, prepare, "sftx_kernels", "sftx", obstacle)


def needs_gpu(_case: Case, device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"runs on GPUs only, this is {device.type}"


def needs_half(case: Case, _device: torch.device) -> str | None:
    return None if case.dtype != "fp32" else "is torch-eager in fp32"


def needs_hopper(case: Case, device: torch.device) -> str | None:
    if reason := needs_gpu(case, device):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 9 and not torch.version.hip else f"needs sm_90 or newer, this is sm_{major}{minor}"


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function for the shapes of one case. Graphs of earlier cases would count as recompilations."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def import_from(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
