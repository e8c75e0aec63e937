"""Faults that hit one rank of a run alone. `ranked.Starter` calls the function in every rank before the run starts."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

MESSAGE = "a row that this rank alone has"
"""The message of the errors that are raised."""


def kill_rank_1_in_step_5(rank: int) -> None:
    """Kills rank 1 in the middle of step 5, but not again after a restart, when the file `killed` exists."""
    from sftx.trainer.trainer import Trainer

    update = Trainer.accumulate

    def accumulate(trainer: Trainer, batches: Any, counted: Any, number: int) -> Any:
        if number == 4:  # counted from 0
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return update(trainer, batches, counted, number)

    if rank == 1 and not Path("killed").exists():
        Trainer.accumulate = accumulate


def end_after_step_5(rank: int) -> None:
    """Ends every rank, as kill -9 does, once the checkpoint of step 5 is written."""
    from sftx.trainer.trainer import Trainer

    train_step = Trainer.train_step

    def ending(trainer: Trainer, number: int, *rest: Any) -> Any:
        if number == 6:
            os._exit(137)
        return train_step(trainer, number, *rest)

    Trainer.train_step = ending


def _raise_at(owner: Any, name: str, call: int) -> None:
    """Makes a function raise at its call number `call`, counted from 1."""
    function, calls = getattr(owner, name), iter(range(1, call + 1))

    def raising(*arguments: Any) -> Any:
        if next(calls) == call:
            raise ValueError(MESSAGE)
        return function(*arguments)

    setattr(owner, name, raising)


def raise_between_steps(rank: int) -> None:
    from sftx.trainer.trainer import Trainer

    if rank == 1:
        _raise_at(Trainer, "micro_batches", 3)


def raise_in_a_forward(rank: int) -> None:
    """Raises in the middle of a step, while the other ranks wait for this one's gradients."""
    from sftx_plugins.losses.masked_ce import MaskedCE

    if rank == 1:
        _raise_at(MaskedCE, "__call__", 8)


def raise_on_rank_0_while_it_saves(rank: int) -> None:
    """Raises on rank 0 while it writes a checkpoint's run_state.json and the other ranks wait for it."""
    from sftx.checkpoint.layout import RUN_STATE

    write_text = Path.write_text

    def raising(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == RUN_STATE:
            raise ValueError(MESSAGE)
        return write_text(path, *arguments, **options)

    if rank == 0:
        Path.write_text = raising
