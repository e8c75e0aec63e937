"""The supervisor of the ranks on one host: it starts them, forwards signals, and starts them again after a crash.

The user sees what a single process would show: one line for an error, printed by the rank that raised it; signals that
stop the run where no work is lost; the exit code. Imports no torch; `launch` connects it to torchrun's agent.
"""

from __future__ import annotations

import contextlib
import enum
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

from sftx.distributed.process_group import UNEXPECTED, LostPeerError
from sftx.distributed.signals import ONE_EVENT_S, SIGNALS, Stop

_GRACE_S: Final = 30.0
"""Time for the other ranks to end by themselves, and to save, after one ended with an error; torchrun's default."""

_KILL_TIMEOUT_S: Final = 30.0
"""Time to wait for a process after SIGKILL. One that is blocked in a driver for longer is left alone."""

_DIE_WITH_PARENT: Final = """\
import ctypes, os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG, which stays through exec
if os.getppid() != parent:
    sys.exit(137)  # the parent was killed before
os.execv(command[0], command)
"""
"""A program that each child starts with, so that the kernel kills it when this process is killed.

subprocess's preexec_fn could do the same, but Python code between fork and exec can hang when other threads run, as
they do with torch.
"""


class Severity(enum.IntEnum):
    """How likely a failed rank is the cause when several failed, and not a consequence of another one's failure."""

    LOST_PEER = 0
    STOPPED = 1
    UNEXPECTED = 2
    ERROR = 3
    KILLED = 4


@dataclass(frozen=True)
class RankFailure:
    """How a rank ended that did not succeed."""

    rank: int
    code: int
    """Its exit code, or minus the number of the signal that killed it, as subprocess reports it."""

    @property
    def exit_code(self) -> int:
        """The exit code of the launch, by a shell's convention."""
        if self.code == UNEXPECTED:
            return 1
        return self.code if self.code > 0 else 128 - self.code

    @property
    def stop_signal(self) -> signal.Signals | None:
        """The signal that stopped the rank, when it is one of those that ask a run to stop."""
        return next((number for number in SIGNALS if self.code in (-number, 128 + number)), None)

    @property
    def is_killed(self) -> bool:
        """Return whether any other signal ended it, which the rank itself could not handle."""
        return self.code < 0 and self.stop_signal is None

    @property
    def is_retryable(self) -> bool:
        """Return whether a restart may help. An error that the rank reported would occur again."""
        return self.is_killed or self.code in (UNEXPECTED, LostPeerError.exit_code)

    @property
    def is_unexplained(self) -> bool:
        """Return whether the exit code is none that an sftx command ends with after it has printed an error."""
        return self.stop_signal is None and self.code not in (1, 2, UNEXPECTED)

    @property
    def severity(self) -> Severity:
        """With several failures, the first of the most severe ones is reported as the cause."""
        if self.is_killed:
            return Severity.KILLED
        if self.stop_signal is not None:
            return Severity.STOPPED
        by_code = {LostPeerError.exit_code: Severity.LOST_PEER, UNEXPECTED: Severity.UNEXPECTED}
        return by_code.get(self.code, Severity.ERROR)

    def __str__(self) -> str:
        if not self.is_killed:
            how = f"exit code {self.code}" if self.is_unexplained else "an error"
            return f"rank {self.rank} ended with {how}"
        try:
            return f"rank {self.rank} was killed by {signal.Signals(-self.code).name}"
        except ValueError:  # a real-time signal has no name
            return f"rank {self.rank} was killed by signal {-self.code}"


class WorkerProcesses:
    """One process per rank, each in a session of its own.

    A signal of the terminal thus reaches them only through this process, and once.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        """Start `command` once per environment, with its variables added to this process's own. Raises OSError."""
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._stop_sent = self._is_killed = False
        self._deadline: float | None = None
        guarded = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        try:
            for rank, environment in enumerate(environments):
                self._running[rank] = subprocess.Popen(
                    guarded, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, start_new_session=True
                )
        except OSError:
            self.kill()
            raise

        def wait_for(rank: int, process: subprocess.Popen[bytes]) -> None:
            self._ended.put((rank, process.wait()))

        # One thread per process: only so is the order known in which they ended.
        for rank, process in self._running.items():
            threading.Thread(target=wait_for, args=(rank, process), daemon=True).start()

    @property
    def pids(self) -> dict[int, int]:
        """The process ids of the ranks that still run."""
        return {rank: process.pid for rank, process in list(self._running.items())}

    def send(self, signum: int) -> None:
        """Send a signal to the process group of each rank."""
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signum)

    def stop(self, signum: int) -> None:
        """Send a signal that asks the ranks to stop, unless one was sent: a second one would end them at once."""
        if not self._stop_sent:
            self._stop_sent = True
            self.send(signum)

    def kill(self) -> None:
        """Send SIGKILL to all ranks; how they end from now on is not reported as a failure."""
        self._is_killed = True
        self._deadline = time.monotonic() + _KILL_TIMEOUT_S
        self.send(signal.SIGKILL)

    def wait(self) -> RankFailure | None:
        """Wait for all ranks, and end the others when one fails. Return the cause, None when all succeeded."""
        failures: list[RankFailure] = []
        while self._running:
            try:
                # At most a second, as a signal handler may call `kill` and thereby set a deadline.
                left = 1.0 if self._deadline is None else self._deadline - time.monotonic()
                rank, code = self._ended.get(timeout=min(1.0, max(0.0, left)))
            except queue.Empty:
                if self._deadline is None or time.monotonic() < self._deadline:
                    continue
                if self._is_killed:
                    break
                self.kill()
                continue
            del self._running[rank]
            if code != 0 and not self._is_killed:
                failures.append(RankFailure(rank, code))
                self._end_others(failures[-1])
        return max(failures, key=lambda failure: failure.severity, default=None)

    def _end_others(self, failure: RankFailure) -> None:
        if failure.is_killed:
            self.kill()  # the others wait in a collective for the killed rank, and can neither go on nor save
        elif failure.stop_signal is None:
            self._deadline = self._deadline or time.monotonic() + _GRACE_S
        else:
            self.stop(failure.stop_signal)  # it may be the only rank that got the signal; saving has no time limit


class Supervisor:
    """Runs a command as the ranks of one run, up to `max_restarts` times again after a failure that may not recur."""

    def __init__(self, command: Sequence[str], max_restarts: int) -> None:
        self.command, self.max_restarts = tuple(command), max_restarts
        self.num_restarts = 0
        self.failure: RankFailure | None = None
        self._workers: WorkerProcesses | None = None
        self._stopped_by: int | None = None
        self._stopped_at = 0.0
        self._killed_by: int | None = None

    def start(self, environments: Sequence[Mapping[str, str]]) -> dict[int, int]:
        """Start one rank per environment; return their process ids. Raises OSError; Stop after a signal."""
        if self._stopped_by is not None:
            raise Stop(self._stopped_by)
        self._workers = WorkerProcesses(self.command, environments)
        if self._stopped_by is not None:  # the signal arrived while they were started
            self._workers.stop(self._stopped_by)
        return self._workers.pids

    def wait(self) -> bool:
        """Wait until all ranks have ended; return whether to start them again, which is printed."""
        assert self._workers is not None, "started before"
        self.failure = self._workers.wait()
        self._workers = None
        if self.failure is None or self._killed_by is not None or not self.failure.is_retryable:
            return False
        if self._stopped_by is not None or self.num_restarts == self.max_restarts:
            return False
        self.num_restarts += 1
        count = f"({self.num_restarts} of {self.max_restarts})"
        _print(f"sftx: {self.failure}; starting again from the last checkpoint {count}")
        return True

    def kill(self) -> None:
        """Kill the ranks that still run, after an error in this process."""
        if self._workers is not None:
            self._workers.kill()
            self._workers.wait()
            self._workers = None

    def finish(self) -> int:
        """Return the exit code, and print why a rank failed when it could not print that itself."""
        if self._killed_by is not None:
            _print(f"sftx: {signal.Signals(self._killed_by).name} once more: stopped at once")
            return 128 + self._killed_by
        if self.failure is None:
            return 0  # also when a signal arrived after the last step
        if self.failure.is_killed:
            again = f", after {self.num_restarts} restarts" if self.num_restarts else ""
            memory = "; the system does that when memory runs out" if self.failure.code == -signal.SIGKILL else ""
            _print(f"sftx: error: {self.failure}{again}{memory}")
        elif self.failure.is_unexplained:
            _print(f"sftx: error: {self.failure}")
        return self.failure.exit_code

    @contextlib.contextmanager
    def install_handlers(self) -> Iterator[None]:
        """Forward signals to the ranks, which save and end, within this context; a second signal kills them."""
        handlers: dict[signal.Signals, Any] = dict.fromkeys(SIGNALS, self._on_stop)
        handlers[signal.SIGTSTP] = self._on_suspend
        previous = {
            number: signal.signal(number, handler)
            for number, handler in handlers.items()
            if signal.getsignal(number) != signal.SIG_IGN  # the ranks inherit what nohup or a shell ignores
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_stop(self, signum: int, frame: FrameType | None) -> None:
        if self._stopped_by is None:
            self._stopped_by, self._stopped_at = signum, time.monotonic()
            if self._workers is not None:
                self._workers.stop(signum)
        elif time.monotonic() - self._stopped_at > ONE_EVENT_S:
            self._killed_by = signum
            if self._workers is not None:
                self._workers.kill()

    def _on_suspend(self, signum: int, frame: FrameType | None) -> None:
        """Suspend the ranks and this process on SIGTSTP (Ctrl-Z), and continue the ranks when it continues."""
        if self._workers is not None:
            self._workers.send(signal.SIGSTOP)
        signal.raise_signal(signal.SIGSTOP)
        if self._workers is not None:
            self._workers.send(signal.SIGCONT)


def _print(line: str) -> None:
    """Print to stderr. On a terminal, below the progress bar of a killed rank, and with the cursor that it had hidden.

    The terminal may be closed.
    """
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            sys.stderr.write(f"\x1b[?25h\n{line}\n" if sys.stderr.isatty() else f"{line}\n")
            sys.stderr.flush()
