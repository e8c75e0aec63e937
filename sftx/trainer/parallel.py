"""Parallel strategies: how parameters are distributed over the processes of a run, and how gradients are reduced.

`ParallelStrategy` is one process. `DDPStrategy` is torch's DistributedDataParallel: every process has all parameters.
`FSDP2Strategy` is torch's fully_shard: every process has a shard of each decoder layer, of the remaining parameters, of
their gradients and of the optimizer state; a layer's parameters are gathered only while it computes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from sftx.assembly.stages.loss_stage import LossStage
from sftx.assembly.stages.optimizer_stages import OptimizerStage
from sftx.config.named_plugins import ELEMENTWISE
from sftx.config.options import TrainConfig
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import ConfigError
from sftx.model.language_model import CausalLM
from sftx.trainer.layers import decoder_layers
from sftx.trainer.precision import Precision
from sftx.types import Batch, LossSum

T = TypeVar("T")

# The option of DDP that broadcasts buffers before each forward pass was renamed in torch 2.13.
_DDP_OPTIONS: Final = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS: Final = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


class TrainStep(nn.Module):
    """Runs the forward pass from a batch to its loss sum. DDP and FSDP2 wrap this module, which includes the loss."""

    def __init__(self, lm: CausalLM, loss: LossStage) -> None:
        """Takes model and loss. A loss that trains a module of its own gets it here, on the model's device."""
        super().__init__()
        if loss.has_module and lm.loss_module is None:
            with lm.device:
                lm.loss_module = loss.module(lm)
        self.lm = lm
        self.loss = loss

    def forward(self, batch: Batch) -> LossSum:
        return self.loss(self.lm, batch)

    def call_in_forward(self, work: Callable[[], T]) -> T:
        """Runs `work`, which may call the model, as FSDP2 runs a forward pass: with the root's parameters unsharded.

        The root is this module. Its parameters are those that belong to no decoder layer: embeddings, head, last norm.
        """
        return work()


class ParallelStrategy:
    """Runs the train step in one process, which has all parameters. Subclasses run it in several."""

    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self.module: nn.Module = step
        """What runs the forward pass of a training step: `step` itself, or torch's wrapper of it."""

    def broadcast_parameters(self) -> None:
        """Broadcasts the trained parameters of rank 0. Every process calls it, once, after loading."""

    def micro_batch_context(self, *, last: bool) -> AbstractContextManager[None]:
        """Returns the context for forward and backward of a micro-batch; `last` says whether it ends the step."""
        return contextlib.nullcontext()

    def sync_gradients(self) -> None:
        """Averages the gradients that the backward passes of a step did not reduce; called once a step after them."""

    def summon_full_params(self) -> AbstractContextManager[None]:
        """Returns a context in which every process has all parameters and may call the model without the others."""
        return contextlib.nullcontext()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sums each value over all processes, in place, and returns the tensor."""
        return values

    def statistics(self, batches: Iterable[tuple[Batch, bool]]) -> dict[str, Tensor]:
        """Returns what `Loss.statistics` says of batches, added up over them and over all processes; {} without it.

        Each batch comes with whether it counts. Every process has equally many, and at least one.
        """
        loss, lm = self.step.loss, self.step.lm
        if not loss.has_statistics:
            return {}
        totals: dict[str, Tensor] = {}
        with torch.no_grad():
            for batch, is_counted in batches:
                values = self.step.call_in_forward(partial(loss.statistics, lm, batch.to(lm.device)))
                for name, value in values.items():
                    totals[name] = totals.get(name, 0.0) + value.float() * is_counted
        return dict(zip(totals, self.all_reduce(torch.stack(list(totals.values()))), strict=True))

    @property
    def gradient_scale(self) -> float:
        """Returns the factor of each loss that turns the average of gradients over the processes into their sum."""
        return 1.0


class MultiProcessStrategy(ParallelStrategy):
    """Implements what DDP and FSDP2 have in common."""

    def __init__(self, step: TrainStep, process_group: ProcessGroup) -> None:
        super().__init__(step)
        self._process_group = process_group

    def all_reduce(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    @property
    def gradient_scale(self) -> float:
        return float(self._process_group.world_size)


class DDPStrategy(MultiProcessStrategy):
    """Keeps all parameters in every process, and reduces gradients during the last backward pass of a step."""

    def __init__(self, step: TrainStep, process_group: ProcessGroup, device: torch.device) -> None:
        super().__init__(step, process_group)
        options: dict[str, Any] = {_SYNC_BUFFERS: False}
        # Frozen parameters and buffers are equal everywhere and need no broadcast; torch has no public option for that.
        frozen = [name for name, p in step.named_parameters(remove_duplicate=False) if not p.requires_grad]
        frozen += [name for name, _ in step.named_buffers(remove_duplicate=False)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, frozen)
        self.module = DistributedDataParallel(
            step,
            device_ids=[device.index] if device.type == "cuda" else None,
            **options,
            gradient_as_bucket_view=True,
            find_unused_parameters=has_experts(step.lm) or _trains_other_towers(step.lm),
        )

    @contextlib.contextmanager
    def micro_batch_context(self, *, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else cast(DistributedDataParallel, self.module).no_sync():
            yield


class FSDP2Strategy(MultiProcessStrategy):
    """Shards the model over the processes. Adapters' parameters are replicated, because adapters save and load them.

    The frozen base of adapters is sharded in the dtype that it has, so that a quantised base can be sharded too.
    """

    def __init__(self, step: TrainStep, process_group: ProcessGroup, config: TrainConfig, precision: Precision) -> None:
        """Shards the model and moves the shards to the device, one layer after the other."""
        super().__init__(step, process_group)
        model, device = step.lm.model, precision.device
        step.lm.computes_on = device
        self._replicated = [p for p in step.parameters() if p.requires_grad] if step.lm.adapters else []
        for parameter in self._replicated:
            parameter.data = parameter.data.to(device)
        options: dict[str, Any] = {
            # Uses the existing group: creating another one is a collective, and the processes load at different times.
            "mesh": DeviceMesh.from_group(cast(Any, dist.group.WORLD), device.type),
            "ignored_params": set(self._replicated),
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
            if config.fsdp_offload
            else OffloadPolicy(),
        }
        # Trained fp32 weights are gathered in the dtype of autocast; hidden states keep the dtypes that autocast chose.
        param_dtype = None if step.lm.adapters or precision.dtype == torch.float32 else precision.dtype
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in decoder_layers(model):
            fully_shard(layer, mp_policy=policy, **options)
        fully_shard(step, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
        register_fsdp_forward_method(step, "call_in_forward")
        if not step.lm.adapters and has_experts(step.lm):
            cast(Any, step).set_reduce_scatter_unused_params(True)

    def broadcast_parameters(self) -> None:
        for parameter in self._replicated:
            dist.broadcast(parameter.data, src=0)

    def sync_gradients(self) -> None:
        # A parameter that has no gradient in any process gets none, as in one process: it is not decayed, and has no
        # optimizer state.
        counts = self._process_group.all_reduce_sum([parameter.grad is not None for parameter in self._replicated])
        used = [parameter for parameter, count in zip(self._replicated, counts, strict=True) if count]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
        for dtype in {gradient.dtype for gradient in gradients}:
            bucket = [gradient for gradient in gradients if gradient.dtype == dtype]
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self._process_group.world_size
            for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        for parameter, gradient in zip(used, gradients, strict=True):
            parameter.grad = gradient

    @contextlib.contextmanager
    def summon_full_params(self) -> Iterator[None]:
        modules = [module for module in self.step.modules() if isinstance(module, FSDPModule)]
        self.step.call_in_forward(lambda: None)  # torch makes the first module that is called the root
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            # torch prefetches in the order of the modules of the last forward pass. The processes ran different ones
            # in this context; this one is the same everywhere.
            self.step.call_in_forward(lambda: None)
            for module in modules:
                module.set_reshard_after_forward(not isinstance(module, TrainStep), recurse=False)
                module.reshard()


def has_experts(lm: CausalLM) -> bool:
    """Returns whether trained experts are separate modules, so that those that get no token have no gradient.

    transformers keeps all experts of a layer in one tensor, which always has a gradient.
    """
    lists = [m for name, m in lm.named_modules() if isinstance(m, nn.ModuleList) and name.endswith(".experts")]
    return any(parameter.requires_grad for experts in lists for parameter in experts.parameters())


def _trains_other_towers(lm: CausalLM) -> bool:
    """Returns whether parameters outside of decoder and head are trained: a vision tower has no gradient from text."""
    parts = (lm.model.get_decoder(), lm.model.get_output_embeddings(), lm.loss_module)
    used = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    return any(p.requires_grad and id(p) not in used for p in lm.parameters())


def can_share(config: TrainConfig, optimizer: OptimizerStage, *, has_adapters: bool) -> bool:
    """Returns whether fsdp2 supports the options: no fp16, and adapters or an optimizer that updates shards."""
    return not config.fp16 and (has_adapters or optimizer.elementwise)


def check(config: TrainConfig, optimizer: OptimizerStage, *, has_adapters: bool) -> None:
    """Raises ConfigError when fsdp2 does not support the options."""
    if config.distributed != "fsdp2" or can_share(config, optimizer, has_adapters=has_adapters):
        return
    if config.fp16:
        raise ConfigError(
            "option 'train.fp16': fsdp2 does not synchronise its loss scale over the shards; use bf16, or ddp"
        )
    raise ConfigError(
        f"option 'train.optim': {optimizer.name} needs whole tensors, and fsdp2 gives each process a shard; "
        f"take {', '.join(ELEMENTWISE[:-1])} or {ELEMENTWISE[-1]}, train an adapter (--plugin lora), or use ddp"
    )


def build_strategy(
    step: TrainStep, process_group: ProcessGroup, config: TrainConfig, precision: Precision
) -> ParallelStrategy:
    """Builds the strategy that the option `train.distributed` selects; without a process group, that of one process."""
    if not process_group.is_initialized:
        return ParallelStrategy(step)
    if config.distributed == "ddp":
        return DDPStrategy(step, process_group, precision.device)
    return FSDP2Strategy(step, process_group, config, precision)
