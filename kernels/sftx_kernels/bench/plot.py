"""`write_plots` draws the time of forward and backward over the masks, or over one varying size, for each operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

from sftx_kernels.bench import BenchError
from sftx_kernels.bench.operations import PROVIDERS
from sftx_kernels.bench.report import Row

# Okabe and Ito's colours, which readers with a colour vision deficiency can tell apart, and as many markers.
_COLOURS: Final = ("#0072B2", "#56B4E9", "#009E73", "#000000", "#E69F00", "#D55E00", "#CC79A7", "#999999")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")
_PER_LINE: Final = 3  # panels


def path_of(directory: Path, op: str) -> Path:
    return directory / f"{op}.png"


def write_plots(directory: Path, rows: Sequence[Row], subtitle: str) -> list[Path]:
    """Write <operation>.png for each operation with a measured row. Needs matplotlib.

    Raises:
        BenchError: the directory or a picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    measured = [row for row in rows if row.passes]
    for op in dict.fromkeys(row.case.op for row in measured):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, [row for row in measured if row.case.op == op], f"{op}, forward + backward\n{subtitle}")
        path = path_of(directory, op)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
        except OSError as error:
            raise BenchError(f"{path}: cannot be written: {error.strerror}") from error
        paths.append(path)
    return paths


def _draw(figure: Any, rows: Sequence[Row], title: str) -> None:
    """Draw lines over the varying quantity, with a panel for each combination of the others; bars if nothing varies."""
    sweep = _sweep(rows)
    panels: dict[str, list[Row]] = {}
    for row in rows:
        fixed = f"{row.case.shape}, {row.case.dtype}"
        if sweep is not None and sweep.size is not None:
            sizes = asdict(row.case.shape).items()
            others = [f"{name.replace('_', ' ')} {value}" for name, value in sizes if name != sweep.size]
            fixed = ", ".join([*others, row.case.dtype])
        panels.setdefault(fixed, []).append(row)
    columns = min(_PER_LINE, len(panels))
    lines = -(-len(panels) // columns)
    figure.set_size_inches(4.8 * columns + (2.2 if sweep else 0.4), 3.6 * lines + 0.8)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    handles: dict[str, Any] = {}
    # In a fixed order, so that a provider has the same place in each picture.
    order = dict.fromkeys(provider.name for provider in PROVIDERS)
    providers = [name for name in order if any(row.provider == name for row in rows)]
    for axis, (name, members) in zip(axes, panels.items(), strict=False):
        axis.set_title(name, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if sweep is None:
            _draw_bars(axis, members)
        else:
            handles |= _draw_lines(axis, members, providers, sweep)
    if handles:
        shown = [name for name in providers if name in handles]
        where = "outside right upper"
        figure.legend([handles[name] for name in shown], shown, loc=where, frameon=False, fontsize=9)


class _Sweep(NamedTuple):
    label: str
    size: str | None  # the field of the shape; None for the mask

    def at(self, row: Row) -> float:
        return 100 * row.case.mask if self.size is None else float(getattr(row.case.shape, self.size))


def _sweep(rows: Sequence[Row]) -> _Sweep | None:
    """Return the masks if there are several, else the one size in which the shapes differ, else None."""
    if len({row.case.mask for row in rows}) > 1:
        return _Sweep("rows masked, %", None)
    shapes = [asdict(row.case.shape) for row in rows]
    differing = [name for name in shapes[0] if len({shape[name] for shape in shapes}) > 1]
    if len(differing) == 1 and all(isinstance(shape[differing[0]], int | float) for shape in shapes):
        return _Sweep(differing[0].replace("_", " "), differing[0])
    return None


def _draw_lines(axis: Any, rows: Sequence[Row], providers: Sequence[str], sweep: _Sweep) -> dict[str, Any]:
    """Draw a line for each provider, thick for sftx, with a band from p20 to p80; return the lines by provider."""
    handles = {}
    for number, provider in enumerate(providers):
        points = sorted((row for row in rows if row.provider == provider), key=sweep.at)
        if not points:
            continue
        xs, figures = [sweep.at(row) for row in points], [row.passes["both"] for row in points]
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        style["linestyle"] = "-" if number < len(_COLOURS) else "--"
        width = 2.4 if points[0].ours else 1.1
        (handles[provider],) = axis.plot(xs, [f["median_ms"] for f in figures], linewidth=width, markersize=5, **style)
        low, high = [f["p20_ms"] for f in figures], [f["p80_ms"] for f in figures]
        axis.fill_between(xs, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("ms, lower is better")
    axis.set_xlabel(sweep.label)
    axis.set_xticks(sorted({sweep.at(row) for row in rows}))
    axis.grid(axis="y", alpha=0.3)
    return handles


def _draw_bars(axis: Any, rows: Sequence[Row]) -> None:
    """Draw a bar for each provider, with its median beside it and a whisker from p20 to p80."""
    figures = [row.passes["both"] for row in rows]
    medians = [f["median_ms"] for f in figures]
    whiskers = [[f["median_ms"] - f["p20_ms"] for f in figures], [f["p80_ms"] - f["median_ms"] for f in figures]]
    colours = [_COLOURS[0] if row.ours else "#BBBBBB" for row in rows]
    bars = axis.barh([row.provider for row in rows], medians, xerr=whiskers, color=colours, ecolor="#555555")
    axis.bar_label(bars, [f"{median:.3g}" for median in medians], padding=4, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlim(left=0)
    axis.set_xlabel("ms, lower is better")
