"""Runs of the tiny model with an observer, and the values in metrics.jsonl to compare with."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sftx.config.loading import load
from sftx.events import Result, RunInfo
from sftx.testing.observer_case import events, run_info, send
from sftx.training import run

STEPS, SAVED, STOPPED = 6, 3, 5
"""The steps of a run, the step of the only checkpoint before the interruption, and the interrupted step."""
HOSTILE = 'a b/../<x>|"é"\\//\ud800' + "n" * 300
"""A hostile name for a metric."""


class InterruptedRunError(Exception):
    """An exception that is unknown to sftx."""


def train(plugin: str, directory: Path, *, resume: bool = False, **settings: Any) -> Result:
    """Train six steps on eight rows into `directory`/run; evaluate and save after the third and the last."""
    rows = [{"prompt": f"count to {n}", "completion": " ".join("abcdefgh"[: n + 1])} for n in range(8)]
    directory.mkdir(exist_ok=True)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {
        "model": "sftx:tiny",
        "data.train": [str(directory / "rows.jsonl")],
        "data.eval": [str(directory / "rows.jsonl")],
        "data.max_overlap": 1,
        "output_dir": str(directory / "run"),
        "train.max_steps": STEPS,
        "train.per_device_train_batch_size": 2,
        "train.learning_rate": 1e-2,
        "train.eval_steps": SAVED,
        "train.save_steps": SAVED,
        "train.logging_steps": 1,
        "train.use_cpu": True,
        "generation.max_rows": 3,
        "generation.num_samples": 2,
        "generation.max_new_tokens": 4,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    loaded = load(
        None,
        add=["chatml", "lora", "exact-match", plugin],
        assignments=[(name, value, f"{name}={value}") for name, value in options.items()],
    )
    return run(loaded, name="observed", resume=resume)


def stop_in(step: int, error: BaseException, look: Callable[[], object] = lambda: None) -> pytest.MonkeyPatch:
    """Raise `error` at the start of that step until the patch is undone, after calling `look`."""
    from sftx.trainer.trainer import Trainer

    begin = Trainer.train_step

    def stopping(trainer: Trainer, number: int, *rest: Any) -> Any:
        if number == step:
            look()
            raise error
        return begin(trainer, number, *rest)

    patch = pytest.MonkeyPatch()
    patch.setattr(Trainer, "train_step", stopping)
    return patch


def logged(run_directory: Path, event: str, name: str) -> dict[int, float]:
    """Return the values under that name in metrics.jsonl, by step."""
    lines = map(json.loads, (run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line[name] for line in lines if line["event"] == event}


def play(plugin: object, place: Path, change: Callable[[str, tuple[Any, ...]], tuple[Any, ...]]) -> RunInfo:
    """Send the events of a run to an observer without training; `change` may replace their arguments."""
    from sftx.assembly.stages.stage import make

    info = run_info(place)
    observer = make(plugin, "sftx_observer", run=info)
    for name, arguments in events(info):
        send(observer, (name, change(name, arguments)), info)
    return info


# --- W&B's files ---------------------------------------------------------------------------------

_BLOCK, _HEADER = 32768, 7


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a `.wandb` file as W&B's protobuf messages.

    W&B no longer has a reader in Python. The file is a log in LevelDB's format after a header of seven bytes: blocks of
    32 KiB with chunks, each with a checksum (4 bytes), a length (2) and a type (1): full, first, middle or last.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, payload = path.read_bytes(), _HEADER, b""
    assert data[:4] == b":W&B"
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:  # the rest of the block is too short for a chunk
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:
            break
        payload += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):
            yield Record.FromString(payload)
            payload = b""


def wandb_files(directory: Path) -> Sequence[Path]:
    """Return the `.wandb` files, one for each process, oldest first."""
    return sorted(directory.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
