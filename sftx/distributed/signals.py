"""SIGINT, SIGTERM, SIGHUP and SIGUSR1 end a run where nothing is lost by it; a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Final

from sftx.distributed.process_group import is_rank0

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Slurm sends SIGUSR1 where it is asked to warn; it ends a process as the others do."""

ONE_EVENT_S: Final = 1.0
"""A signal to a process and to its group, or by way of a wrapper, comes twice within this time."""


class Stop(KeyboardInterrupt):
    """A signal asks the process to end. The command line prints the message and exits with `exit_code`."""

    def __init__(self, signum: int, message: str = "") -> None:
        self.signal = signal.Signals(signum)
        super().__init__(message or f"stopped by {self.signal.name}")

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 and the signal's number."""
        return 128 + self.signal


def raise_stop() -> None:
    """From now on each of these signals is an exception, as SIGINT is, so that what was begun is tidied up."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stop(signum)

    for number in _heeded():
        signal.signal(number, stop)


def ignore() -> None:
    """From now on: for a process that is ending already, whose exit code is decided."""
    for number in _heeded():
        signal.signal(number, lambda signum, frame: None)  # SIG_IGN would hold for what is started from here, too


class DeferredSignals:
    """Within it the first signal is only noted, for `check` to raise at a place where a run can end."""

    def __init__(self) -> None:
        self._pending: int | None = None
        self._pending_since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> DeferredSignals:
        self._before = {number: signal.signal(number, self._note) for number in _heeded()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def pending(self) -> int | None:
        """The signal that came."""
        return self._pending

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._pending is not None:
            if time.monotonic() - self._pending_since > ONE_EVENT_S:
                os._exit(Stop(signum).exit_code)
            return
        self._pending, self._pending_since = signum, time.monotonic()
        if not is_rank0():
            return  # the main process says it
        line = f"\nsftx: {signal.Signals(signum).name}: stopping where nothing is lost; once more stops at once\n"
        # Not by print, which may be in the middle of another line's work; a terminal that is gone takes nothing.
        with contextlib.suppress(OSError, ValueError):
            if sys.__stderr__ is not None:
                os.write(sys.__stderr__.fileno(), line.encode())


def _heeded() -> list[signal.Signals]:
    """None outside of the main thread, where whoever calls sees to them; none that nohup or a shell has ignored."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
