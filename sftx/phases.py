"""Phases of a command, such as loading the model: what it is at, how far it is, and how long each phase took.

    with phase("encoding", "training rows", unit="rows") as progress:
        for row in rows:
            ...
            progress.update()

Whoever wants to know listens (`listening`); where nobody does, a phase is an object that counts. Any code may begin a
phase: it knows neither terminals nor ranks. Imports nothing heavy.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TypeVar

T = TypeVar("T")


class Phase:
    """One phase in progress. A display reads it whenever it draws, so that `update` only counts."""

    def __init__(self, name: str, what: str, total: int | None, unit: str, done: int) -> None:
        self.name, self.what, self.total, self.unit = name, what, total, unit
        self.done = self._first = done
        self.note = ""
        self._started = time.monotonic()

    @property
    def title(self) -> str:
        return f"{self.name} {self.what}".rstrip()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Units a second; 0 before the first one is done."""
        return (self.done - self._first) / max(self.seconds, 1e-9)

    def update(self, advance: int = 1, *, note: str = "") -> None:
        """Count what is done since the last call; `note` is shown beside the number."""
        self.done += advance
        self.note = note

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count each."""
        for item in items:
            yield item
            self.update()


class Listener(Protocol):
    """It is told when a phase begins and ends; phases may lie within one another."""

    def begin(self, phase: Phase) -> None: ...

    def end(self, phase: Phase) -> None: ...


_listeners: Final[list[Listener]] = []


@contextmanager
def phase(name: str, what: str = "", *, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[Phase]:
    """Tell the listeners that a phase begins, and at the end of the block that it is over.

    `name` is one of few words under which times are added up (`loading`), `what` completes it for a reader (`the
    model`). `total` is in `unit`s, of which `done` are done already.
    """
    current, listeners = Phase(name, what, total, unit, done), tuple(_listeners)
    try:
        for listener in listeners:
            listener.begin(current)
        yield current
    finally:
        for listener in reversed(listeners):
            listener.end(current)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `listener` hear of the phases that begin within the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class PhaseTimes:
    """A listener that adds up the seconds of each name; a phase's time excludes that of the phases within it."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[Phase] = []
        self._since = time.monotonic()

    def begin(self, phase: Phase) -> None:
        self._charge()
        self._running.append(phase)

    def end(self, phase: Phase) -> None:
        self._charge()
        if phase in self._running:
            self._running.remove(phase)

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far by name; `other` is the time outside of every phase."""
        self._charge()
        return dict(self._seconds)

    def _charge(self) -> None:
        now = time.monotonic()
        self._seconds[self._running[-1].name if self._running else "other"] += now - self._since
        self._since = now
