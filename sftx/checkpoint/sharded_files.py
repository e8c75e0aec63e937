"""Named tensors that are shared out among processes become safetensors files, one a process, and back.

The files and their index are in transformers' form: `model-00001-of-00004.safetensors`, `model.safetensors.index.json`.
Every tensor in them is whole: each is put together in the process that writes it, one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sftx.distributed.process_group import ProcessGroup
from sftx.errors import OutputError
from sftx.trainer.parallel import whole

MODEL: Final = "model"
OPTIMIZER: Final = "optimizer"


def gather(
    tensors: Mapping[str, Tensor], process_group: ProcessGroup, owner: Callable[[str], int]
) -> dict[str, Tensor]:
    """The tensors that this process is the owner of, whole, on the host; of two names of one tensor the first."""
    ours: dict[str, Tensor] = {}
    for name, tensor in _once(tensors).items():
        complete = whole(tensor.detach())  # sent to every process, and let go of at once where it is not wanted
        if owner(name) == process_group.rank:
            ours[name] = complete.cpu().contiguous()
    return ours


def write(tensors: Mapping[str, Tensor], directory: Path, stem: str, process_group: ProcessGroup) -> None:
    """Writes a file a process, each with about as many bytes, and the index. Every process calls it."""
    owners = _owners(_once(tensors), process_group.world_size)
    ours = gather(tensors, process_group, owners.__getitem__)
    files = [
        f"{stem}-{rank + 1:05d}-of-{process_group.world_size:05d}.safetensors"
        for rank in range(process_group.world_size)
    ]
    process_group.all_or_raise(
        lambda: save_file(ours, directory / files[process_group.rank], metadata={"format": "pt"})
    )
    names = process_group.all_gather(list(ours))
    index = {
        "metadata": {
            "total_size": int(process_group.all_reduce_sum([sum(tensor.nbytes for tensor in ours.values())])[0])
        },
        "weight_map": {name: file for file, held in zip(files, names, strict=True) for name in held},
    }
    process_group.run_on_rank0(
        lambda: _index(directory, stem).write_text(json.dumps(index, indent=2), encoding="utf-8")
    )


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the second names of tensors that are there already."""
    names = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
    return {name: tensor for name, tensor in tensors.items() if names[id(tensor)] == name}


def _owners(tensors: Mapping[str, Tensor], num_ranks: int) -> dict[str, int]:
    """Of each tensor, largest first, the process with the fewest bytes so far."""
    totals = [0] * num_ranks
    owners = {}
    for name in sorted(tensors, key=lambda name: -_num_bytes(tensors[name])):
        owners[name] = totals.index(min(totals))
        totals[owners[name]] += _num_bytes(tensors[name])
    return owners


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _index(directory: Path, stem: str) -> Path:
    return directory / f"{stem}.safetensors.index.json"


class Saved(Mapping[str, Tensor]):
    """The tensors of one file, or of several with their index; each is read when it is asked for."""

    def __init__(self, directory: Path, stem: str) -> None:
        """Raises OutputError when there is neither."""
        single, index = directory / f"{stem}.safetensors", _index(directory, stem)
        self._directory = directory
        if single.exists():
            with safe_open(single, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), single.name)
        elif index.exists():
            self._files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            raise OutputError(f"{single}: is missing")
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(self._directory / file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
