"""An adapter's files as PEFT writes and reads them: adapter_model.safetensors and adapter_config.json.

Names of tensors are `base_model.model.`, the module's path in the model, and PEFT's name of the tensor in its layer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sftx import ModelError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# PEFT takes a target module of such a name, in a model whose experts are stacked, for one of the experts, as they were
# before transformers 5 stacked them. It therefore gets these layers as `target_parameters`, which it takes as they are.
_NAMES_OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def write(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors, by PEFT's names without their prefix, and the configuration; then read the file back.

    Raises ModelError when the file does not hold the tensors bit for bit.
    """
    copies = {_full_name(name): tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    # Tied weights are written twice: PEFT (0.21) loads no adapter that lacks one of the names, and safetensors
    # refuses two names for one memory.
    addresses: set[int] = set()
    for name, tensor in copies.items():
        if tensor.data_ptr() in addresses:
            copies[name] = tensor.clone()
        addresses.add(tensor.data_ptr())
    path = directory / WEIGHTS
    save_file(copies, path, metadata={"format": "pt"})
    with safe_open(path, framework="pt") as file:
        for name, tensor in copies.items():
            # As bytes, so that the sign of a zero counts too.
            if not torch.equal(file.get_tensor(name).flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)):
                raise ModelError(f"{path}: {name} reads back otherwise than it was written; check the disk")
    (directory / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def read(
    directory: Path,
    names: Collection[str],
    shapes: Mapping[str, torch.Size],
    bases: Mapping[str, Tensor],
    *,
    values: bool = True,
) -> dict[str, Tensor]:
    """Return a file's tensors, which must have these names and shapes; names are PEFT's without their prefix.

    `shapes`: of those tensors whose shape is known. `bases`: weights of the model that PEFT writes beside an adapted
    embedding or head; they must be the same here. `values`: read them; a dry run, whose tensors have none and whose
    model may have fewer layers, takes the shapes alone.
    Raises ModelError for a file that cannot be read, a tensor that is missing, too many, or of another shape.
    """
    path = directory / WEIGHTS
    if not path.is_file():
        raise ModelError(f"{path}: no such file; put the adapter's directory back, or name another one")
    # Opened for torch, a file becomes a storage, which a dry run cannot have.
    try:
        opened = safe_open(path, framework="pt" if values else "np")
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path}: is damaged, or was not copied to its end ({error}); copy it again, or take another "
            "checkpoint of the run"
        ) from error
    with opened as file:
        found = {name.removeprefix(_PREFIX): name for name in file.keys()}  # noqa: SIM118
        for name in found.keys() & bases.keys():
            key = found.pop(name)
            if values and not torch.equal(file.get_tensor(key), bases[name].cpu()):
                raise ModelError(f"{path}: {name} is another weight than this model's; load the model it was made for")
        if not values:
            found = {name: found[name] for name in names if name in found}
        if found.keys() != {*names}:
            missing, extra = sorted({*names} - found.keys()), sorted(found.keys() - {*names})
            raise ModelError(
                f"{path}: {len(missing)} tensors of this adapter are missing and {len(extra)} are not part of it "
                f"(first: {(missing + extra)[0]}); the file was made with other target_modules or for another model"
            )
        if values:
            tensors = {name: file.get_tensor(key) for name, key in found.items()}
        else:
            tensors = {name: torch.empty(file.get_slice(key).get_shape()) for name, key in found.items()}
    for name, tensor in tensors.items():
        if name in shapes and tensor.shape != shapes[name]:
            raise ModelError(f"{path}: {name} has the shape {list(tensor.shape)}, expected {list(shapes[name])}")
    return tensors


def _full_name(name: str) -> str:
    """Return a tensor's name in the file. What belongs to no module of the model has its whole name already."""
    return name if name.startswith("base_model.") else f"{_PREFIX}{name}"


def target_entries(targets: Sequence[str], modules: Iterable[str], stacked: Collection[str]) -> dict[str, Any]:
    """Return `target_modules` and `target_parameters` for these targets: paths of layers, or of experts' weights.

    `modules`, `stacked`: the paths of all modules of the model, and of all weights of stacked experts.
    """
    confused = _NAMES_OF_EXPERTS if stacked else frozenset()
    experts = [path for path in targets if path in stacked]
    as_parameters = [path for path in targets if path not in stacked and path.rpartition(".")[2] in confused]
    named = [path for path in targets if path not in stacked and path not in as_parameters]
    parameters = [f"{path}.weight" for path in as_parameters] + _shortest(experts, stacked, num_names=2)
    return {"target_modules": _shortest(named, modules), "target_parameters": parameters or None}


def _shortest(targets: Sequence[str], paths: Iterable[str], *, num_names: int = 1) -> list[str]:
    """Return the last names of the targets' paths, or the whole paths if the names would match others of `paths` too.

    PEFT adapts everything whose path ends in a name.
    """

    def ending(path: str) -> str:
        return ".".join(path.split(".")[-num_names:])

    names = sorted({ending(target) for target in targets})
    matched = [path for path in paths if ending(path) in names]
    return names if set(matched) == set(targets) else list(targets)
