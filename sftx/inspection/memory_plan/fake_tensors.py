"""Run a training step on fake tensors: torch's FakeTensorMode knows their shapes and dtypes, but they have no memory.

This module supplies what fake tensors on the CPU cannot know: scalar values, the number of label tokens, the workspace
of the head's loss, and how a GPU multiplies half-precision matrices.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sftx.inspection.memory_plan.memory_tracker import MemoryTracker, Phase
from sftx.types import Batch, Collator, Example, Window
from sftx_kernels import gemm, linear_cross_entropy_workspace

BLANK: Final = Example(np.empty(0, np.int32), np.empty(0, np.bool_), "", 0)
"""An example of which nothing is known yet."""


class StepTracker(MemoryTracker):
    """A memory tracker that also counts the workspace of the head's loss, `sftx::linear_cross_entropy`."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        super().__init__()
        self._device_type = "cuda" if on_gpu else "cpu"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.sftx.linear_cross_entropy.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self.allocating("head"):
            out = super().__torch_dispatch__(func, types, args, kwargs)
        values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        weight_VD: Tensor = values["weight_VD"]
        workspace = linear_cross_entropy_workspace(
            values["labels_M"].shape[0],
            weight_VD.shape[1],
            weight_VD.shape[0],
            dtype=values["dtype"],
            device_type=self._device_type,
            weight_dtype=weight_VD.dtype,
            head_trains=values["weight_grad"],
            chunk_rows=values["chunk_rows"],
            workspace_bytes=values["workspace_bytes"],
        )
        self.add_transient(workspace.num_bytes, "head")
        return out


class FakeStepTracker(StepTracker):
    """A step tracker for fake tensors: code that reads a scalar value gets 1, and all rows of a batch are labels."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is torch.ops.sftx.trained_rows.default:
            rows_M = args[0].new_empty(args[1])
            self.track_outputs(rows_M)
            return rows_M
        if func is torch.ops.aten._grouped_mm.default:
            # Fake tensors refuse every dtype but bf16, which is all that a GPU multiplies; a CPU multiplies all.
            a, b = args[:2]
            groups = (a if a.ndim == 3 else b).shape[:1] if a.ndim == b.ndim else ()
            if a.ndim == b.ndim == 2:
                groups = args[2].shape  # the gradient of the weights: one matrix for each end of a group
            out = a.new_empty((*groups, a.shape[-2], b.shape[-1]))
            self.track_outputs(out)
            return out
        return super().__torch_dispatch__(func, types, args, kwargs)


def make_batch(collator: Collator, rows: int, max_length: int, group: Sequence[Example] = (BLANK,)) -> Batch:
    """Return a batch of the run's collator, whose rows it plans itself from copies of this group of examples.

    Each is made `max_length` tokens long; all but the first one less, so that padding needs a mask.
    """
    row_length: int | None = getattr(collator, "row_length", None)
    length = max_length if row_length is None else row_length // len(group)
    examples: list[Example] = []
    for number in range(rows):
        for one in group:
            size = max(2, length - bool(examples))
            row_id = f"row {len(examples)}"
            token_ids = np.zeros(size, np.int32)
            token_ids[: len(one.token_ids)] = one.token_ids[:size]
            extras = {name: _stretched(value, len(one.token_ids), size) for name, value in one.extras.items()}
            examples.append(Example(token_ids, np.ones(size, np.bool_), row_id, number, extras=extras))
    lengths = [len(example.token_ids) for example in examples]
    groups = [example.group for example in examples]
    steps, _ = collator.plan(Window(lengths, groups, rows_per_step=rows))
    return collator.collate([examples[index] for row in steps[0] for index in sorted(row)])


def _stretched(value: Any, num_tokens: int, size: int) -> Any:
    """Return an extra that has a number for each token with one for each of `size` tokens, any other as it is."""
    is_per_token = isinstance(value, list) and len(value) == num_tokens > 0
    if not is_per_token or not all(isinstance(one, float) for one in value):
        return value
    return (value * size)[:size]


def to_fake_batch(mode: FakeTensorMode, batch: Batch) -> Batch:
    """Return the batch with fake tensors, except `cu_seqlens`, whose values attention reads."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "cu_seqlens"}
    fakes: dict[str, Any] = {n: mode.from_tensor(value) for n, value in values.items() if isinstance(value, Tensor)}
    fakes["extras"] = {name: mode.from_tensor(value) for name, value in batch.extras.items()}
    return dataclasses.replace(batch, **fakes)


def materialise(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the parameters and buffers of a skeleton by empty tensors on the default device.

    In fake-tensor mode these have no memory. `dtype` is that of the floating parameters; None keeps each one's own.
    """
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in replaced:  # tied parameters stay tied
                    replaced[id(parameter)] = nn.Parameter(
                        torch.empty(
                            parameter.shape, dtype=dtype if dtype and parameter.is_floating_point() else parameter.dtype
                        ),
                        requires_grad=parameter.requires_grad,
                    )
                module._parameters[name] = replaced[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def track_phases(tracker: MemoryTracker, layers: list[nn.Module]) -> None:
    """Register hooks that tell the tracker when each layer's forward and backward begin."""
    model_call = -1

    def before_forward(number: int) -> None:
        nonlocal model_call
        model_call += number == 0
        tracker.enter_phase(Phase("forward", model_call, number))

    def after_forward(number: int, out: Any) -> None:
        hidden_BTD: Tensor = out if isinstance(out, Tensor) else out[0]
        if hidden_BTD.requires_grad:
            phase = Phase("backward", model_call, number)
            hidden_BTD.register_hook(lambda _: tracker.enter_phase(phase))
        if number == len(layers) - 1:
            tracker.enter_phase(Phase("head", model_call))

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: before_forward(number))
        layer.register_forward_hook(lambda _module, _args, out, number=number: after_forward(number, out))


@contextlib.contextmanager
def gpu_products(on_gpu: bool) -> Iterator[None]:
    """Let LoRA multiply bf16 and fp16 matrices as on a GPU while the context is active.

    Its code runs on the CPU here and would copy the matrices to fp32 if this CPU has no instructions for them.
    """
    cpu_multiplies = gemm.cpu_multiplies
    if on_gpu:
        gemm.cpu_multiplies = cast(Any, lambda dtype: True)
    try:
        yield
    finally:
        gemm.cpu_multiplies = cpu_multiplies
