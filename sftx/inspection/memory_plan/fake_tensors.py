"""Where a step is rehearsed: what stands in for what tensors without values, on the CPU, cannot tell by themselves.

Shape suffixes: M tokens that are trained, V vocabulary, D hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sftx.inspection.memory_plan.memory_tracker import Phase, Tally
from sftx.types import Batch, Collator, Example
from sftx_kernels import gemm
from sftx_kernels.linear_cross_entropy import choose_chunk


class StepTally(Tally):
    """A tally that also knows what the head's loss uses within itself."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        super().__init__()
        self._on_gpu = on_gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.sftx.linear_cross_entropy.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self.making("head"):
            out = super().__torch_dispatch__(func, types, args, kwargs)
        self.touch(_head_workspace(args, on_gpu=self._on_gpu), "head")
        return out


class Stage(StepTally):
    """For tensors without values: what reads one gets a 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is torch.ops.sftx.trained_rows.default:
            rows_M = args[0].new_empty(args[1])
            self.see(rows_M)
            return rows_M
        return super().__torch_dispatch__(func, types, args, kwargs)


def _head_workspace(args: Any, *, on_gpu: bool) -> int:
    """Bytes of a chunk of logits, of its hidden states, and of the head in the dtype of the products where it differs.

    `args`: of `sftx::linear_cross_entropy`.
    """
    weight_VD, labels_M, chunk_rows, workspace_bytes, dtype = (args[at] for at in (1, 4, 10, 11, 12))
    # Any device but the CPU has the rule of a GPU.
    like = weight_VD.to("meta") if on_gpu else weight_VD
    rows = chunk_rows or choose_chunk(like, dtype, workspace_bytes, trained=args[17])
    V, D = weight_VD.shape
    copied = V * D if weight_VD.dtype != dtype else 0
    return int((min(rows, labels_M.shape[0]) * (V + D) + copied) * dtype.itemsize)


def make_batch(collator: Collator, rows: int, max_length: int) -> Batch:
    """As the run's collator makes it. Rows but the first are one token shorter, so that padding has its mask."""
    length: int = getattr(collator, "row_length", max_length)
    sizes = [length - (row > 0) for row in range(rows)]
    return collator.collate(
        [Example(np.zeros(size, np.int32), np.ones(size, np.bool_), f"row {i}", i) for i, size in enumerate(sizes)]
    )


def without_values(mode: FakeTensorMode, batch: Batch) -> Batch:
    """The borders of documents, which attention reads, keep theirs."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "cu_seqlens"}
    fakes: dict[str, Any] = {n: mode.from_tensor(value) for n, value in values.items() if isinstance(value, Tensor)}
    fakes["extras"] = {name: mode.from_tensor(value) for name, value in batch.extras.items()}
    return dataclasses.replace(batch, **fakes)


def take_place(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Puts tensors of the default device, without memory in fake mode, where those of the skeleton are.

    `dtype` None: each keeps its own.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:  # tied ones stay one
                    made[id(parameter)] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=dtype or parameter.dtype),
                        requires_grad=parameter.requires_grad,
                    )
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def mark_phases(tally: Tally, layers: list[nn.Module]) -> None:
    """Tells the tally when a layer begins its forward, and when it begins its backward."""
    turn = -1

    def before(number: int) -> None:
        nonlocal turn
        turn += number == 0
        tally.enter(Phase("forward", turn, number))

    def after(number: int, out: Any) -> None:
        hidden_BTD: Tensor = out if isinstance(out, Tensor) else out[0]
        if hidden_BTD.requires_grad:
            phase = Phase("backward", turn, number)
            hidden_BTD.register_hook(lambda _: tally.enter(phase))
        if number == len(layers) - 1:
            tally.enter(Phase("head", turn))

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: before(number))
        layer.register_forward_hook(lambda _module, _args, out, number=number: after(number, out))


@contextlib.contextmanager
def gpu_products(on_gpu: bool) -> Iterator[None]:
    """A GPU multiplies narrow numbers as they are, where this CPU may need to widen them."""
    own = gemm.cpu_multiplies
    if on_gpu:
        gemm.cpu_multiplies = cast(Any, lambda dtype: True)
    try:
        yield
    finally:
        gemm.cpu_multiplies = own
