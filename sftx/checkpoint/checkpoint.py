"""Writing and reading artefacts and checkpoints. All files are safetensors or JSON; nothing is pickled.

A checkpoint is the artefact as of its step, `optimizer.safetensors`, `run_state.json`, `trainer_state.json` and
`checksums.json`, which is written last. A sharded model (FSDP2) is written as one file per rank with an index, in
transformers' format; every tensor in them is a full one, so that any number of ranks can read them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sftx import atomic_files
from sftx.assembly.peft_config import adapter_directory
from sftx.checkpoint import layout, model_card, model_files, sharded_files
from sftx.distributed.dtensor import full_tensor, has_shards, is_sharded, local_shard, shard_like
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import ModelError, OutputError, PluginError, TrainingError, one_line
from sftx.model import saved_tokenizer
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model
from sftx.types import ModelSpec

log = logging.getLogger(__name__)


def write_artefact(
    lm: CausalLM,
    directory: Path,
    process_group: ProcessGroup,
    *,
    consolidated: bool = True,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "50GB",
) -> None:
    """Write the adapters in PEFT's format, or the full model in transformers', and the tokenizer.

    Every rank must call it. Of a sharded model rank 0 writes one file, or, when not `consolidated`, each rank its own.
    `dtype`: of the full model's parameters in the files, where it is another one than in the run; adapters keep theirs.
    `max_shard_size`: of each of its files.
    Raises TrainingError for weights that are not finite, PluginError for an adapter that writes no weights.
    """
    not_finite = [n for n, p in lm.named_parameters() if p.requires_grad and not local_shard(p).isfinite().all()]
    num, first = max(process_group.all_gather((len(not_finite), not_finite[0] if not_finite else "")))
    if num:
        raise TrainingError(f"{num} trained tensors are not finite (first: {first}); nothing was saved")
    if dtype is not None and exceeds(lm, dtype, process_group):
        log.warning(
            "a weight is too large for %s: the model is saved as it was trained", str(dtype).removeprefix("torch.")
        )
        dtype = None
    if not lm.adapters:
        _write_model(
            lm, directory, process_group, consolidated=consolidated, dtype=dtype, max_shard_size=max_shard_size
        )
    process_group.run_on_rank0(lambda: _write_adapters_and_tokenizer(lm, directory))
    _write_loss_module(lm, directory, process_group)


def num_bytes(lm: CausalLM, dtype: torch.dtype | None) -> int:
    """Return the bytes of the weights that `write_artefact` writes with this `dtype`."""
    return sum(
        p.numel() * (p.itemsize if dtype is None else dtype.itemsize)
        for p in lm.parameters()
        if p.requires_grad or not lm.adapters
    )


@torch.no_grad()
def exceeds(lm: CausalLM, dtype: torch.dtype, process_group: ProcessGroup) -> bool:
    """Return whether a parameter has a value that is infinite in `dtype`."""
    largest = max(float(local_shard(p).abs().max()) for p in lm.parameters() if local_shard(p).numel())
    return process_group.all_reduce_max(largest) > torch.finfo(dtype).max


def _write_model(
    lm: CausalLM,
    directory: Path,
    process_group: ProcessGroup,
    *,
    consolidated: bool,
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> None:
    is_sharded = has_shards(lm.model)
    if is_sharded and not consolidated:
        process_group.run_on_rank0(lambda: model_files.save_without_weights(lm.model, directory))
        sharded_files.write(lm.model.state_dict(keep_vars=True), directory, layout.MODEL, process_group)
        return
    weights = None
    if is_sharded or dtype is not None:
        tensors = lm.model.state_dict(keep_vars=True)  # tied weights are one parameter under two names
        dtypes = {} if dtype is None else dict.fromkeys(_parameters_to_cast(lm.model, dtype), dtype)
        weights = sharded_files.gather(tensors, process_group, owner=lambda name: 0, dtypes=dtypes)
    # transformers writes them under the names of the architecture's files, and tied weights once.
    process_group.run_on_rank0(
        lambda: model_files.save_model(lm.model, directory, weights, dtype=dtype, max_shard_size=max_shard_size)
    )


def _parameters_to_cast(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Return the parameters that are saved in `dtype`: all but those that transformers keeps in fp32 beside it."""
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, p in named if p.is_floating_point() and not any(pattern.search(name) for pattern in kept)]


def _write_adapters_and_tokenizer(lm: CausalLM, directory: Path) -> None:
    for name, adapter in lm.adapters.items():
        place = adapter_directory(directory, name, num_adapters=len(lm.adapters))
        place.mkdir(exist_ok=True)
        adapter.save(place)
        if not any(place.glob("*.safetensors")):
            raise PluginError(f"{adapter}: save wrote no .safetensors file, so what was trained would be lost")
    saved_tokenizer.save(lm.tokenizer, directory, lm.tokenizer_entries)
    if (directory / model_card.PEFT_CONFIG).exists() and lm.model.generation_config is not None:
        # What loads an adapter takes the base model's settings; those that stop at the end of an answer lie beside it.
        lm.model.generation_config.save_pretrained(directory)
        model_card.write_adapter(directory, lm.tokenizer_entries.get("eos_token", lm.tokenizer.eos_token))
    if not lm.adapters:
        model_files.copy_processor(lm.model, directory)


def _write_loss_module(lm: CausalLM, directory: Path, process_group: ProcessGroup) -> None:
    """Write what the loss trains beside the model. Every rank must call it: with FSDP2 it is gathered."""
    if lm.loss_module is None:
        return
    tensors = {name: full_tensor(tensor.detach()).cpu() for name, tensor in lm.loss_module.state_dict().items()}
    file = directory / layout.LOSS_MODULE  # in a directory of its own: some programs read all weights beside a model

    def write() -> None:
        file.parent.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)

    process_group.run_on_rank0(write)


@torch.no_grad()
def load_loss_module(lm: CausalLM, directory: Path) -> None:
    """Load what the loss has trained beside the model, where it has a module. Raises ModelError."""
    if lm.loss_module is None:
        return
    file, own = directory / layout.LOSS_MODULE, lm.loss_module.state_dict()
    try:
        saved = load_file(file)
        if (found := _shapes(saved)) != (expected := _shapes(own)):
            raise ValueError(f"it has {found}, expected {expected}")
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"{file}: the weights of the run's loss cannot be read: {one_line(error)}; take another checkpoint"
        ) from error
    for name, tensor in own.items():
        local_shard(tensor).copy_(local_shard(shard_like(saved[name], tensor)))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}


@torch.no_grad()
def load_weights(lm: CausalLM, directory: Path, *, trust_remote_code: bool) -> None:
    """Load an artefact's or a checkpoint's weights into the model, or into its adapters. Raises ModelError.

    Those of a loss's own module are loaded where the model has it already.
    """
    load_loss_module(lm, directory)
    for name, adapter in lm.adapters.items():
        adapter.load(adapter_directory(directory, name, num_adapters=len(lm.adapters)))
    if not lm.adapters:
        spec = ModelSpec(str(directory), lm.model.config, lm.model, trust_remote_code)
        # On the CPU: the device holds the model already, and the optimizer's state.
        saved = load_model(spec, [], dtype=lm.head_weight.dtype, device=torch.device("cpu")).state_dict()
        for name, own in lm.model.state_dict().items():
            local_shard(own).copy_(local_shard(shard_like(saved[name], own)))


def write_state(
    directory: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    trainer_state: Mapping[str, Any],
    process_group: ProcessGroup,
) -> None:
    """Write what a run needs besides its weights to go on: the optimizer's tensors, and JSON values.

    Every rank must call it.
    """
    if sharded := any(map(is_sharded, tensors.values())):
        sharded_files.write(tensors, directory, layout.OPTIMIZER, process_group)

    def write_on_rank0() -> None:
        if not sharded:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_cpu, directory / f"{layout.OPTIMIZER}.safetensors")
        state = json.dumps({"form": layout.FORMAT, **values}, allow_nan=False)
        (directory / layout.RUN_STATE).write_text(state, encoding="utf-8")
        history = json.dumps(trainer_state, indent=2, allow_nan=False)
        (directory / layout.TRAINER_STATE).write_text(history, encoding="utf-8")

    process_group.run_on_rank0(write_on_rank0)


def read_state(directory: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Return the tensors (each is read when it is looked up) and the values that `write_state` wrote.

    Raises OutputError for a checkpoint of another version's format.
    """
    values = json.loads((directory / layout.RUN_STATE).read_text(encoding="utf-8"))
    if values.pop("form") != layout.FORMAT:
        raise OutputError(f"{directory}: was written by another version of sftx, whose state this one cannot read")
    return sharded_files.LazyTensors(directory, layout.OPTIMIZER), values


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in `directory`. The newest `limit` are kept; all when it is None."""

    directory: Path
    limit: int | None

    def at(self, step: int) -> Path:
        """Return the directory of the checkpoint of that step, whether it exists or not."""
        return layout.checkpoint_path(self.directory, step)

    def newest_intact(self) -> Path | None:
        """Return the newest checkpoint whose files match their checksums; renames newer ones to `step-N.damaged`."""
        if not self.directory.exists():
            return None
        if not self.directory.is_dir():
            raise OutputError(f"{self.directory}: is no directory of checkpoints; move it away")
        atomic_files.remove_leftovers(self.directory)
        checkpoints = list(layout.find_checkpoints(self.directory).values())
        for path in reversed(checkpoints):
            damage = atomic_files.find_damage(path)
            if damage is None:
                return path
            log.warning("%s is damaged and set aside: %s", path, damage)
            aside = path.with_name(f"{path.name}.damaged")
            atomic_files.remove(aside)
            path.rename(aside)
        if checkpoints:
            log.warning("no intact checkpoint is left in %s: the run begins anew", self.directory)
        return None

    def prune(self, *, keep: Collection[int | None]) -> None:
        """Remove the oldest checkpoints beyond the limit, but never those of the steps `keep`."""
        if self.limit is not None:
            for step, path in list(layout.find_checkpoints(self.directory).items())[: -self.limit]:
                if step not in keep:
                    atomic_files.remove(path)
