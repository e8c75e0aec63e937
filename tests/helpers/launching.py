"""Scripts launched as ranks, by a process that is forked from one which has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

PATIENCE_S = 60.0
"""A launch that takes longer than this many seconds is taken to hang."""


def _work(directory: Path, environment: Mapping[str, str], nproc: int, max_restarts: int, settings: Mapping) -> None:
    """Launch `directory/rank.py` as the command line would. Called in the launching process."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as on a terminal, whatever started the tests ignores
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(directory)
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update(environment)
    for name, number in (("stdout.txt", 1), ("stderr.txt", 2)):
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))

    import click

    import sftx.cli
    from sftx.distributed import launch, supervisor

    for name, value in settings.items():
        setattr(supervisor, name, value)

    @click.command()
    def rank() -> None:
        # Neither site nor the environment's own settings: a rank is there in milliseconds.
        command = [sys.executable, "-I", "-S", "rank.py"]
        sys.exit(launch.launch(command, nproc=nproc, max_restarts=max_restarts, use_cpu=True))

    sftx.cli.main.get_command = lambda ctx, name: rank
    sftx.cli.main.main(args=["rank"], prog_name="sftx")


class Launched:
    """A launch in progress in `directory`."""

    def __init__(self, directory: Path, child: BaseProcess) -> None:
        self.directory, self._child = directory, child
        assert child.pid is not None
        self.pid: int = child.pid

    def wait(self) -> int:
        """Return the exit code, or minus the signal that ended the launcher. Raises TimeoutError."""
        self._child.join(PATIENCE_S)
        if self._child.exitcode is None:
            self._child.kill()
            raise TimeoutError(f"still running after {PATIENCE_S:g} s; printed so far: {self.out}{self.err}")
        return self._child.exitcode

    @property
    def out(self) -> list[str]:
        return self._lines("stdout.txt")

    @property
    def err(self) -> list[str]:
        return self._lines("stderr.txt")

    def _lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def until(self, true: Callable[[], bool], what: str) -> None:
        """Wait until `true()` holds. Raises TimeoutError."""
        limit = time.monotonic() + PATIENCE_S
        while not true():
            if time.monotonic() > limit:
                raise TimeoutError(f"{what}: not within {PATIENCE_S:g} s; printed so far: {self.out}{self.err}")
            time.sleep(0.005)

    def said(self, word: str, times: int) -> None:
        """Wait until the ranks have printed `word` that many times on stdout."""
        self.until(lambda: sum(word in line for line in self.out) >= times, f"{word!r} {times} times")

    def pids(self) -> list[int]:
        """Return the process ids that the ranks printed as `pid N`."""
        return [int(line.rpartition("pid ")[2]) for line in self.out if "pid " in line]


class Launcher:
    """Launches scripts, each in a directory of its own."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torch.distributed.elastic.agent.server.api", "sftx.distributed.launch", "sftx.cli"]
        )
        self._num = 0

    def __call__(
        self, script: str, *, nproc: int = 2, max_restarts: int = 0, environment: Mapping = {}, **settings: object
    ) -> Launched:
        """Launch a script. `settings`: other values for constants of `sftx.distributed.supervisor`."""
        self._num += 1
        directory = self._root / str(self._num)
        directory.mkdir()
        (directory / "rank.py").write_text(_BEGINNING + script, encoding="utf-8")
        child = self._context.Process(target=_work, args=(directory, environment, nproc, max_restarts, settings))
        child.start()
        return Launched(directory, child)


_BEGINNING = """\
import os, signal, sys, time
rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def say(*words):
    os.write(1, (" ".join(map(str, (f"rank {rank} start {start}:", *words))) + "\\n").encode())
"""


def is_running(pid: int) -> bool:
    """Return whether the process exists and has not ended (a zombie has)."""
    return state(pid) not in ("", "Z", "X")


def state(pid: int) -> str:
    """Return the letter of the process's state in /proc, an empty string when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
