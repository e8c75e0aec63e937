"""SIGINT, SIGTERM, SIGHUP and SIGUSR1 stop a run where no work is lost; a second one ends the process at once."""

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

SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
"""The signals that stop a run; Windows has the first two. Slurm sends SIGUSR1 to warn before the time limit."""

ONE_EVENT_S: Final = 1.0
"""Signals within this time are one request: a process may get one itself, and another by its group or a wrapper."""


class Stop(KeyboardInterrupt):
    """A signal asks the process to end. The command line prints the message and exits with `exit_code`."""

    def __init__(self, signum: int, message: str = "") -> None:
        self.signal = signal.Signals(signum)
        super().__init__(message or f"stopped by {self.signal.name}")

    @property
    def exit_code(self) -> int:
        """The exit code by a shell's convention: 128 plus the signal's number."""
        return 128 + self.signal


def install_handlers() -> None:
    """Make each of the signals raise Stop, as SIGINT raises KeyboardInterrupt, so that `finally` blocks run."""

    def raise_stop(signum: int, frame: FrameType | None) -> None:
        raise Stop(signum)

    for number in _handled_signals():
        signal.signal(number, raise_stop)


def ignore_signals() -> None:
    """Ignore the signals from now on, in a process that is about to end and whose exit code is decided."""
    for number in _handled_signals():
        signal.signal(number, lambda signum, frame: None)  # child processes would inherit SIG_IGN


class DeferredSignals:
    """A context in which the first signal is only recorded as `pending`; a later one ends the process at once.

    The training loop looks at `pending` where a run can stop without losing work.
    """

    def __init__(self) -> None:
        self._pending: int | None = None
        self._pending_since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> DeferredSignals:
        self._previous = {number: signal.signal(number, self._record) for number in _handled_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def pending(self) -> int | None:
        """The number of the signal that arrived, None before one did."""
        return self._pending

    def _record(self, signum: int, frame: FrameType | None) -> None:
        if self._pending is not None:
            if time.monotonic() - self._pending_since > ONE_EVENT_S:
                os._exit(Stop(signum).exit_code)
            return
        self._pending, self._pending_since = signum, time.monotonic()
        if not is_rank0():
            return
        line = f"\nsftx: {signal.Signals(signum).name}: stopping where no work is lost; a second signal stops at once\n"
        # os.write and not print, which may be interrupted in the middle of a line; the terminal may be closed.
        with contextlib.suppress(OSError, ValueError):
            if sys.__stderr__ is not None:
                os.write(sys.__stderr__.fileno(), line.encode())


def _handled_signals() -> list[signal.Signals]:
    """Return the signals to handle: none that nohup or a shell ignores, and none outside of the main thread.

    Python runs signal handlers in the main thread only, and refuses to set them elsewhere.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
