"""The state of optimizers becomes named tensors and JSON values, and back, bit for bit.

Not by torch's own load_state_dict, which casts what it loads to the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sftx.errors import ModelError
from sftx.trainer.parallel import local, shard_like
from sftx.trainer.parameter_groups import TrainableParam

PARAMETERS: Final = "parameters"


class _Owned(NamedTuple):
    """A parameter's name and the optimizer and group that update it."""

    name: str
    parameter: nn.Parameter
    optimizer: Optimizer
    group: dict[str, Any]


def _owned(optimizers: Sequence[Optimizer], members: Sequence[TrainableParam]) -> Iterator[_Owned]:
    owner = {id(p): (o, group) for o in optimizers for group in o.param_groups for p in group["params"]}
    for one in members:
        yield _Owned(one.name, one.parameter, *owner[id(one.parameter)])


def gather(
    optimizers: Sequence[Optimizer], members: Sequence[TrainableParam]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as it stands, not copied: `<parameter>/<entry>` to tensor, and what each parameter has of them."""
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    seen: set[int] = set()
    for name, parameter, optimizer, _ in _owned(optimizers, members):
        state = optimizer.state.get(parameter, {})
        entries = {entry: value for entry, value in state.items() if isinstance(value, Tensor)}
        for entry, value in entries.items():
            # safetensors refuses two names of one memory: bitsandbytes' tables of codes are the same for all.
            place = local(value).untyped_storage().data_ptr()
            tensors[f"{name}/{entry}"] = value.clone() if place in seen else value.contiguous()
            seen.add(place)
        parameters[name] = {
            "shape": list(parameter.shape),
            "tensors": sorted(entries),
            "values": {entry: value for entry, value in state.items() if entry not in entries},
        }
    return tensors, {PARAMETERS: parameters}


@torch.no_grad()
def restore(
    optimizers: Sequence[Optimizer],
    members: Sequence[TrainableParam],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Takes what `gather` gave. Raises ModelError, and changes nothing, when it is of other parameters."""
    saved = values.get(PARAMETERS, {})
    _check(saved, members, tensors)
    for owned in _owned(optimizers, members):
        described = saved[owned.name]
        state = dict(described["values"])
        for entry in described["tensors"]:
            state[entry] = _placed(owned, entry, tensors[f"{owned.name}/{entry}"])
        owned.optimizer.state.pop(owned.parameter, None)
        if state:
            owned.optimizer.state[owned.parameter] = state


def _check(saved: Mapping[str, Any], members: Sequence[TrainableParam], tensors: Mapping[str, Tensor]) -> None:
    own = {one.name: list(one.parameter.shape) for one in members}
    for name, shape in own.items():
        if name not in saved:
            raise ModelError(f"the saved state of the optimizer lacks {name}, which trains in this run")
        if saved[name]["shape"] != shape:
            raise ModelError(
                f"the saved state of the optimizer is for {name} of shape {saved[name]['shape']}; here it has {shape}"
            )
    for name in saved:
        if name not in own:
            raise ModelError(f"the saved state of the optimizer has {name}, which does not train in this run")
    expected = {f"{name}/{entry}" for name, described in saved.items() for entry in described["tensors"]}
    for key in sorted(expected ^ set(tensors)):
        what = "lacks the tensor" if key in expected else "has a tensor too many:"
        raise ModelError(f"the saved state of the optimizer {what} {key}")


def _placed(owned: _Owned, entry: str, value: Tensor) -> Tensor:
    """A copy where the library itself would have made it, in the saved dtype."""
    parameter, group = owned.parameter, owned.group
    if entry == "step":
        # torch keeps the count on the host, but for kernels that read it on the device.
        on_device = group.get("fused") or group.get("capturable")
        return value.to(parameter.device if on_device else "cpu", copy=True)
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor):
        return shard_like(value, parameter)
    make_buffer = getattr(owned.optimizer, "get_state_buffer", None)  # bitsandbytes', whose memory may be paged
    made = make_buffer(parameter, dtype=value.dtype) if make_buffer else torch.empty_like(parameter, dtype=value.dtype)
    return made.copy_(value)
