"""The losses of one run or several as `loss.png`, drawn by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sftx import atomic_files
from sftx.errors import OutputError, one_line, printable
from sftx.inspection.run_report.run_record import Columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

MARK: Final = b"sftx report"
"""Stands in the head of the picture, and lets it be written again."""

_COLOURS: Final = ("#0072b2", "#c2500a", "#00795a", "#8f3f97", "#8a6d00", "#b5306b", "#444444")
_DASHES: Final[tuple[Any, ...]] = ("-", (0, (6, 2)), (0, (2, 2)), (0, (8, 2, 2, 2)))
_MANY: Final = 4
"""Runs, past which only smoothed curves are drawn, and small dots."""
_SPAN: Final = 40
"""Steps are smoothed over this part of the run, beside the line that is not."""


def write(path: Path, runs: Sequence[tuple[str, Columns, Columns]]) -> bool:
    """Draws name, steps and evaluations of each run; False, with a line in the log, where matplotlib cannot.

    Whole, or what was there before. Raises OutputError.
    """
    if importlib.util.find_spec("matplotlib") is None:
        log.info("no %s: it is drawn by matplotlib, which is not installed (pip install 'sftx[plot]')", path.name)
        return False
    try:
        with atomic_files.open_bytes(path) as file:
            _draw(file, runs)
    except OutputError:
        raise
    except Exception as error:  # numbers at the end of what a float can hold
        log.warning("no %s: matplotlib cannot draw it: %s: %s", path.name, type(error).__name__, one_line(error))
        return False
    return True


def _draw(file: Any, runs: Sequence[tuple[str, Columns, Columns]]) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A picture looks the same whatever the user's own settings are; a name in a script that no font has shows boxes.
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")
        figure = Figure(figsize=(8, 4.5 if len(runs) <= 6 else 6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        lines = [line for n, run in enumerate(runs) for line in _curves(axes, n, run, len(runs))]
        axes.set_xlabel("step")
        axes.set_ylabel("loss" if len(runs) == 1 else "training loss; held-out with dots")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        _label(axes, lines, runs)
        figure.savefig(file, format="png", metadata={"Software": MARK.decode()})


def _curves(axes: Axes, n: int, run: tuple[str, Columns, Columns], num_runs: int) -> list[tuple[Any, str]]:
    """Draws those of one run; returns what the legend shows, with its text."""
    name, steps, evaluations = run
    is_alone, is_one_of_many = num_runs == 1, num_runs > _MANY
    colour, dashes = _COLOURS[n % len(_COLOURS)], _DASHES[n % len(_DASHES)]
    found = []
    x, y = _points(steps, "loss")
    if y:
        span = max(1.0, len(y) / _SPAN)
        if span > 1 and not is_one_of_many:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        (line,) = axes.plot(x, smoothed(y, span), color=colour, linestyle=dashes, linewidth=1.7)
        found.append((line, "training" if is_alone else name))
    x, y = _points(evaluations, "loss")
    if y:
        colour, size = _COLOURS[1] if is_alone else colour, 3 if is_one_of_many else 5
        (dots,) = axes.plot(x, y, color=colour, marker="o", markersize=size, linewidth=1, linestyle=":")
        found += [(dots, "held-out" if is_alone else name)] if is_alone or not found else []
    return found


def _points(columns: Columns, name: str) -> tuple[list[float], list[float]]:
    pairs = zip(columns.get("step", []), columns.get(name, []), strict=False)
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in known], [y for _, y in known]


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average of about `span` values, without a pull to the first one."""
    keep = 1 - 2 / (span + 1)
    total, weight, found = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def _label(axes: Axes, lines: Sequence[tuple[Any, str]], runs: Sequence[tuple[str, Columns, Columns]]) -> None:
    """Title and legend. Names of directories are text, whatever matplotlib would make of `$` and a first `_`."""
    title = axes.set_title("", loc="left", fontsize=11, parse_math=False)
    title.set_text(_plain(runs[0][0]) if len(runs) == 1 else f"{len(runs)} runs")
    if not lines:
        axes.text(0.5, 0.5, "no losses yet", ha="center", transform=axes.transAxes)
        return
    legend = axes.legend(
        [line for line, _ in lines], ["run"] * len(lines), fontsize=8, frameon=False, loc="upper right"
    )
    for text, (_, name) in zip(legend.get_texts(), lines, strict=True):
        text.set_parse_math(False)
        text.set_text(_plain(name))


def _plain(name: str) -> str:
    text = printable(name.encode("utf-8", errors="replace").decode("utf-8"))
    return text if len(text) <= 48 else f"{text[:20]} ... {text[-23:]}"
