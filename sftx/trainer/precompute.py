"""Values that a loss computes of every example before the first step: `Loss.precompute`.

A reference's log-probabilities are the same in every epoch, so they are computed once, by the model as it is before
training. They are kept in two places: in the run directory, from which a resumed run reads them (its model has been
trained since), and in the cache of sftx, from which the next run on the same model, data and options takes them.

Dimensions: E examples of a batch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sftx.assembly.registry import Assembly
from sftx.assembly.stages.data_stages import CollatorStage
from sftx.atomic_files import open_bytes
from sftx.checkpoint import layout
from sftx.data.cache import code_digest
from sftx.data.dataset import Examples
from sftx.data.example_values import Values, places_of
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import OutputError, PluginError, SftxError, one_line
from sftx.model import names
from sftx.model.language_model import CausalLM
from sftx.model.load import fingerprint
from sftx.paths import cache_dir
from sftx.phases import phase
from sftx.trainer.evaluate import batches_by_length
from sftx.trainer.evaluation import explain_out_of_memory
from sftx.trainer.parallel import ParallelStrategy
from sftx.trainer.precision import Precision

log = logging.getLogger(__name__)

_CODE: Final = ("sftx.data.collate", "sftx.model", "sftx.types", "sftx_kernels")
_LIBRARIES: Final = ("torch", "transformers")
_DESCRIPTION: Final = "sftx"
"""The key of a file's metadata whose value says, as JSON, what the values are of."""


@dataclass
class Precomputation:
    """Finds the values of a run's splits where they are kept, and computes those that are not."""

    strategy: ParallelStrategy
    collator: CollatorStage
    precision: Precision
    process_group: ProcessGroup
    batch_size: int
    """Groups of examples that are computed at once."""
    splits: Mapping[str, Examples]
    """By their names in the files. A split without examples has no values."""
    identity: Mapping[str, Any] | None = None
    """All that the values depend on besides the examples (`identity_of`); None: they are not cached."""
    check_stop: Callable[[], None] = lambda: None
    """Called between batches; it raises when the run is to stop."""

    def __call__(self, file: Path, *, is_trained: bool, model: str) -> dict[str, Values]:
        """Return the values of each split, read or computed, and keep them in `file`. Every rank calls it.

        `is_trained`: the model, of the name `model`, is not as it was before training, so nothing can be computed any
        more. Raises OutputError then, and PluginError for what the loss returns.
        """
        digests = self._digests()
        found, computed = self._found_or_computed(file, digests, is_trained=is_trained, model=model)

        def keep() -> None:
            self._write(file, found | computed, digests)
            for name, values in computed.items():
                self._write_to_cache(name, values, digests[name])

        self.process_group.run_on_rank0(keep)
        return found | computed

    def look_up(self, file: Path, *, is_trained: bool, model: str) -> dict[str, Values]:
        """Return the same, and keep nothing: for rows that may not be those of the run."""
        found, computed = self._found_or_computed(file, self._digests(), is_trained=is_trained, model=model)
        return found | computed

    def _digests(self) -> dict[str, str]:
        return {name: examples.content_digest() for name, examples in self.splits.items() if len(examples)}

    def _found_or_computed(
        self, file: Path, digests: Mapping[str, str], *, is_trained: bool, model: str
    ) -> tuple[dict[str, Values], dict[str, Values]]:
        group = self.process_group
        found = group.run_on_rank0(lambda: self._found(file, digests))
        missing = [name for name in digests if name not in found]
        if missing and is_trained:
            raise OutputError(
                f"{file}: has not the values that {self.strategy.step.loss} computed before training, and {model} has "
                "been trained since; bring the file and the rows back, or begin another run"
            )
        return found, {name: self._computed(name) for name in missing}

    def _found(self, file: Path, digests: Mapping[str, str]) -> dict[str, Values]:
        """Return what is kept in the run directory or in the cache."""
        found: dict[str, Values] = {}
        for name, digest in digests.items():
            for place, split in ((file, name), (self._cached(digest), "values")):
                kept = None if place is None else self._read(place, split, digest)
                if kept is not None:
                    log.info("the values of %s for the %s rows come from %s", self.strategy.step.loss, name, place)
                    found[name] = kept
                    break
        return found

    def _computed(self, name: str) -> Values:
        """Compute the values of a split, divided among the ranks; the batches are the same however many there are."""
        examples, group, step = self.splits[name], self.process_group, self.strategy.step
        lm, loss = step.lm, step.loss
        batches = batches_by_length(examples, self.batch_size)
        rounds = range(0, len(batches), group.world_size)
        columns: dict[str, NDArray[np.float32]] = {}
        training = lm.training
        lm.eval()
        try:
            with (
                torch.no_grad(),
                self.precision.autocast(),
                group.detect_lost_peers(),
                explain_out_of_memory(lm, f"{loss}: to compute", "per_device_eval_batch_size", self.batch_size),
                phase("precomputing", f"{name} rows", total=len(rounds), unit="batches") as progress,
            ):
                for first in progress.counted(rounds):
                    self.check_stop()
                    number = first + group.rank
                    is_counted = number < len(batches)  # a rank that has none left takes part in the collectives
                    indices = batches[number if is_counted else 0].tolist()
                    chosen = [examples[index] for index in indices]
                    batch = self.collator.collate(chosen)
                    if loss.has_extras:
                        batch = loss.with_extras(batch)
                    on_device = batch.to(lm.device)
                    values = step.call_in_forward(partial(loss.precompute, lm, on_device))
                    at = np.asarray(indices)[places_of(batch, chosen)]
                    for key, value_E in values.items():
                        column = columns.setdefault(key, np.zeros(len(examples), np.float32))
                        if not value_E.isfinite().all():
                            first_row = batch.row_ids[int(value_E.isfinite().logical_not().nonzero()[0])]
                            raise PluginError(f"{loss}: precompute[{key!r}] of {first_row} is not finite")
                        if is_counted:
                            column[at] = value_E.cpu()
        finally:
            lm.train(training)
        # Each example is computed by one rank, and is 0 on the others.
        gathered = group.all_gather(columns)
        return Values({key: np.sum([one[key] for one in gathered], 0, np.float32) for key in columns})

    # --- files ----------------------------------------------------------------------------------

    def _read(self, file: Path, split: str, digest: str) -> Values | None:
        """Return the values of a split, None when the file has none of these examples, or models have changed since."""
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="numpy") as tensors:
                described = json.loads((tensors.metadata() or {}).get(_DESCRIPTION, "{}"))
                if described["digests"].get(split) != digest:
                    return None
                prefix = f"{split}/"
                columns = {key.removeprefix(prefix): tensors.get_tensor(key) for key in described["names"][split]}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read, and its values are computed again: %s", file, one_line(error))
            return None
        # Those of a run directory are what the run was begun with; the cache must not serve those of other weights.
        if split == "values" and any(
            _fingerprint(name) != sha256 for name, sha256 in described.get("models", {}).items()
        ):
            return None
        return Values(columns)

    def _write(self, file: Path, found: Mapping[str, Values], digests: Mapping[str, str]) -> None:
        """Write the values into the run directory. Raises OutputError."""
        with open_bytes(file) as out:
            out.write(_content(found, digests, {}))

    def _cached(self, digest: str) -> Path | None:
        """Return the place of a split's values in the cache."""
        if self.identity is None:
            return None
        text = json.dumps({**self.identity, "examples": digest}, sort_keys=True, default=str)
        return cache_dir() / "precomputed" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def _write_to_cache(self, name: str, values: Values, digest: str) -> None:
        """Write a split's values into the cache. A cache that cannot be written is no reason to end a run."""
        file, models = self._cached(digest), self.strategy.step.lm.other_models
        if file is None or None in models.values():
            return
        part = file.with_suffix(f".{os.getpid()}")  # another run may compute the same values at this time
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open_bytes(part) as out:
                out.write(_content({"values": values}, {"values": digest}, models))
            part.replace(file)
        except (OSError, SftxError) as error:
            log.warning("the values of the %s rows are not cached: %s", name, one_line(error))


def _content(splits: Mapping[str, Values], digests: Mapping[str, str], models: Mapping[str, str | None]) -> bytes:
    """Return the bytes of a safetensors file of these values, whose metadata says what they are of.

    They are the same whichever splits were found in the cache.
    """
    splits = dict(sorted(splits.items()))
    columns = {f"{split}/{key}": column for split, one in splits.items() for key, column in one.by_name.items()}
    described = {
        "digests": {split: digests[split] for split in splits},
        "names": {split: [f"{split}/{key}" for key in one.by_name] for split, one in splits.items()},
        "models": dict(models),
    }
    return save(columns, metadata={_DESCRIPTION: json.dumps(described)})


def _fingerprint(name: str) -> str | None:
    """Return what `fingerprint` says of a model today, None when it is not there any more."""
    try:
        return fingerprint(names.resolve(name))
    except (OSError, SftxError):
        return None


def identity_of(
    assembly: Assembly, lm: CausalLM, precision: Precision, weights_hash: str | None
) -> dict[str, Any] | None:
    """Return what the values depend on besides the examples: weights, plugins with their options, code and dtype.

    None when the content of the weights is not known.
    """
    if weights_hash is None:
        return None
    providers = [
        active
        for hook in ("sftx_loss", "sftx_collator", "sftx_adapter", "sftx_trainable")
        for active in assembly.providers(hook)
    ]
    packages = sorted({type(active.plugin).__module__.partition(".")[0] for active in providers})
    return {
        "weights": weights_hash,
        "num_embeddings": lm.head_weight.shape[0],
        "plugins": [[active.info.name, active.info.value, active.info.version, active.options] for active in providers],
        "code": {package: code_digest(package) for package in (*packages, *_CODE)},
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "dtype": str(precision.dtype),
        "device": lm.device.type,
    }


def file_in(directory: Path) -> Path:
    """Return the file of a run directory that holds the values."""
    return directory / layout.PRECOMPUTED
