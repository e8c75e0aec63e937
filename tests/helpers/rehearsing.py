"""Rehearse the step of a run on a fake GPU: its own trainer, plugins and kernels, on tensors without values."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

import model_configs
from fake_gpu import DEVICE, fake_gpu
from sftx.assembly.stages.loss_stage import LossStage
from sftx.config import loading
from sftx.distributed.process_group import ProcessGroup
from sftx.inspection.memory_plan import target_device
from sftx.inspection.memory_plan.fake_tensors import track_phases
from sftx.inspection.memory_plan.planner import Planner
from sftx.trainer import precision
from sftx.trainer.layers import compile_layers, decoder_layers
from sftx.trainer.trainer import MicroBatch, Trainer
from sftx.types import Batch, Example, Loss
from step_record import StepRecord

FEW_LAYERS: Final = 2
"""The second layer has what every layer but the first has: a gradient of its input."""


@dataclass(frozen=True)
class Setup:
    """What is rehearsed: the plugins and options of a run, its data, and the number of processes."""

    plugins: tuple[str, ...] = ("lora", "packed")
    options: Mapping[str, Any] = field(default_factory=dict)
    lengths: Sequence[int] = (64, 48)
    """Of the examples of a micro-batch, in tokens. All of them are label tokens."""
    num_processes: int = 1


class _Ranks(ProcessGroup):
    """Says that there are several processes. What the hosts agree on is what this one says."""

    is_initialized = True

    def __init__(self, world_size: int) -> None:
        self.rank, self.world_size = 0, world_size


def rehearse(
    config: Mapping[str, Any], setup: Setup, *, num_layers: int = FEW_LAYERS, loss: Loss | None = None
) -> StepRecord:
    """Return the record of the second step of a run on a model of this configuration, with so many layers.

    The first step has made the optimizer's state. Layers that are compiled are traced into one graph each, and run
    operation by operation. `loss` takes the place of the run's own. Raises what a run would raise.
    """
    record = StepRecord()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        model = model_configs.write({**config, "num_hidden_layers": num_layers}, Path(directory))
        planner = _planner(model, setup)
        runner, assembly, train = planner.dry_runner, planner.assembly, planner.config.train
        skeleton = runner.copy_skeleton()
        collator = assembly.collator(max(setup.lengths))
        batch = collator.collate([_example(length, number) for number, length in enumerate(setup.lengths)])
        stage = assembly.loss() if loss is None else LossStage("the loss", loss)
        stack.enter_context(mock.patch.dict(compile_layers.__kwdefaults__, backend="eager"))
        group = stack.enter_context(_ranks(setup.num_processes))
        mode = stack.enter_context(fake_gpu(record.on_launch))
        runner.precision = chosen = precision.choose(train, bf16_weights=planner.optimizer.bf16_weights)
        record.dtype = chosen.dtype
        stack.enter_context(record)
        lm = runner.build(skeleton, DEVICE)
        record.track([*lm.model.parameters(), *lm.model.buffers()], "weights")
        trainer = Trainer(
            lm, stage, collator, planner.optimizer, assembly.schedule(0, 3), train, chosen, num_steps=3,
            process_group=group,
        )  # fmt: skip
        track_phases(record, decoder_layers(lm.model))
        for parameter in trainer.parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: record.track([cast(Tensor, p.grad)], "gradients"))
        micro_batch = MicroBatch(_fake(mode, batch), stage.denominator(batch))
        trainer.train_step(1, 0.0, [micro_batch])
        states = [state for optimizer in trainer.optimizer.optimizers for state in optimizer.state.values()]
        record.track([value for state in states for value in state.values() if isinstance(value, Tensor)], "optimizer")
        record.reset()
        trainer.train_step(2, 0.0, [micro_batch])
    return record


def _planner(model: str, setup: Setup) -> Planner:
    values = {"model": model, "data.train": "none.jsonl", "data.max_length": max(setup.lengths), **setup.options}
    loaded = loading.load(None, add=setup.plugins, assignments=[(name, value, name) for name, value in values.items()])
    return Planner(loaded, target_device.parse("h100"), setup.num_processes)


def _example(length: int, number: int) -> Example:
    return Example(np.zeros(length, np.int32), np.ones(length, np.bool_), f"row {number}", number)


def _fake(mode: FakeTensorMode, batch: Batch) -> Batch:
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    fakes: dict[str, Any] = {n: mode.from_tensor(value) for n, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(batch, **fakes)


@contextlib.contextmanager
def _ranks(world_size: int) -> Iterator[ProcessGroup]:
    """Yield the process group of the first of several processes, whose collectives send nothing."""
    if world_size == 1:
        yield ProcessGroup()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    mesh = DeviceMesh.from_group(cast(Any, torch.distributed.group.WORLD), "cuda")
    try:
        with mock.patch.object(DeviceMesh, "from_group", return_value=mesh):  # its ranks are values, and not fake
            yield _Ranks(world_size)
    finally:
        torch.distributed.destroy_process_group()
