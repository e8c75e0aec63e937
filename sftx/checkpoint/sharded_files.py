"""Safetensors files of sharded tensors: one per rank, with an index, in transformers' format for large models.

The names are `model-00001-of-00004.safetensors` and `model.safetensors.index.json`. Every tensor in the files is a full
one: it is gathered for the rank that writes it, one tensor at a time, so that no rank holds all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sftx.distributed.dtensor import full_tensor
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import OutputError


def gather(
    tensors: Mapping[str, Tensor],
    process_group: ProcessGroup,
    owner: Callable[[str], int],
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Return the full tensors whose `owner` is this rank, on the CPU. Every rank must call it.

    A tensor that has several names is returned under the first. `dtypes`: of those that are to have another one.
    """
    owned: dict[str, Tensor] = {}
    for name, tensor in _without_aliases(tensors).items():
        full = full_tensor(tensor.detach())  # gathered on every rank, and freed at once where it is not needed
        if owner(name) == process_group.rank:
            owned[name] = full.to("cpu", dtypes.get(name, full.dtype)).contiguous()
    return owned


def write(tensors: Mapping[str, Tensor], directory: Path, stem: str, process_group: ProcessGroup) -> None:
    """Write one file per rank, each with about as many bytes, and the index. Every rank must call it."""
    owners = _assign_owners(_without_aliases(tensors), process_group.world_size)
    owned = gather(tensors, process_group, owners.__getitem__)
    num = process_group.world_size
    files = [f"{stem}-{rank + 1:05d}-of-{num:05d}.safetensors" for rank in range(num)]
    process_group.all_or_raise(
        lambda: save_file(owned, directory / files[process_group.rank], metadata={"format": "pt"})
    )
    names_by_rank = process_group.all_gather(list(owned))
    (num_bytes,) = process_group.all_reduce_sum([sum(tensor.nbytes for tensor in owned.values())])
    index = {
        "metadata": {"total_size": int(num_bytes)},
        "weight_map": {name: file for file, names in zip(files, names_by_rank, strict=True) for name in names},
    }
    process_group.run_on_rank0(
        lambda: _index_path(directory, stem).write_text(json.dumps(index, indent=2), encoding="utf-8")
    )


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop every name but the first of a tensor that has several."""
    first_names = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
    return {name: tensor for name, tensor in tensors.items() if first_names[id(tensor)] == name}


def _assign_owners(tensors: Mapping[str, Tensor], num_ranks: int) -> dict[str, int]:
    """Give each tensor, the largest first, to the rank that has the fewest bytes so far."""
    totals = [0] * num_ranks
    owners = {}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owners[name] = totals.index(min(totals))
        totals[owners[name]] += sizes[name]
    return owners


def _index_path(directory: Path, stem: str) -> Path:
    return directory / f"{stem}.safetensors.index.json"


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of one file, or of several with an index; each is read when it is looked up."""

    def __init__(self, directory: Path, stem: str) -> None:
        """Open the file or the index of that stem. Raises OutputError when there is neither."""
        single, index = directory / f"{stem}.safetensors", _index_path(directory, stem)
        self._directory = directory
        if single.exists():
            with safe_open(single, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), single.name)
        elif index.exists():
            self._files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            raise OutputError(f"{single}: is missing")
        self._open_files: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        if file not in self._open_files:
            self._open_files[file] = safe_open(self._directory / file, framework="pt")
        tensor: Tensor = self._open_files[file].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
