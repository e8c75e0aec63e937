"""A run's configuration becomes the bytes that its step needs: the step itself, on tensors that have no memory.

The model is its skeleton, with adapters attached and layers prepared as in a run; batch, loss, backward, clipping and
optimizer are the run's own code. torch's fake tensors know shape, dtype and device of each result and nothing else, so
that a model of 70 billion parameters is gone through in seconds. They are on the CPU: for a GPU, the rules that
differ there are put in their place.

Shape suffixes: N tokens, M tokens that are trained, V vocabulary, D hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sftx.config import TrainConfig
from sftx.model.language_model import LanguageModel
from sftx.model.load import load_spec
from sftx.planning.tally import Kind, Tally
from sftx.plugins import Assembly
from sftx.training.engines import TrainStep
from sftx.training.layers import decoder_layers, prepare_layers
from sftx.training.optimizer import RunOptimizer
from sftx.training.precision import Precision
from sftx.types import Batch, Collator, Example
from sftx_kernels import gemm
from sftx_kernels.linear_cross_entropy import _choose_chunk


@dataclass(frozen=True)
class Rehearsal:
    """What a step on one device was seen to need, in bytes; counts are of numbers, tied ones once."""

    num_parameters: int
    num_trainable: int
    moments: tuple[dict[Kind, int], dict[Kind, int]]
    """When most is there in the update, and in forward and backward: bytes by what they are for."""
    num_tokens: int
    """Of the batch, padding too."""
    longest: int | None
    """Tokens that the model was made for, where its configuration says."""
    trainable_bytes: int
    largest_layers: int
    """Bytes of the two largest of: decoder layers, and what is outside of them."""

    @property
    def peak(self) -> dict[Kind, int]:
        """The larger of the moments."""
        return max(self.moments, key=lambda moment: sum(moment.values()))


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


class _Stage(StepTally):
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
    rows = chunk_rows or _choose_chunk(like, dtype, workspace_bytes, trained=args[17])
    V, D = weight_VD.shape
    copied = V * D if weight_VD.dtype != dtype else 0
    return int((min(rows, labels_M.shape[0]) * (V + D) + copied) * dtype.itemsize)


def rehearse(
    assembly: Assembly,
    config: TrainConfig,
    precision: Precision,
    *,
    model: str,
    trust_remote_code: bool,
    rows: int,
    max_length: int,
    on_gpu: bool,
) -> Rehearsal:
    """One update of a batch of `rows` rows of `max_length` tokens, all trained. Raises SftxError as a run would."""
    spec = load_spec(model, trust_remote_code=trust_remote_code)
    adapters = assembly.adapters(spec)
    batch = _batch(assembly.collator(max_length), rows, max_length)
    tally = _Stage(on_gpu=on_gpu)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, tally, _gpu_products(on_gpu):
        _take_place(spec.skeleton, precision.base_dtype(frozen=bool(adapters)))
        lm = LanguageModel(spec.skeleton, cast(Any, None))
        lm.attach(adapters)
        tally.count([*lm.parameters(), *lm.buffers()], "weights")
        trained = [p for p in lm.parameters() if p.requires_grad]
        layers = sorted(map(_bytes, (list(layer.parameters()) for layer in decoder_layers(lm.model))))
        outside = _bytes(list(lm.parameters())) - sum(layers)
        prepare_layers(lm.model, config)
        optimizer, step = RunOptimizer(lm, config), TrainStep(lm, assembly.loss())
        lm.train()
        batch = _faked(mode, batch)
        tally.forget()
        _update(tally, optimizer, trained, config)
        update = dict(tally.peak)
        tally.forget()
        _forward_and_backward(tally, step, batch, trained, precision)
        return Rehearsal(
            num_parameters=sum(p.numel() for p in lm.parameters()),
            num_trainable=sum(p.numel() for p in trained),
            moments=(update, dict(tally.peak)),
            num_tokens=batch.input_ids_BT.numel(),
            longest=getattr(lm.config, "max_position_embeddings", None),
            trainable_bytes=_bytes(trained),
            largest_layers=sum(sorted([*layers, outside])[-2:]),
        )


def _batch(collator: Collator, rows: int, max_length: int) -> Batch:
    """As the run's collator makes it. Rows but the first are one token shorter, so that padding has its mask."""
    length: int = getattr(collator, "row_length", max_length)
    sizes = [length - (row > 0) for row in range(rows)]
    return collator.collate([Example([0] * size, [True] * size, f"row {i}", i) for i, size in enumerate(sizes)])


def _faked(mode: FakeTensorMode, batch: Batch) -> Batch:
    """Without values, but for the borders of documents, which attention reads."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "cu_seqlens"}
    fakes: dict[str, Any] = {n: mode.from_tensor(value) for n, value in values.items() if isinstance(value, Tensor)}
    fakes["extras"] = {name: mode.from_tensor(value) for name, value in batch.extras.items()}
    return dataclasses.replace(batch, **fakes)


def _take_place(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts tensors of the CPU, without memory as these are made in fake mode, where those of the skeleton are."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:  # tied ones stay one
                    made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _update(tally: Tally, optimizer: RunOptimizer, trained: list[nn.Parameter], config: TrainConfig) -> None:
    """The first update, which makes the optimizer's state.

    With several micro-batches the gradients stay, for those that come after the first add to them.
    """
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    tally.count([cast(Tensor, parameter.grad) for parameter in trained], "gradients")
    with tally.making("optimizer"):
        nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
        optimizer.step()
    if config.gradient_accumulation_steps == 1:
        optimizer.zero_grad()


def _forward_and_backward(
    tally: Tally, step: TrainStep, batch: Batch, trained: list[nn.Parameter], precision: Precision
) -> None:
    def arrived(parameter: Tensor) -> None:
        tally.count([cast(Tensor, parameter.grad)], "gradients")

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(arrived)
    with precision.autocast():
        out = step(batch)
    objective = out.sum if out.aux_loss is None else out.sum + out.aux_loss
    del out
    objective.backward()


@contextlib.contextmanager
def _gpu_products(on_gpu: bool) -> Iterator[None]:
    """A GPU multiplies narrow numbers as they are, where this CPU may need to widen them."""
    own = gemm._cpu_multiplies
    if on_gpu:
        gemm._cpu_multiplies = cast(Any, lambda dtype: True)
    try:
        yield
    finally:
        gemm._cpu_multiplies = own


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters}.values())
