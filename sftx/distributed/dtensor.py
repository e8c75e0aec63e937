"""Helpers to save, load and measure DTensors, tensors that are sharded over the ranks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds a shard of the tensor only."""
    return isinstance(tensor, DTensor)


def has_shards(module: nn.Module) -> bool:
    """Return whether any parameter of the module is sharded."""
    return any(map(is_sharded, module.parameters()))


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather the full tensor from the shards of all ranks. Every rank must call it; nothing is sent for other tensors.

    The result of a sharded tensor is a new one on every rank; any other tensor is returned as it is.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard, which shares its memory with the tensor. Nothing is sent."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a copy of `value`, a full tensor, on the device of `like` and sharded as it is. Nothing is sent."""
    if not isinstance(like, DTensor):
        return value.to(like.device, copy=True)
    mesh = like.device_mesh
    sharded = distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
    return sharded.to(local_shard(like).device)  # the CPU, with fsdp_offload
