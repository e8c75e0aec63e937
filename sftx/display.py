"""Shows the phases of a command: on a terminal as one line that is drawn in place, elsewhere as plain lines.

The line is rich's live display on rich's own console (`rich.get_console`). Whoever prints to that console, or to
sys.stdout and sys.stderr, prints above the line.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from sftx.errors import printable
from sftx.phases import Phase, listening

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_QUIET_S: Final = 2.0
"""Where lines cannot be redrawn, a phase is named when it has taken this long."""
_LONG_S: Final = 5.0
"""A phase that took longer is also named at its end."""
_DRAWN_PER_SECOND: Final = 5
_BAR_CELLS: Final = 20
_NARROW_CELLS: Final = 60
"""A narrower terminal gets no bar."""


@contextlib.contextmanager
def shown_phases() -> Iterator[None]:
    """Show the phases that begin within the block."""
    with listening(_Display()):
        yield


class _Display:
    """Chooses at the beginning of each outermost phase how it is shown: by then streams may have been redirected."""

    def __init__(self) -> None:
        self._shown: list[Phase] = []
        self._live: Live | None = None
        self._timers: dict[int, threading.Timer] = {}

    def begin(self, phase: Phase) -> None:
        self._shown.append(phase)
        if len(self._shown) == 1:
            self._live = self._start()
        if self._live is None:
            timer = self._timers[id(phase)] = threading.Timer(_QUIET_S, _print, [f"{phase.title} ..."])
            timer.daemon = True
            timer.start()

    def end(self, phase: Phase) -> None:
        if phase in self._shown:
            self._shown.remove(phase)
        if (timer := self._timers.pop(id(phase), None)) is not None:
            timer.cancel()
            if phase.seconds >= _LONG_S:
                count = f"{phase.done:,} {phase.unit}, " if phase.unit else ""
                _print(f"{phase.title}: {count}{phase.seconds:.0f} s")
        if not self._shown and self._live is not None:
            live, self._live = self._live, None
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone
                live.stop()

    def _start(self) -> Live | None:
        """Begin the line on a terminal; None where there is none, or where another live display is at work."""
        is_terminal = [stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr)]
        if not any(is_terminal) or os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
            return None
        import rich
        from rich.console import Console
        from rich.errors import LiveError
        from rich.live import Live

        console = rich.get_console() if is_terminal[0] else Console(stderr=True)
        console.is_interactive = True  # rich decides when it makes the console, maybe before stdout was a terminal
        live = Live(
            console=console,
            get_renderable=lambda: self._line(console),
            refresh_per_second=_DRAWN_PER_SECOND,
            transient=True,
            redirect_stdout=is_terminal[0],
            redirect_stderr=is_terminal[1],
        )
        try:
            live.start(refresh=True)
            console.show_cursor()  # it would stay hidden in the terminal of a process that is killed
        except (OSError, ValueError, LiveError):
            return None
        return live

    def _line(self, console: Console) -> RenderableType:
        """Return the line: phases from the outermost to the innermost, and how far the innermost one is."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        phases = list(self._shown)
        if not phases:
            return Text()
        *outer, last = phases
        title = "".join(f"{phase.title}{_count(phase)}: " for phase in outer) + last.title + _count(last)
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True, overflow="ellipsis")
        cells: list[RenderableType] = [Text(printable(title))]
        if last.total and console.width >= _NARROW_CELLS:
            line.add_column(width=_BAR_CELLS)
            cells.append(ProgressBar(last.total, last.done, width=_BAR_CELLS))
        line.add_column(no_wrap=True, overflow="ellipsis", style="dim")
        cells.append(Text(printable("  ".join(_how_far(last)))))
        line.add_row(*cells)
        return line


def _count(phase: Phase) -> str:
    if phase.total is None and not phase.done:
        return ""
    total = "" if phase.total is None else f"/{phase.total:,}"
    return f" {phase.done:,}{total}" + (f" {phase.unit}" if phase.unit else "")


def _how_far(phase: Phase) -> Iterator[str]:
    """Yield the phase's note, its rate, its time so far, and the time that is left."""
    if phase.note:
        yield phase.note
    rate = phase.rate
    if rate >= 1 and phase.unit:
        yield f"{rate:,.0f} {phase.unit}/s"
    yield _duration(phase.seconds)
    if rate > 0 and phase.total is not None:
        yield f"{_duration(max(0, phase.total - phase.done) / rate)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _print(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed meanwhile
        print(printable(line), file=sys.stderr, flush=True)
