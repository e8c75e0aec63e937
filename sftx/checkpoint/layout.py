"""Names of the files and directories that a run writes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sftx.errors import ModelError

RUN: Final = "run.yaml"
MANIFEST: Final = "manifest.json"
SUMMARY: Final = "summary.json"
PRECOMPUTED: Final = "precomputed.safetensors"
"""What the loss computed of every example before the first step."""
ROLLOUTS: Final = "rollouts.jsonl"
"""Every answer of a run with a rollout, with its rewards."""

NO_FP32_COPY: Final = "no fp32 copy of weights"
"""In the manifest's `dtype` where a full model was trained in bfloat16."""

ADAPTER: Final = "adapter"
MODEL: Final = "model"
"""Directory of the artefact, by what was trained; `model` is also the stem of sharded weights."""

LOSS_MODULE: Final = "loss/module.safetensors"
"""What a loss trains beside the model (`Loss.module`), below the artefact or the checkpoint."""

EXPORT: Final = "export"
"""Directory of a run's exports, each of which is named after its plugin."""
MERGED: Final = "merged"
"""Directory of the merged model, by `sftx merge`."""

CHECKPOINTS: Final = "checkpoints"
OPTIMIZER: Final = "optimizer"
"""Stem of the files with the optimizer's state."""
RUN_STATE: Final = "run_state.json"
TRAINER_STATE: Final = "trainer_state.json"
"""The history of a run in transformers' format; in every checkpoint, and in the run directory at the end."""

FORMAT: Final = 1
"""Version of a checkpoint's format, under the key `form` of run_state.json."""

_NAMES_OF_0_1: Final = {"num_tokens": "num_label_tokens", "num_real_tokens": "num_input_tokens"}
"""Keys that sftx 0.1 wrote, with their names today."""

_STEP: Final = re.compile(r"step-(\d{1,12})")


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    """Return the directory of the checkpoint of that optimizer step."""
    return checkpoints / f"step-{step}"


def run_of(directory: Path) -> Path | None:
    """Return the run directory that a directory is, or whose result or checkpoint it is; None for any other."""
    if (directory / RUN).exists():
        return directory
    absolute = directory.absolute()
    if absolute.name in (ADAPTER, MODEL) and (absolute.parent / RUN).exists():
        return absolute.parent
    is_checkpoint = absolute.parent.name == CHECKPOINTS and (absolute.parent.parent / RUN).exists()
    return absolute.parent.parent if is_checkpoint else None


def locate(directory: Path) -> tuple[Path, Path | None]:
    """Return the directory that holds the weights, and the run directory it belongs to, if any.

    Raises ModelError when there is no such directory, and for a run without a result.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such directory; name a run, one of its checkpoints, an adapter or a model")
    run = run_of(directory)
    if run != directory:
        return directory, run
    for name in (ADAPTER, MODEL):
        if (directory / name).is_dir():
            return directory / name, directory
    checkpoints = list(find_checkpoints(directory / CHECKPOINTS).values())
    hint = f", or load its last checkpoint, {checkpoints[-1]}" if checkpoints else ""
    raise ModelError(f"{directory}: this run has no result yet; finish it with sftx run --resume{hint}")


def step_of(place: str) -> int | None:
    """Return the optimizer step of `checkpoints/step-N`, relative to the run directory; None for any other path."""
    directory, _, name = place.rpartition("/")
    match = _STEP.fullmatch(name) if directory == CHECKPOINTS else None
    return None if match is None else int(match[1])


def find_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """Return the checkpoints in a directory by their optimizer step, oldest first; none when it does not exist."""
    entries = checkpoints.iterdir() if checkpoints.is_dir() else ()
    steps = {int(match[1]): path for path in entries if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(steps.items()))


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a JSON object under today's names, where sftx 0.1 wrote them under others."""
    return {_NAMES_OF_0_1.get(name, name): value for name, value in values.items()}
