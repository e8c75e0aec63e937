"""Saving and restoring the state of optimizers bit for bit, as named tensors and JSON values.

torch's own load_state_dict is not used: it casts what it loads to the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sftx.distributed.dtensor import local_shard, shard_like
from sftx.errors import ModelError

PARAMETERS: Final = "parameters"

NamedParameters = Mapping[str, nn.Parameter]
"""The trained parameters by their names in the model, in its order."""


def gather(optimizers: Sequence[Optimizer], parameters: NamedParameters) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state as tensors by `<parameter>/<entry>`, and what each parameter has of them as JSON values.

    The tensors are the optimizer's own, not copies.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    seen: set[int] = set()
    for name, parameter, optimizer, _ in _with_optimizers(optimizers, parameters):
        state = optimizer.state.get(parameter, {})
        entries = {entry: value for entry, value in state.items() if isinstance(value, Tensor)}
        for entry, value in entries.items():
            # safetensors refuses two names of one memory: bitsandbytes' code tables are shared by all parameters.
            address = local_shard(value).untyped_storage().data_ptr()
            tensors[f"{name}/{entry}"] = value.clone() if address in seen else value.contiguous()
            seen.add(address)
        described[name] = {
            "shape": list(parameter.shape),
            "tensors": sorted(entries),
            "values": {entry: value for entry, value in state.items() if entry not in entries},
        }
    return tensors, {PARAMETERS: described}


@torch.no_grad()
def restore(
    optimizers: Sequence[Optimizer],
    parameters: NamedParameters,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Load what `gather` returned. Raises ModelError, before it changes anything, for the state of other parameters."""
    saved = values.get(PARAMETERS, {})
    _check_saved(saved, parameters, tensors)
    for name, parameter, optimizer, group in _with_optimizers(optimizers, parameters):
        state = dict(saved[name]["values"])
        for entry in saved[name]["tensors"]:
            state[entry] = _placed(tensors[f"{name}/{entry}"], entry, parameter, optimizer, group)
        optimizer.state.pop(parameter, None)
        if state:
            optimizer.state[parameter] = state


def _with_optimizers(
    optimizers: Sequence[Optimizer], parameters: NamedParameters
) -> Iterator[tuple[str, nn.Parameter, Optimizer, dict[str, Any]]]:
    """Yield each parameter's name, the parameter, its optimizer and its parameter group."""
    owner = {id(p): (o, group) for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        yield name, parameter, *owner[id(parameter)]


def _check_saved(saved: Mapping[str, Any], parameters: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if name not in saved:
            raise ModelError(f"the saved state of the optimizer lacks {name}, which trains in this run")
        saved_shape, shape = saved[name]["shape"], list(parameter.shape)
        if saved_shape != shape:
            raise ModelError(
                f"the saved state of the optimizer is for {name} of shape {saved_shape}; here it has {shape}"
            )
    for name in saved:
        if name not in parameters:
            raise ModelError(f"the saved state of the optimizer has {name}, which does not train in this run")
    expected = {f"{name}/{entry}" for name, described in saved.items() for entry in described["tensors"]}
    for key in sorted(expected ^ set(tensors)):
        what = "lacks the tensor" if key in expected else "has a tensor too many:"
        raise ModelError(f"the saved state of the optimizer {what} {key}")


def _placed(
    value: Tensor, entry: str, parameter: nn.Parameter, optimizer: Optimizer, group: Mapping[str, Any]
) -> Tensor:
    """Copy a saved tensor, in its saved dtype, to where the optimizer itself would have made it."""
    if entry == "step":
        # torch keeps the step count on the CPU, except for kernels that read it on the device.
        on_device = group.get("fused") or group.get("capturable")
        return value.to(parameter.device if on_device else "cpu", copy=True)
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor):
        return shard_like(value, parameter)
    make_buffer = getattr(optimizer, "get_state_buffer", None)  # bitsandbytes, whose memory may be paged
    made = make_buffer(parameter, dtype=value.dtype) if make_buffer else torch.empty_like(parameter, dtype=value.dtype)
    return made.copy_(value)
