"""What goes wrong in one rank of a run alone: given to `ranked.Starter` as what each rank does first."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


def kill_rank_1_in_step_5(rank: int) -> None:
    """In the midst of it, and the first time alone, which is told from the file `killed`."""
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
    """Every rank, as by kill -9, once the checkpoint of that step is written."""
    from sftx.trainer.trainer import Trainer

    begin = Trainer.step

    def step(trainer: Trainer, number: int, *rest: Any) -> Any:
        if number == 6:
            os._exit(137)
        return begin(trainer, number, *rest)

    Trainer.step = step


def _raise_at(owner: Any, name: str, call: int) -> None:
    """From now on the function raises when it is called so many times."""
    function, calls = getattr(owner, name), iter(range(1, call + 1))

    def raising(*arguments: Any) -> Any:
        if next(calls) == call:
            raise ValueError("a row that this rank alone has")
        return function(*arguments)

    setattr(owner, name, raising)


def raise_between_steps(rank: int) -> None:
    from sftx.trainer.trainer import Trainer

    if rank == 1:
        _raise_at(Trainer, "micro_batches", 3)


def raise_in_a_forward(rank: int) -> None:
    """In the midst of a step, where the others wait for this one's gradients."""
    from sftx_plugins.losses.masked_ce import MaskedCE

    if rank == 1:
        _raise_at(MaskedCE, "__call__", 8)


def raise_in_the_main_process(rank: int) -> None:
    """While it writes, and the others wait."""
    from sftx.checkpoint import checkpoint

    if rank == 0:
        _raise_at(checkpoint, "_write_values", 1)
