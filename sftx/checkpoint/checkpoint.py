"""What was trained becomes a directory that others load; with the state of the run beside it, a checkpoint.

`checkpoints/step-N` holds the artefact as of step N, `optimizer.safetensors`, `run_state.json`, `trainer_state.json`
in transformers' form, and `checksums.json`, written last. Safetensors and JSON, nothing pickled. Of a model that is
shared out among processes each writes a file of its own, in transformers' form of several files with an index; every
tensor in them is whole, so that any number of processes can read them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from sftx import atomic_files
from sftx.checkpoint import sharded_files
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import OutputError, PluginError, TrainingError
from sftx.model.language_model import LanguageModel
from sftx.model.load import load_model
from sftx.trainer.parallel import is_sharded, is_shared, local, shard_like
from sftx.types import ModelSpec

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"step-(\d+)")
_OPTIMIZER, _STATE, _TRAINER_STATE = f"{sharded_files.OPTIMIZER}.safetensors", "run_state.json", "trainer_state.json"
_FORM: Final = 1


def write_artefact(
    lm: LanguageModel, directory: Path, process_group: ProcessGroup, *, consolidated: bool = True
) -> None:
    """Writes adapters in PEFT's form, or the whole model in transformers', and the tokenizer beside it.

    Every process calls it. Of a model that is shared out, the main process writes one file, or when not
    `consolidated`, every process its own. Raises TrainingError for weights that are not finite, PluginError for an
    adapter that writes none.
    """
    wrong = [n for n, p in lm.named_parameters() if p.requires_grad and not torch.isfinite(local(p)).all()]
    num_wrong, first = max(process_group.all_gather((len(wrong), wrong[0] if wrong else "")))
    if num_wrong:
        raise TrainingError(f"{num_wrong} trained tensors are not finite (first: {first}); nothing was saved")
    with _quiet():
        if not lm.adapters and is_shared(lm):
            _write_shared(lm, directory, process_group, consolidated=consolidated)
        process_group.run_on_rank0(lambda: _write_whole(lm, directory))


def _write_whole(lm: LanguageModel, directory: Path) -> None:
    """What the main process has of it all by itself."""
    if not lm.adapters and not is_shared(lm):
        lm.model.save_pretrained(directory)
    for name, adapter in lm.adapters.items():
        place = _place(lm, name, directory)
        place.mkdir(exist_ok=True)
        adapter.save(place)
        if not any(place.glob("*.safetensors")):
            raise PluginError(f"{adapter}: save wrote no .safetensors file, so what was trained would be lost")
    lm.tokenizer.save_pretrained(directory)


def _write_shared(lm: LanguageModel, directory: Path, process_group: ProcessGroup, *, consolidated: bool) -> None:
    weights = lm.model.state_dict(keep_vars=True)  # tied weights are one parameter under two names
    if consolidated:
        gathered = sharded_files.gather(weights, process_group, owner=lambda name: 0)
        # As transformers writes it: under the names of the architecture's files, tied weights once.
        process_group.run_on_rank0(lambda: lm.model.save_pretrained(directory, state_dict=gathered))
        return
    sharded_files.write(weights, directory, sharded_files.MODEL, process_group)
    process_group.run_on_rank0(lambda: _write_configuration(lm, directory))


def _write_configuration(lm: LanguageModel, directory: Path) -> None:
    lm.model.config.save_pretrained(directory)
    if lm.model.generation_config is not None:
        lm.model.generation_config.save_pretrained(directory)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()


@torch.no_grad()
def load_weights(lm: LanguageModel, directory: Path, *, trust_remote_code: bool) -> None:
    """Reads what `write_artefact` wrote into the model, or into the adapters that are attached. Raises ModelError."""
    for name, adapter in lm.adapters.items():
        adapter.load(_place(lm, name, directory))
    if not lm.adapters:
        spec = ModelSpec(str(directory), lm.model.config, lm.model, trust_remote_code)
        # On the host: the device holds the model already, and the optimizer's state.
        saved = load_model(spec, [], dtype=lm.head_weight.dtype, device=torch.device("cpu")).state_dict()
        for name, own in lm.model.state_dict().items():
            local(own).copy_(local(shard_like(saved[name], own)))


def _place(lm: LanguageModel, name: str, directory: Path) -> Path:
    """One adapter is the artefact; several lie side by side in it."""
    return directory if len(lm.adapters) == 1 else directory / name


def write_state(
    directory: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    trainer_state: Mapping[str, Any],
    process_group: ProcessGroup,
) -> None:
    """Writes what a run goes on from besides its weights: tensors, and JSON values. Every process calls it."""
    if any(map(is_sharded, tensors.values())):
        sharded_files.write(tensors, directory, sharded_files.OPTIMIZER, process_group)
    process_group.run_on_rank0(lambda: _write_values(directory, tensors, values, trainer_state))


def _write_values(
    directory: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], trainer_state: Mapping[str, Any]
) -> None:
    if not any(map(is_sharded, tensors.values())):
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / _OPTIMIZER
        )
    (directory / _STATE).write_text(json.dumps({"form": _FORM, **values}, allow_nan=False), encoding="utf-8")
    (directory / _TRAINER_STATE).write_text(json.dumps(trainer_state, indent=2, allow_nan=False), encoding="utf-8")


def read_state(directory: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote; tensors are read when they are asked for.

    Raises OutputError for a checkpoint of another version's form.
    """
    values = json.loads((directory / _STATE).read_text(encoding="utf-8"))
    if values.pop("form") != _FORM:
        raise OutputError(f"{directory}: was written by another version of sftx, whose state this one cannot read")
    return sharded_files.Saved(directory, sharded_files.OPTIMIZER), values


@dataclass(frozen=True)
class Checkpoints:
    """Those of one run, `step-N` in `directory`; the newest `limit` are kept, or all."""

    directory: Path
    limit: int | None

    def at(self, step: int | None) -> Path:
        return self.directory / f"step-{step}"

    def newest_whole(self) -> Path | None:
        """The newest that is as it was written; damaged ones are named and set aside."""
        if not self.directory.exists():
            return None
        if not self.directory.is_dir():
            raise OutputError(f"{self.directory}: is no directory of checkpoints; move it away")
        atomic_files.remove_leftovers(self.directory)
        found = self._found()
        for path in reversed(found):
            what = atomic_files.find_damage(path)
            if what is None:
                return path
            log.warning("%s is damaged and set aside: %s", path, what)
            aside = path.with_name(f"{path.name}.damaged")
            atomic_files.remove(aside)
            path.rename(aside)
        if found:
            log.warning("no whole checkpoint is left in %s: the run begins anew", self.directory)
        return None

    def prune(self, *, keep: int | None) -> None:
        """Removes the oldest beyond the limit, never that of the step to `keep`."""
        if self.limit is not None:
            for path in self._found()[: -self.limit]:
                if path != self.at(keep):
                    atomic_files.remove(path)

    def _found(self) -> list[Path]:
        """Oldest first."""
        steps = {path: int(match[1]) for path in self.directory.iterdir() if (match := _NAME.fullmatch(path.name))}
        return sorted(steps, key=steps.__getitem__)
