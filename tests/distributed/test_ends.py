"""How a run of several processes ends otherwise: one is killed, gets a signal, or has an error of its own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ranked import Group, Prepare, Starter, lines
from same_end import differences
from same_run import DDP, FSDP2


def mark_process(rank: int) -> None:
    Path(f"pid-{rank}").write_text(str(os.getpid()))


def wait_for_step(group: Group, step: int) -> None:
    group.until(lambda: (group.out / "metrics.jsonl").exists() and lines_so_far(group, step))


def lines_so_far(group: Group, step: int) -> bool:
    text = (group.out / "metrics.jsonl").read_text()
    return any(
        json.loads(line).get("step", 0) >= step for line in text.splitlines(keepends=True) if line.endswith("\n")
    )


# --- killed -------------------------------------------------------------------------------------


def kill_rank_1_in_step_5(rank: int) -> None:
    """In the midst of it, and the first time alone."""
    from sftx.training.loop import Trainer

    update = Trainer.accumulate
    if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":

        def accumulate(trainer: Trainer, batches: Any, counted: Any, number: int) -> Any:
            if number == 4:  # counted from 0
                Path("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return update(trainer, batches, counted, number)

        Trainer.accumulate = accumulate  # type: ignore[method-assign]


@pytest.mark.parametrize("mode", [DDP + "--plugin lora --set lora.lora_dropout=0.1", FSDP2], ids=["lora", "full"])
def test_a_rank_that_is_killed_under_torchrun_leaves_no_trace(mode: str, starter: Starter, common: str) -> None:
    """torchrun starts all ranks again, and they go on from the last checkpoint by themselves."""
    arguments = f"{common} {mode} --save-steps 3".split()
    agent = ["--nproc-per-node=2", "--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    undisturbed = starter.run(arguments, 2).succeed()
    group = starter.torchrun([agent], arguments, prepare=kill_rank_1_in_step_5)
    out = group.succeed()
    assert (group.directory / "killed").exists()
    assert [line["step"] for line in lines(out) if line["event"] == "step"] == list(range(1, 11))
    assert differences(out, undisturbed) == []


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "rank"), [(DDP, 1), (FSDP2, 1), (DDP, 0)])
def test_a_signal_to_one_rank_stops_and_saves_all(mode: str, rank: int, starter: Starter, common: str) -> None:
    arguments = f"{common} {mode} --max-steps 400".split()
    group = starter.run(arguments, 2, prepare=mark_process)
    wait_for_step(group, 3)
    os.kill(int((group.directory / f"pid-{rank}").read_text()), signal.SIGTERM)
    assert group.wait() == [143, 143]
    assert group.printed().count("stopped by SIGTERM after step") == 1, group.printed()
    (saved,) = (group.out / "checkpoints").iterdir()
    last = [line["step"] for line in lines(group.out) if line["event"] == "step"][-1]
    assert saved.name == f"step-{last}"
    assert last < 400


# --- errors of one rank -------------------------------------------------------------------------


def _raise_at(owner: type, name: str, call: int) -> None:
    """From now on the method raises when it is called so many times."""
    method, calls = getattr(owner, name), iter(range(1, call + 1))

    def raising(*arguments: Any) -> Any:
        if next(calls) == call:
            raise ValueError("a row that this rank alone has")
        return method(*arguments)

    setattr(owner, name, raising)


def raise_between_steps(rank: int) -> None:
    from sftx.training.loop import Trainer

    if rank == 1:
        _raise_at(Trainer, "micro_batches", 3)


def raise_in_a_forward(rank: int) -> None:
    """In the midst of a step, where the others wait for this one's gradients."""
    from sftx_plugins.masked_ce import MaskedCE

    if rank == 1:
        _raise_at(MaskedCE, "__call__", 8)


def raise_in_the_main_process(rank: int) -> None:
    """While it writes, and the others wait."""
    from sftx.training import checkpoint

    if rank == 0:
        _raise_at(checkpoint, "_write_values", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("prepare", [raise_between_steps, raise_in_a_forward, raise_in_the_main_process])
@pytest.mark.parametrize("mode", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_an_error_of_one_rank_ends_all_and_is_told(mode: str, prepare: Prepare, starter: Starter, common: str) -> None:
    group = starter.run(f"{common} {mode} --save-steps 5".split(), 2, prepare=prepare)
    codes = group.wait()
    assert 0 not in codes
    assert "a row that this rank alone has" in group.printed(), group.printed()
