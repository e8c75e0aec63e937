"""The losses of one or several runs as `loss.png`. matplotlib is optional: the extra `plot` installs it."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from sftx import atomic_files
from sftx.errors import OutputError, one_line, printable
from sftx.inspection.run_report.run_record import Columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

MARK: Final = b"sftx report"
"""Metadata at the beginning of the picture, by which `sftx report` recognises a file that it may replace."""

_COLOURS: Final = ("#0072b2", "#c2500a", "#00795a", "#8f3f97", "#8a6d00", "#b5306b", "#444444")
_DASHES: Final[tuple[Any, ...]] = ("-", (0, (6, 2)), (0, (2, 2)), (0, (8, 2, 2, 2)))
_MANY_RUNS: Final = 4
"""With more runs only smoothed curves are drawn, and small dots."""
_LOG_RATIO: Final = 4
"""The axis of losses is logarithmic when the largest loss is more than so many times the smallest."""
_SMOOTHED_PARTS: Final = 40
"""Curves are smoothed over this part of the run."""


class Curves(NamedTuple):
    """The name of a run with its steps and evaluations."""

    name: str
    steps: Columns
    evaluations: Columns


def write_plot(path: Path, runs: Sequence[Curves]) -> bool:
    """Write the picture. Without matplotlib, or if it cannot draw the values, log the reason and return False.

    Raises OutputError when the file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        log.info("no %s: it is drawn by matplotlib, which is not installed (pip install 'sftx[plot]')", path.name)
        return False
    try:
        with atomic_files.open_bytes(path) as file:
            _draw(file, runs)
    except OutputError:
        raise
    except Exception as error:  # matplotlib fails for values near the largest float
        log.warning("no %s: matplotlib cannot draw it: %s: %s", path.name, type(error).__name__, one_line(error))
        return False
    return True


def _draw(file: BinaryIO, runs: Sequence[Curves]) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    # The picture does not depend on the user's matplotlib settings; names in scripts that no font has show boxes.
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")
        figure = Figure(figsize=(8, 4.5 if len(runs) <= 6 else 6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        lines = [line for number in range(len(runs)) for line in _draw_run(axes, number, runs)]
        losses = [loss for run in runs for columns in run[1:] for loss in _points(columns)[1]]
        if losses and min(losses) > 0 and max(losses) > _LOG_RATIO * min(losses):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel("loss" if len(runs) == 1 else "training loss; held-out with dots")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        # Names of directories are plain text: matplotlib must not interpret `$` or a leading `_`.
        title = axes.set_title("", loc="left", fontsize=11, parse_math=False)
        title.set_text(_plain(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs")
        if lines:
            legend = axes.legend(
                [line for line, _ in lines], ["run"] * len(lines), fontsize=8, frameon=False, loc="upper right"
            )
            for text, (_, name) in zip(legend.get_texts(), lines, strict=True):
                text.set_parse_math(False)
                text.set_text(_plain(name))
        else:
            axes.text(0.5, 0.5, "no losses yet", ha="center", transform=axes.transAxes)
        figure.savefig(file, format="png", metadata={"Software": MARK.decode()})


def _draw_run(axes: Axes, number: int, runs: Sequence[Curves]) -> list[tuple[Any, str]]:
    """Draw the curves of one run; return the lines for the legend, each with its text."""
    run, is_alone, is_one_of_many = runs[number], len(runs) == 1, len(runs) > _MANY_RUNS
    colour, dashes = _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)]
    lines: list[tuple[Any, str]] = []
    x, y = _points(run.steps)
    if y:
        span = max(1.0, len(y) / _SMOOTHED_PARTS)
        if span > 1 and not is_one_of_many:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        (line,) = axes.plot(x, smooth(y, span), color=colour, linestyle=dashes, linewidth=1.7)
        lines.append((line, "training" if is_alone else run.name))
    x, y = _points(run.evaluations)
    if y:
        colour, size = _COLOURS[1] if is_alone else colour, 3 if is_one_of_many else 5
        (dots,) = axes.plot(x, y, color=colour, marker="o", markersize=size, linewidth=1, linestyle=":")
        if is_alone or not lines:
            lines.append((dots, "held-out" if is_alone else run.name))
    return lines


def _points(columns: Columns) -> tuple[list[float], list[float]]:
    """Return the steps whose loss is known, and these losses."""
    pairs = zip(columns.get("step", []), columns.get("loss", []), strict=False)
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in known], [y for _, y in known]


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Return the exponential moving average over about `span` values, without bias to the first one."""
    keep = 1 - 2 / (span + 1)
    total, weight, averages = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return averages


def _plain(name: str) -> str:
    """Return a name that can be drawn: valid UTF-8 without control characters, of at most 48 characters."""
    text = printable(name.encode("utf-8", errors="replace").decode("utf-8"))
    return text if len(text) <= 48 else f"{text[:20]} ... {text[-23:]}"
