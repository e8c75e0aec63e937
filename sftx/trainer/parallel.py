"""How a model's parameters lie in the processes of a run, and how their gradients come together.

`Engine` is one process. `Replicated` is torch's DistributedDataParallel: every process has the whole model. `Sharded`
is torch's fully_shard (FSDP2): every process has its share of each decoder layer, of what is left, of their gradients
and of the optimizer's state; a layer is whole only while it computes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as register_forward
from torch.nn.parallel import DistributedDataParallel

from sftx.assembly.stages import LossStage
from sftx.config.options import TrainConfig
from sftx.distributed.dtensor import full_tensor
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import ConfigError
from sftx.model.language_model import LanguageModel
from sftx.trainer.layers import decoder_layers
from sftx.trainer.precision import Precision
from sftx.types import Batch, LossSum

T = TypeVar("T")

_BY_ELEMENT: Final = ("adamw", "sgd", "lion")
"""Optimizers that update each number of a tensor by itself, so that a share of it is as good as the whole."""


# What is the same in all processes is not sent before each forward; the option has another name from torch 2.13 on.
_OPTIONS: Final = inspect.signature(DistributedDataParallel).parameters
_BUFFERS: Final = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"


class TrainStep(nn.Module):
    """One forward from a batch to its loss sum: what is wrapped for several processes, the loss inside."""

    def __init__(self, lm: LanguageModel, loss: LossStage) -> None:
        super().__init__()
        self.lm = lm
        self.loss = loss

    def forward(self, batch: Batch) -> LossSum:
        return self.loss(self.lm, batch)

    def within(self, work: Callable[[], T]) -> T:
        """What `work` gives, which may call the model: parameters that belong to no layer are whole within it."""
        return work()


class Engine:
    """One process, which has all there is."""

    def __init__(self, step: TrainStep) -> None:
        self.step = step

    def __call__(self, batch: Batch) -> LossSum:
        """The loss of a micro-batch whose gradient is wanted."""
        out: LossSum = self.step(batch)
        return out

    def broadcast_parameters(self) -> None:
        """Gives what trains in every process the values of the main one's. Every process calls it, once."""

    def micro_batch_context(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `last` of a step."""
        return contextlib.nullcontext()

    def sync_gradients(self) -> None:
        """Once all gradients of a step are there."""

    def summon_full_params(self) -> AbstractContextManager[None]:
        """Within it every process has the whole model, and may call it without the others."""
        return contextlib.nullcontext()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Each added up over all processes."""
        return values

    @property
    def gradient_scale(self) -> float:
        """What a loss is multiplied with because gradients are averaged over the processes."""
        return 1.0


class MultiProcessStrategy(Engine):
    """What is the same however the model lies in the processes."""

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
    """Every process has the whole model; gradients are added up while the last backward of a step runs."""

    def __init__(self, step: TrainStep, process_group: ProcessGroup, device: torch.device) -> None:
        super().__init__(step, process_group)
        buffers: dict[str, Any] = {_BUFFERS: False}
        # torch has no public way to leave out what is frozen, which need not be sent.
        fixed = [name for name, p in step.named_parameters(remove_duplicate=False) if not p.requires_grad]
        fixed += [name for name, _ in step.named_buffers(remove_duplicate=False)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, fixed)
        self._module = DistributedDataParallel(
            step,
            device_ids=[device.index] if device.type == "cuda" else None,
            **buffers,
            gradient_as_bucket_view=True,
            find_unused_parameters=has_experts(step.lm) or _trains_beyond_text(step.lm),
        )

    def __call__(self, batch: Batch) -> LossSum:
        out: LossSum = self._module(batch)
        return out

    @contextlib.contextmanager
    def micro_batch_context(self, *, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self._module.no_sync():
            yield


class FSDP2Strategy(MultiProcessStrategy):
    """Every process has its share of the model. What adapters train is whole in each, as they save and load it.

    The base that they leave frozen is shared out as it is, in whatever dtype, so that a quantised one fits too.
    """

    def __init__(self, step: TrainStep, process_group: ProcessGroup, config: TrainConfig, precision: Precision) -> None:
        """Moves the model to the device, layer by layer."""
        super().__init__(step, process_group)
        model, device = step.lm.model, precision.device
        step.lm.computes_on = device
        self._replicated = [p for p in step.parameters() if p.requires_grad] if step.lm.adapters else []
        for parameter in self._replicated:
            parameter.data = parameter.data.to(device)
        shared: dict[str, Any] = {
            # Of the group that there is: to make another, all would have to come here at the same time.
            "mesh": DeviceMesh.from_group(cast(Any, dist.group.WORLD), device.type),
            "ignored_params": set(self._replicated),
            "offload_policy": _offload(device) if config.fsdp_offload else OffloadPolicy(),
        }
        # Weights that train in fp32 are sent in the dtype of the products; states stay as autocast has them.
        narrow = None if step.lm.adapters or precision.dtype == torch.float32 else precision.dtype
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in decoder_layers(model):
            fully_shard(layer, mp_policy=policy, **shared)
        fully_shard(step, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **shared)
        register_forward(step, "within")
        if not step.lm.adapters and has_experts(step.lm):
            cast(Any, step).set_reduce_scatter_unused_params(True)

    def broadcast_parameters(self) -> None:
        for parameter in self._replicated:
            dist.broadcast(parameter.data, src=0)

    def sync_gradients(self) -> None:
        # A gradient that is nowhere stays away, as in one process: what is unused neither decays nor has a state.
        counts = self._process_group.all_reduce_sum([parameter.grad is not None for parameter in self._replicated])
        used = [p for p, count in zip(self._replicated, counts, strict=True) if count]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
        for dtype in {gradient.dtype for gradient in gradients}:
            alike = [gradient for gradient in gradients if gradient.dtype == dtype]
            summed = torch.cat([gradient.flatten() for gradient in alike])
            dist.all_reduce(summed)
            summed /= self._process_group.world_size
            for gradient, part in zip(alike, summed.split([one.numel() for one in alike]), strict=True):
                gradient.copy_(part.view_as(gradient))
        for parameter, gradient in zip(used, gradients, strict=True):
            parameter.grad = gradient

    @contextlib.contextmanager
    def summon_full_params(self) -> Iterator[None]:
        modules = [module for module in self.step.modules() if isinstance(module, FSDPModule)]
        self.step.within(lambda: None)  # torch takes the first module that is called for the outermost one
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            # torch fetches, in a backward pass, what it saw called before: from here on that is the same everywhere.
            self.step.within(lambda: None)
            for module in modules:
                module.set_reshard_after_forward(not isinstance(module, TrainStep), recurse=False)
                module.reshard()


def has_experts(lm: LanguageModel) -> bool:
    """Whether there are experts, modules of their own, to some of which no token of a process may go. Where they are
    one tensor, as transformers has them, all of it gets a gradient."""
    lists = [m for name, m in lm.named_modules() if isinstance(m, nn.ModuleList) and name.endswith(".experts")]
    return any(parameter.requires_grad for experts in lists for parameter in experts.parameters())


def _trains_beyond_text(lm: LanguageModel) -> bool:
    """Whether what trains is not all of decoder and head: a tower for pictures gets no gradient from text."""
    parts = (lm.model.get_decoder(), lm.model.get_output_embeddings())
    reached = {id(parameter) for part in parts for parameter in part.parameters()}
    return any(p.requires_grad and id(p) not in reached for p in lm.parameters())


def can_share(config: TrainConfig, *, has_adapters: bool) -> bool:
    """Whether fsdp2 is able to do it."""
    return not config.fp16 and (has_adapters or config.optim in _BY_ELEMENT)


def check(config: TrainConfig, *, has_adapters: bool) -> None:
    """Raises ConfigError for what cannot be done on shares of a model."""
    if config.distributed != "fsdp2" or can_share(config, has_adapters=has_adapters):
        return
    if config.fp16:
        raise ConfigError(
            "option 'train.fp16': its loss scale is not kept together over the shares of fsdp2; use bf16, or ddp"
        )
    raise ConfigError(
        f"option 'train.optim': {config.optim} needs whole tensors, of which fsdp2 gives each process a share; "
        f"take {', '.join(_BY_ELEMENT[:-1])} or {_BY_ELEMENT[-1]}, train an adapter (--plugin lora), or use ddp"
    )


def engine(step: TrainStep, process_group: ProcessGroup, config: TrainConfig, precision: Precision) -> Engine:
    """What the options and the number of processes ask for."""
    if not process_group.is_initialized:
        return Engine(step)
    if config.distributed == "ddp":
        return DDPStrategy(step, process_group, precision.device)
    return FSDP2Strategy(step, process_group, config, precision)


def _offload(device: torch.device) -> CPUOffloadPolicy:
    return CPUOffloadPolicy(pin_memory=device.type == "cuda")


whole = full_tensor  # its name in trainer.py, until that is adapted
