"""Helpers for tests of interrupted runs: the command in this process, copies of run directories, signals in a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from killing import CASES, Case, Runs, case
from sftx.verify.run_differences import differences

PADDED, PACKED, STREAMING, BEST = CASES
SHORT = case(
    "short",
    "--plugin chatml --plugin lora --set lora.lora_dropout=0.2 --learning-rate 1e-2 --data {data}/train.jsonl "
    "--eval-data {data}/held.jsonl --gradient-accumulation-steps 2 --per-device-train-batch-size 2 --eval-steps 3 "
    "--save-steps 2 --save-total-limit 1 --max-steps 6 --max-dropped 0.2",
)
LLAMA3 = Case("llama3", tuple("llama3" if part == "chatml" else part for part in SHORT.arguments))


Sftx = Callable[..., Result]
"""The command `sftx` in this process: `sftx(case, directory, *more_arguments)`."""


def checkpoints(out: Path) -> list[str]:
    return sorted((path.name for path in (out / "checkpoints").iterdir()), key=lambda name: int(name.split("-")[1]))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def copy(out: Path, runs: Runs, name: str) -> Path:
    """Copy a run directory into a new directory, and return that."""
    directory = runs.directory(name)
    shutil.copytree(out, directory / "out")
    return directory


def only_shared(ours: Path, theirs: Path) -> list[str]:
    """Return the differences of two run directories, but for checkpoints that one has; the last must be in both."""
    left, right = checkpoints(ours), checkpoints(theirs)
    assert left[-1] == right[-1]
    found = differences(ours, theirs)
    return [line for line in found if not (line.startswith("checkpoints/") and ": only in " in line)]


def interrupted(runs: Runs, sftx: Sftx, wanted: Case, step: int, *more: str) -> tuple[Path, Path]:
    """Return a directory with a copy of the run as it was when `step` began, and the run directory at its end."""
    from sftx.trainer.trainer import Trainer

    train_step = Trainer.train_step
    directory, copies = runs.directory(wanted.name), []

    def copying(trainer: Trainer, number: int, *rest: Any) -> Any:
        if number == step:
            copies.append(copy(directory / "out", runs, "interrupted"))
        return train_step(trainer, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", copying)
        result = sftx(wanted, directory, *more)
    assert result.exit_code == 0, result.output
    return copies[0], directory / "out"


@contextmanager
def signal_at(place: int | None, number: signal.Signals) -> Iterator[Callable[[], int]]:
    """Send this process a signal when a run looks for one for the `place`-th time; None: never.

    Yields a function that returns how often the run has looked so far.
    """
    from sftx.distributed.signals import DeferredSignals
    from sftx.trainer import session

    count = 0

    class Signalled(DeferredSignals):
        @property
        def pending(self) -> int | None:
            nonlocal count
            count += 1
            if count == place:
                os.kill(os.getpid(), number)
            return super().pending

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "DeferredSignals", Signalled)
        yield lambda: count
