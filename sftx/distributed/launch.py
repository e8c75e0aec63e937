"""`sftx run --nproc N`: torchrun's engine starts the same command N times on this host, each a rank of one run.

What a user sees is that of one process: one line for an error, told by the rank that had it; signals that end the run
where nothing is lost by it; the exit code. The engine itself is `agent.py`; nothing here imports torch before a
process is started.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

from sftx.checkpoint import run_directory
from sftx.distributed import process_group
from sftx.distributed.process_group import LAUNCHER_REPORTS, UNEXPECTED, LostPeerError
from sftx.distributed.signals import ONE_EVENT_S, SIGNALS, Stop
from sftx.errors import ConfigError, OutputError, one_line

_LAST_WORDS_S: Final = 30.0
"""What the others have to end by themselves when a rank has ended with an error: to tell it, if it is theirs, too, or
to save. As long as torchrun gives them."""

_DYING_S: Final = 30.0
"""After SIGKILL. A process that waits in a driver for longer cannot be waited for."""

_TIED: Final = """\
import ctypes, os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG, which stays through exec
if os.getppid() != parent:
    sys.exit(137)  # it was gone before
os.execv(command[0], command)
"""
"""A child's first program, which becomes the command: the system kills it should its parent be killed. Not done between
fork and exec, where Python code can hang when other threads run, as they do with torch."""


@dataclass(frozen=True)
class Ended:
    """How a rank ended that did not end well."""

    rank: int
    code: int
    """Of exit, or minus the signal that killed it."""

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        if self.code == UNEXPECTED:
            return 1
        return self.code if self.code > 0 else 128 - self.code

    @property
    def stop(self) -> signal.Signals | None:
        """The signal by which it was asked to end."""
        return next((number for number in SIGNALS if self.code in (-number, 128 + number)), None)

    @property
    def is_killed(self) -> bool:
        """Whether nobody in it could do anything about it."""
        return self.code < 0 and self.stop is None

    @property
    def can_pass(self) -> bool:
        """Whether it may go well the next time. What a rank has told as an error will be one again."""
        return self.is_killed or self.code in (UNEXPECTED, LostPeerError.exit_code)

    @property
    def is_unexplained(self) -> bool:
        """Whether it ended as no command of ours does, which tells why; or only because another one had."""
        return self.stop is None and self.code not in (1, 2, UNEXPECTED)

    @property
    def weight(self) -> int:
        """Of several, the heaviest is the cause, and the first of those: a rank fails, too, when another is gone."""
        if self.is_killed or self.stop is not None:
            return 4 if self.is_killed else 1
        return {LostPeerError.exit_code: 0, UNEXPECTED: 2}.get(self.code, 3)

    def __str__(self) -> str:
        if not self.is_killed:
            how = f"exit code {self.code}" if self.is_unexplained else "an error"
            return f"rank {self.rank} ended with {how}"
        try:
            return f"rank {self.rank} was killed by {signal.Signals(-self.code).name}"
        except ValueError:  # a real-time signal has no name
            return f"rank {self.rank} was killed by signal {-self.code}"


class Processes:
    """The ranks of one start: a process each, in a session of its own, so that a signal of the terminal reaches them
    only by way of this process, and once."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        """Starts `command` in each of these environments, which add to this one. Raises OSError."""
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._is_asked = self._is_killed = False
        self._limit: float | None = None
        tied = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]
        try:
            for rank, environment in enumerate(environments):
                self._running[rank] = subprocess.Popen(
                    tied, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, start_new_session=True
                )
        except OSError:
            self.kill()
            raise
        # A thread each, as only so it is known which of them was the first.
        for rank, process in self._running.items():
            threading.Thread(target=self._wait_for, args=(rank, process), daemon=True).start()

    @property
    def pids(self) -> dict[int, int]:
        """By rank, of those that have not ended."""
        return {rank: process.pid for rank, process in list(self._running.items())}

    def send(self, signum: int) -> None:
        """To each of them and to what it has started."""
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signum)

    def stop(self, signum: int) -> None:
        """Asks them to end, once: a second time would end them at once."""
        if not self._is_asked:
            self._is_asked = True
            self.send(signum)

    def kill(self) -> None:
        """At once; how they end from now on says nothing."""
        self._is_killed = True
        self._limit = time.monotonic() + _DYING_S
        self.send(signal.SIGKILL)

    def wait(self) -> Ended | None:
        """Waits for all of them, and ends the others when one is lost; what it came from, None when all went well."""
        failures: list[Ended] = []
        while self._running:
            try:
                rank, code = self._ended.get(timeout=self._patience())
            except queue.Empty:
                if self._limit is None or time.monotonic() < self._limit:
                    continue
                if self._is_killed:
                    break
                self.kill()
                continue
            del self._running[rank]
            if code != 0 and not self._is_killed:
                failures.append(Ended(rank, code))
                self._end_others(failures)
        return max(failures, key=lambda ended: ended.weight, default=None)

    def _end_others(self, failures: Sequence[Ended]) -> None:
        ended = failures[-1]
        if ended.is_killed:
            self.kill()  # without it they can neither go on nor save
        elif ended.stop is None:
            self._limit = self._limit or time.monotonic() + _LAST_WORDS_S
        else:
            self.stop(ended.stop)  # this one alone may have got it; they save as long as it takes

    def _patience(self) -> float:
        """Seconds until something is to be done. A second, as `kill` may be called from a signal's handler."""
        return 1.0 if self._limit is None else min(1.0, max(0.0, self._limit - time.monotonic()))

    def _wait_for(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self._ended.put((rank, process.wait()))


class Launch:
    """A command that runs as the ranks of one run, started again where that may help."""

    def __init__(self, command: Sequence[str], max_restarts: int) -> None:
        self.command, self.max_restarts = tuple(command), max_restarts
        self.num_restarts = 0
        self.failure: Ended | None = None
        self._processes: Processes | None = None
        self._stopped_by: int | None = None
        self._stopped_at = 0.0
        self._killed_by: int | None = None

    def start(self, environments: Sequence[Mapping[str, str]]) -> dict[int, int]:
        """Starts all ranks; their process ids. Raises OSError; Stop when a signal came before."""
        if self._stopped_by is not None:
            raise Stop(self._stopped_by)
        self._processes = Processes(self.command, environments)
        if self._stopped_by is not None:  # it came while they were started
            self._processes.stop(self._stopped_by)
        return self._processes.pids

    def wait(self) -> bool:
        """Waits until all have ended; returns whether they are to be started again, which the user is told."""
        assert self._processes is not None, "started before"
        self.failure = self._processes.wait()
        self._processes = None
        if self.failure is None or self._killed_by is not None or not self.failure.can_pass:
            return False
        if self._stopped_by is not None or self.num_restarts == self.max_restarts:
            return False
        self.num_restarts += 1
        count = f"({self.num_restarts} of {self.max_restarts})"
        _tell(f"sftx: {self.failure}; starting again from the last checkpoint {count}")
        return True

    def kill(self) -> None:
        """What may still be running, when something here has gone wrong."""
        if self._processes is not None:
            self._processes.kill()
            self._processes.wait()
            self._processes = None

    def finish(self) -> int:
        """The exit code; tells what no rank could."""
        if self._killed_by is not None:
            _tell(f"sftx: {signal.Signals(self._killed_by).name} once more: stopped at once")
            return 128 + self._killed_by
        if self.failure is None:
            return 0  # with a signal, too, that came when all was done
        if self.failure.is_killed:
            again = f", after {self.num_restarts} restarts" if self.num_restarts else ""
            memory = "; the system does that when memory runs out" if self.failure.code == -signal.SIGKILL else ""
            _tell(f"sftx: error: {self.failure}{again}{memory}")
        elif self.failure.is_unexplained:
            _tell(f"sftx: error: {self.failure}")
        return self.failure.exit_code

    @contextlib.contextmanager
    def heeding(self) -> Iterator[None]:
        """Within it signals go to the ranks, which then save and end; a second one kills them."""
        handlers: dict[signal.Signals, Any] = dict.fromkeys(SIGNALS, self._on_stop)
        handlers[signal.SIGTSTP] = self._on_suspend
        # None that nohup or a shell has ignored: the ranks ignore it, too.
        heeded = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
        before = {number: signal.signal(number, handler) for number, handler in heeded.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_stop(self, signum: int, frame: FrameType | None) -> None:
        if self._stopped_by is None:
            self._stopped_by, self._stopped_at = signum, time.monotonic()
            if self._processes is not None:
                self._processes.stop(signum)
        elif time.monotonic() - self._stopped_at > ONE_EVENT_S:
            self._killed_by = signum
            if self._processes is not None:
                self._processes.kill()

    def _on_suspend(self, signum: int, frame: FrameType | None) -> None:
        if self._processes is not None:
            self._processes.send(signal.SIGSTOP)
        signal.raise_signal(signal.SIGSTOP)
        if self._processes is not None:  # it goes on here
            self._processes.send(signal.SIGCONT)


def launch(command: Sequence[str], *, nproc: int | None, max_restarts: int = 0, use_cpu: bool = False) -> int:
    """Runs `command` as `nproc` ranks, None for one a GPU; returns the exit code that one process would have.

    Raises ConfigError, before anything is started, when there are too few GPUs for them, or ranks of a run launch
    again; OSError when they cannot be started; Stop when a signal came before they were.
    """
    if process_group.is_launched():
        raise ConfigError("--nproc: torchrun has started this process already; give one or the other")
    from sftx import elastic  # and torch

    num = elastic.num_processes(nproc, use_cpu=use_cpu)
    launched = Launch(command, max_restarts)
    with launched.heeding():
        try:
            elastic.run(launched, num)
        finally:
            launched.kill()
    return launched.finish()


def environment(num_processes: int) -> dict[str, str]:
    """What every rank of a host has besides what torchrun sets: its share of the cores, unless the user has said; and
    that what ends a rank is told by this process."""
    if "OMP_NUM_THREADS" in os.environ:
        return {LAUNCHER_REPORTS: "1"}
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {LAUNCHER_REPORTS: "1", "OMP_NUM_THREADS": str(max(1, num_cores // num_processes))}


def sftx_command(arguments: Sequence[str]) -> list[str]:
    """The command `sftx` with these arguments, which finds the modules that this process finds."""
    is_here = os.getcwd() in sys.path or "" in sys.path  # -m looks there first, the script `sftx` does not
    return [sys.executable, *([] if is_here else ["-P"]), "-m", "sftx", *arguments]


def without_options(arguments: Sequence[str], *names: str) -> list[str]:
    """The arguments of a command line but for these options, which take a value each."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in names:
            next(rest, None)
        elif not argument.startswith(tuple(f"{name}=" for name in names)):
            kept.append(argument)
    return kept


@contextlib.contextmanager
def output_dir(wanted: str | None, name: str, *, resume: bool) -> Iterator[str]:
    """The directory of the run, one for all of its starts: made where its number is chosen here, so that no other run
    takes it, and removed when nothing came to lie in it. Raises OutputError."""
    while True:
        directory = run_directory.resume(wanted, name) if resume else run_directory.new(wanted, name)
        if wanted is not None or resume:
            yield str(directory.path) if wanted is None else wanted
            return
        try:
            directory.path.mkdir(parents=True)
        except FileExistsError:
            continue  # another run took it since
        except OSError as error:
            raise OutputError(f"output_dir {directory.path}: cannot be written: {one_line(error)}") from error
        try:
            yield str(directory.path)
        finally:
            with contextlib.suppress(OSError):
                os.removedirs(directory.path)  # only what is empty
        return


def _tell(line: str) -> None:
    """On stderr; of a terminal below the line of a bar that was killed, and with the cursor which that has hidden."""
    with contextlib.suppress(OSError, ValueError):  # of a terminal that is gone
        if sys.stderr is not None:
            sys.stderr.write(f"\x1b[?25h\n{line}\n" if sys.stderr.isatty() else f"{line}\n")
            sys.stderr.flush()
