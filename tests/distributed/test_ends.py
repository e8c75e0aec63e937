"""A run of several processes in which one rank is killed, gets a signal, or raises an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rank_faults import (
    MESSAGE,
    kill_rank_1_in_step_5,
    raise_between_steps,
    raise_in_a_forward,
    raise_on_rank_0_while_it_saves,
)
from ranked import PATIENCE_S, Prepare, Starter, lines
from same_run import DDP, FSDP2, differing


def mark_process(rank: int) -> None:
    Path(f"pid-{rank}").write_text(str(os.getpid()))


def steps_so_far(out: Path) -> int:
    """Return the last step that a run which is under way has reported."""
    path = out / "metrics.jsonl"
    written = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in written if line.endswith("\n")), default=0)


# --- killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(DDP + "--plugin lora --set lora.lora_dropout=0.1", id="lora"),
        pytest.param(FSDP2, id="full", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_killed_under_torchrun_leaves_no_trace(mode: str, starter: Starter, common: str) -> None:
    """torchrun starts all ranks again, and they resume from the last checkpoint by themselves."""
    arguments = f"{common} {mode} --save-steps 3".split()
    agent = ["--nproc-per-node=2", "--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    undisturbed = starter.run(arguments, 2).succeed()
    group = starter.torchrun([agent], arguments, prepare=kill_rank_1_in_step_5)
    out = group.succeed()
    assert (group.directory / "killed").exists()
    assert [line["step"] for line in lines(out) if line["event"] == "step"] == list(range(1, 11))
    assert differing(out, undisturbed) == []


@pytest.mark.slow
def test_a_rank_that_is_killed_under_nproc_leaves_no_trace(starter: Starter, common: str) -> None:
    """The installed command runs, and a rank is killed from outside at an arbitrary instant."""
    arguments = f"{common} --distributed fsdp2 --max-steps 60 --save-steps 3 --save-total-limit 2".split()
    undisturbed = starter.run(arguments, 2).succeed()
    directory = starter.directory("nproc")
    out = directory / "out"
    command = [sys.executable, "-m", "sftx", "run", *arguments, "--output-dir", "out", "--nproc", "2"]
    with (directory / "printed").open("w") as printed:
        launcher = subprocess.Popen([*command, "--max-restarts", "1"], cwd=directory, stdout=printed, stderr=printed)
    try:
        while not (reached := steps_so_far(out) >= 5) and launcher.poll() is None:
            time.sleep(0.002)
        assert reached, (directory / "printed").read_text()
        os.kill(pid_of_rank(1, launcher.pid), signal.SIGKILL)
        assert launcher.wait(PATIENCE_S) == 0, (directory / "printed").read_text()
    finally:
        launcher.kill()
        launcher.wait()
    assert "rank 1 was killed by SIGKILL; starting again" in (directory / "printed").read_text()
    assert differing(out, undisturbed) == []


def pid_of_rank(rank: int, launcher: int) -> int:
    """Return the process id of a rank, among the child processes of the launcher."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (pid,) = (pid for pid in children if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return int(pid)


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "rank"),
    [
        (FSDP2, 1),
        pytest.param(DDP, 1, marks=pytest.mark.slow),
        pytest.param(DDP, 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_stops_and_saves_all(mode: str, rank: int, starter: Starter, common: str) -> None:
    arguments = f"{common} {mode} --max-steps 400".split()
    group = starter.run(arguments, 2, prepare=mark_process)
    group.until(lambda: steps_so_far(group.out) >= 3)
    os.kill(int((group.directory / f"pid-{rank}").read_text()), signal.SIGTERM)
    assert group.wait() == [143, 143]
    assert group.printed().count("stopped by SIGTERM after step") == 1, group.printed()
    (saved,) = (group.out / "checkpoints").iterdir()
    last = [line["step"] for line in lines(group.out) if line["event"] == "step"][-1]
    assert saved.name == f"step-{last}"
    assert last < 400


# --- errors of one rank -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "prepare"),
    [
        (DDP, raise_in_a_forward),
        (FSDP2, raise_between_steps),
        (DDP, raise_on_rank_0_while_it_saves),
        pytest.param(FSDP2, raise_in_a_forward, marks=pytest.mark.slow),
        pytest.param(DDP, raise_between_steps, marks=pytest.mark.slow),
        pytest.param(FSDP2, raise_on_rank_0_while_it_saves, marks=pytest.mark.slow),
    ],
)
def test_an_error_of_one_rank_ends_all_and_is_told(mode: str, prepare: Prepare, starter: Starter, common: str) -> None:
    group = starter.run(f"{common} {mode} --save-steps 5".split(), 2, prepare=prepare)
    codes = group.wait()
    assert 0 not in codes
    assert MESSAGE in group.printed(), group.printed()


CLOSING = """
import faulthandler, os, socket, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from sftx.config.options import TrainConfig
from sftx.distributed.torch_process_group import TorchProcessGroup

faulthandler.dump_traceback_later(300, exit=True)
sys.setswitchinterval(1000)  # another thread gets the interpreter's lock when this one waits, and never before
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
for _ in range(300):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    group = TorchProcessGroup(TrainConfig(use_cpu=True))
    module = DistributedDataParallel(torch.nn.Linear(8, 8))
    module(torch.randn(2, 8)).sum().backward()
    dist.all_reduce(torch.zeros(1))
    group.close()
    del module
print("closed")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a process that is bound to one core")
def test_a_group_that_ddp_was_the_last_to_refer_to_does_not_hang() -> None:
    done = subprocess.run([sys.executable, "-c", CLOSING], capture_output=True, text=True, timeout=400)
    assert done.stdout.strip() == "closed", done.stderr[-2000:]
