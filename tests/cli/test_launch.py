"""`--nproc N`: how ranks start, stop, fail and restart, with a small script in the place of a run."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from launching import Launcher, is_running, state
from sftx.checkpoint.run_directory import reserve
from sftx.cli import main
from sftx.cli.run import without_options
from sftx.distributed.process_group import UNEXPECTED, LostPeerError
from sftx.distributed.supervisor import RankFailure
from sftx.errors import ConfigError, OutputError


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("launched"))


STOPPING = """
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: (got.append(number), say("got", number)))
say("pid", os.getpid())
while not got:
    time.sleep(0.01)
time.sleep(SAVING_S)
say("saved")
sys.exit(128 + got[0])
"""
"""A script that handles signals as a run does: it takes a while to save, and ends by itself."""


def stopping(saving_s: float) -> str:
    return STOPPING.replace("SAVING_S", str(saving_s))


# --- what a rank is given ------------------------------------------------------------------------


def test_ranks_know_who_they_are_and_share_the_cores(launched: Launcher) -> None:
    done = launched(
        """
names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "OMP_NUM_THREADS"
say(*(os.environ[name] for name in names), os.environ["MASTER_PORT"].isdecimal())
say("stdin", sys.stdin.read() == "", "its own session", os.getsid(0) == os.getpid())
""",
        nproc=3,
    )
    assert done.wait() == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    lines = [f"rank {rank} start 0: {rank} {rank} 3 3 0 localhost {threads} True" for rank in range(3)]
    lines += [f"rank {rank} start 0: stdin True its own session True" for rank in range(3)]
    assert sorted(done.out) == sorted(lines)
    assert done.err == [], "no warning and no log of torch's"


def test_the_users_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.distributed import launch

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in launch.rank_environment(2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(9), raising=False)
    assert [launch.rank_environment(n)["OMP_NUM_THREADS"] for n in (1, 2, 9, 20)] == ["9", "4", "1", "1"]


def test_one_rank_is_a_launch_too(launched: Launcher) -> None:
    done = launched("say(os.environ['WORLD_SIZE'])", nproc=1)
    assert (done.wait(), done.out, done.err) == (0, ["rank 0 start 0: 1"], [])


# --- how they end --------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "becomes", "num_starts"), [(1, 1, 1), (2, 2, 1), (5, 5, 1), (UNEXPECTED, 1, 3)])
def test_an_error_is_told_by_its_rank_and_only_the_unexpected_is_tried_again(
    launched: Launcher, code: int, becomes: int, num_starts: int
) -> None:
    script = f"""
say("began")
if rank == 1:
    os.write(2, b"sftx: error: mine\\n")
    os._exit({code})
time.sleep(60)
"""
    done = launched(script, max_restarts=2, _GRACE_S=0.2)
    assert done.wait() == becomes
    assert sum("rank 1 start" in line for line in done.out) == num_starts
    again = [f"sftx: rank 1 ended with an error; starting again from the last checkpoint ({n} of 2)" for n in (1, 2)]
    told = [line for line in done.err if line != "sftx: error: mine"]
    unexplained = ["sftx: error: rank 1 ended with exit code 5"] if code == 5 else []
    assert told == again[: num_starts - 1] + unexplained
    assert done.err.count("sftx: error: mine") == num_starts


def test_the_others_have_time_for_what_they_have_to_say(launched: Launcher) -> None:
    done = launched("if rank == 1:\n    sys.exit(1)\ntime.sleep(1.5)\nsay('saved')\nsys.exit(1)")
    assert (done.wait(), done.out) == (1, ["rank 0 start 0: saved"])


def test_a_killed_rank_ends_the_others_at_once(launched: Launcher) -> None:
    began = time.monotonic()
    done = launched("say('pid', os.getpid())\nif rank == 1:\n    os.kill(os.getpid(), 9)\ntime.sleep(60)")
    assert done.wait() == 137
    assert done.err == ["sftx: error: rank 1 was killed by SIGKILL; the system does that when memory runs out"]
    assert time.monotonic() - began < 30
    assert not any(map(is_running, done.pids()))


def test_a_killed_rank_starts_all_of_them_again(launched: Launcher) -> None:
    done = launched(
        "say('store', os.environ['MASTER_PORT'])\nif rank == start < 2:\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "if start < 2:\n    time.sleep(60)\nsay('done')",
        max_restarts=3,
    )
    assert done.wait() == 0
    assert done.err == [
        "sftx: rank 0 was killed by SIGSEGV; starting again from the last checkpoint (1 of 3)",
        "sftx: rank 1 was killed by SIGSEGV; starting again from the last checkpoint (2 of 3)",
    ]
    ports = {line.rpartition(" ")[2] for line in done.out if "store" in line}
    assert len(ports) == 3, "of one store the next start would read what the last one left"
    assert sorted(line for line in done.out if "done" in line) == [f"rank {rank} start 2: done" for rank in (0, 1)]


def test_restarts_come_to_an_end(launched: Launcher) -> None:
    done = launched("os.kill(os.getpid(), signal.SIGRTMIN + 1) if rank else time.sleep(60)", max_restarts=1)
    number = signal.SIGRTMIN + 1
    assert done.wait() == 128 + number
    assert done.err == [
        f"sftx: rank 1 was killed by signal {number}; starting again from the last checkpoint (1 of 1)",
        f"sftx: error: rank 1 was killed by signal {number}, after 1 restarts",
    ]


def test_the_cause_is_not_who_ended_first() -> None:
    stopped, lost, unexpected = RankFailure(0, 143), RankFailure(1, LostPeerError.exit_code), RankFailure(2, UNEXPECTED)
    error, killed = RankFailure(3, 1), RankFailure(4, -9)
    ordered = sorted([killed, stopped, error, unexpected, lost], key=lambda failure: failure.severity)
    assert ordered == [lost, stopped, unexpected, error, killed]
    assert [failure.exit_code for failure in ordered] == [LostPeerError.exit_code, 143, 1, 1, 137]
    assert [failure.is_retryable for failure in ordered] == [True, False, True, False, True]
    assert (RankFailure(0, -15).exit_code, RankFailure(0, -15).is_retryable) == (143, False)


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGINT, os.kill),
        (signal.SIGTERM, os.kill),
        (signal.SIGHUP, os.kill),
        (signal.SIGUSR1, os.kill),
        (signal.SIGINT, os.killpg),  # Ctrl-C in a terminal
    ],
)
def test_a_signal_reaches_every_rank_once_and_all_are_waited_for(
    launched: Launcher, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    done = launched(stopping(0.4), max_restarts=3)
    done.said("pid", 2)
    send(done.pid, number)
    assert done.wait() == 128 + number
    for rank in (0, 1):
        mine = [line.partition(": ")[2] for line in done.out if line.startswith(f"rank {rank} ")]
        assert mine[1:] == [f"got {int(number)}", "saved"]
    assert done.err == []


def test_a_second_signal_within_a_second_is_the_same_event(launched: Launcher) -> None:
    done = launched(stopping(0.5))
    done.said("pid", 2)
    os.kill(done.pid, signal.SIGTERM)
    done.said("got", 2)
    os.kill(done.pid, signal.SIGTERM)
    assert done.wait() == 143
    assert (sum("got" in line for line in done.out), sum("saved" in line for line in done.out)) == (2, 2)


def test_a_later_signal_kills(launched: Launcher) -> None:
    done = launched(stopping(60), ONE_EVENT_S=0.1)
    done.said("pid", 2)
    os.kill(done.pid, signal.SIGINT)
    done.said("got", 2)
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(done.pid, signal.SIGTERM)
    assert done.wait() == 143
    assert done.err == ["sftx: SIGTERM once more: stopped at once"]
    assert time.monotonic() - began < 5
    assert not any(map(is_running, done.pids()))
    assert not any("saved" in line for line in done.out)


def test_a_signal_to_one_rank_ends_all_of_them(launched: Launcher) -> None:
    done = launched(stopping(0.1), max_restarts=3)
    done.said("pid", 2)
    os.kill(done.pids()[0], signal.SIGUSR1)
    assert done.wait() == 138
    assert sum("saved" in line for line in done.out) == 2
    assert done.err == []


def test_a_run_that_ends_well_in_spite_of_a_signal_has_ended_well(launched: Launcher) -> None:
    done = launched(stopping(0.1).replace("128 + got[0]", "0"))
    done.said("pid", 2)
    os.kill(done.pid, signal.SIGTERM)
    assert done.wait() == 0


def test_no_rank_outlives_what_started_it(launched: Launcher) -> None:
    done = launched(
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "say('pid', os.getpid())\ntime.sleep(60)"
    )
    done.said("pid", 2)
    os.kill(done.pid, signal.SIGKILL)
    assert done.wait() == -signal.SIGKILL
    pids = done.pids()
    done.until(lambda: not any(map(is_running, pids)), "the end of the ranks")


def test_what_is_suspended_is_suspended_as_a_whole(launched: Launcher) -> None:
    done = launched(stopping(0.1))
    done.said("pid", 2)
    everyone = [done.pid, *done.pids()]
    os.kill(done.pid, signal.SIGTSTP)
    done.until(lambda: all(state(pid) == "T" for pid in everyone), "the stop of all")
    os.kill(done.pid, signal.SIGCONT)
    done.until(lambda: not any(state(pid) == "T" for pid in everyone), "the going on of all")
    os.kill(done.pid, signal.SIGTERM)
    assert done.wait() == 143


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], dict]]:
    """Records what `sftx run` would launch, in an empty directory."""
    from sftx.distributed import launch

    found: list[tuple[list[str], dict]] = []

    def instead(command: list[str], **options: object) -> int:
        found.append((command, options))
        return 3

    monkeypatch.setattr(launch, "launch", instead)
    monkeypatch.chdir(tmp_path)
    return found


def sftx_run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["run", *arguments])
    return result.exit_code, result.output


def test_every_rank_gets_the_command_and_one_directory(started: list[tuple[list[str], dict]]) -> None:
    given = ("--plugin", "chatml", "--nproc", "2", "--set", "train.max_steps=3", "--max-restarts=4", "--use-cpu")
    assert sftx_run(*given)[0] == 3, "the exit code is that of the ranks"
    (command, options), *others = started
    assert not others
    assert command[0] == sys.executable
    at = command.index("-m")
    words = "-m sftx run --output-dir runs/demo-1 --plugin chatml --set train.max_steps=3 --use-cpu"
    assert command[at:] == words.split()
    assert options == {"nproc": 2, "max_restarts": 4, "use_cpu": True}
    assert not Path("runs").exists(), "nothing came to lie in it"


def test_every_launch_has_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        reserve(None, "a", resume_run=False) as one,
        reserve(None, "a", resume_run=False) as other,
    ):
        assert (one, other) == ("runs/a-1", "runs/a-2")
        Path(other, "run.yaml").touch()
    assert not Path(one).exists()
    assert Path(other).exists()
    with (
        reserve(None, "a", resume_run=True) as last,
        reserve("b", "a", resume_run=False) as named,
    ):
        assert (last, named, Path("b").exists()) == ("runs/a-2", "b", False)
    with pytest.raises(OutputError, match="holds a run already"), reserve(other, "a", resume_run=False):
        pass


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(path: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="output_dir runs/a-1: cannot be written"):
        reserve(None, "a", resume_run=False).__enter__()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--nproc", "0"], 2, "'0' is neither a number from 1 on nor gpu"),
        (["--nproc", "-1"], 2, "'-1' is neither"),
        (["--nproc", "2.5"], 2, "'2.5' is neither"),
        (["--nproc", "2", "--max-restarts", "-1"], 2, "'--max-restarts'"),
        (["--max-restarts", "1"], 2, "--max-restarts goes with --nproc"),
        (["--nproc", "2", "--max-steps", "x"], 1, "option 'train.max_steps': got \"x\""),
        (["--nproc", "2", "--plugin", "lora", "--set", "lora.r=no"], 1, "option 'r': got \"no\""),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_started(
    started: list[tuple[list[str], dict]], arguments: list[str], code: int, told: str
) -> None:
    exit_code, printed = sftx_run(*arguments)
    assert (exit_code, told in printed, started) == (code, True, []), printed
    assert not any(Path().iterdir())


def test_a_launch_within_a_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.distributed import launch

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match="torchrun has started this process already"):
        launch.launch(["true"], nproc=2)


def test_there_are_as_many_ranks_as_gpus_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.distributed import launch

    for num_gpus, wanted, becomes in ((0, 3, 3), (4, None, 4), (4, 4, 4), (4, 1, 1)):
        monkeypatch.setattr(launch.torch.cuda, "device_count", lambda n=num_gpus: n)
        assert launch.num_processes(wanted, use_cpu=False) == becomes
    assert launch.num_processes(8, use_cpu=True) == 8
    with pytest.raises(ConfigError, match="--nproc 5: a GPU has one process, and torch sees 4"):
        launch.num_processes(5, use_cpu=False)
    with pytest.raises(ConfigError, match="--use-cpu leaves none"):
        launch.num_processes(None, use_cpu=True)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="torch sees none on this host"):
        launch.num_processes(None, use_cpu=False)


def test_options_of_the_launch_are_taken_out_of_a_command_line() -> None:
    given = ["a.yaml", "--nproc=2", "--nprocs", "--nproc", "3", "--set", "x.y=--nproc", "--nproc"]
    assert without_options(given, "--nproc") == ["a.yaml", "--nprocs", "--set", "x.y=--nproc"]
    assert without_options(["--max_restarts", "1", "--max_restarts=1", "b"], "--max-restarts") == ["b"]
