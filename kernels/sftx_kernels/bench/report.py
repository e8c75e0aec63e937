"""This module presents the results of a bench as rows, tables, JSON and CSV."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from sftx_kernels.bench import files
from sftx_kernels.bench.cases import PASSES, Case, installed_version
from sftx_kernels.bench.devices import Device
from sftx_kernels.bench.operations import shape_entry

FORMAT: Final = 1
EAGER: Final = "torch-eager"
_PACKAGES: Final = ("torch", "triton", "sftx", "peft", "liger-kernel", "cut-cross-entropy", "quack-kernels", "unsloth")


@dataclass
class Row:
    """A Row has the results of one provider on one case; a figure that was not measured is None.

    passes: for forward, backward and both: median_ms, p20_ms, p80_ms, tflop_per_s, gb_per_s, light_percent.
    error: the largest relative error against fp64, of the value `error_of`, over the rows `error_on`.
    failure: the exception of a provider that failed. absent: why a provider was not tried.
    """

    case: Case
    provider: str
    ours: bool
    version: str | None = None
    passes: dict[str, dict[str, float]] = field(default_factory=dict)
    num_rounds: int = 0
    peak_bytes: int | None = None
    peak_rss_bytes: int | None = None
    error: float | None = None
    error_of: str | None = None
    error_on: str | None = None
    failure: str | None = None
    absent: str | None = None

    def median(self, name: str = "both") -> float | None:
        return self.passes[name]["median_ms"] if name in self.passes else None

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["case"]
        return {
            **shape_entry(self.case.shape),
            "shape": str(self.case.shape),
            "dtype": self.case.dtype,
            "mask": self.case.mask,
            **values,
        }


def environment(device: Device) -> dict[str, Any]:
    """Return what must be equal for figures to be comparable: device, versions, threads."""
    return {
        "device": device.name,
        "device_type": device.torch_device.type,
        "threads": torch.get_num_threads(),
        "peaks": asdict(device.peaks),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "git": _git_state(),
        "versions": {name: version for name in _PACKAGES if (version := installed_version(name)) is not None},
    }


def _git_state() -> str | None:
    """Return the commit of this file's checkout, with -dirty if files are modified; None outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


# ---- on the terminal


def header(environment: Mapping[str, Any], device: Device) -> str:
    peaks, versions = device.peaks, environment["versions"]
    light = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in peaks.flops_per_s.items())
    flushed = "caches flushed before each pass" if device.torch_device.type == "cuda" else "caches not flushed"
    return "\n".join(
        [
            f"{device.name}; {', '.join(f'{name} {version}' for name, version in versions.items())}",
            f"speed of light ({peaks.source}): {light} TFLOP/s, {peaks.bytes_per_s / 1e9:.4g} GB/s",
            f"median over rounds of all providers in turn, {flushed}; memory beyond the inputs; error against fp64",
        ]
    )


def table_of(rows: Sequence[Row]) -> list[list[str]]:
    """Return the rows of one case as text, the names of the columns first."""
    floor_name = rows[0].case.shape.floor
    eager, floor = (next((row.median() for row in rows if row.provider == name), None) for name in (EAGER, floor_name))
    has_rss = any(row.peak_rss_bytes is not None for row in rows)
    lines = [
        ["provider", "fwd ms", "bwd ms", "both ms", "p20 - p80", "x eager"]
        + ([f"/ {floor_name.partition('-')[0]}"] if floor_name else [])
        + ["peak MB"]
        + (["RSS MB"] if has_rss else [])
        + ["TFLOP/s", "GB/s", "% light", "error", "in"]
    ]
    for row in rows:
        if not row.passes:
            continue
        both = row.passes["both"]
        median = both["median_ms"]
        cells = [row.provider, *(_number(row.passes[name]["median_ms"]) for name in PASSES)]
        cells += [f"{_number(both['p20_ms'])} - {_number(both['p80_ms'])}", _number(eager and eager / median)]
        cells += [_number(floor and median / floor)] if floor_name else []
        cells += [_megabytes(row.peak_bytes)] + ([_megabytes(row.peak_rss_bytes)] if has_rss else [])
        cells += [_number(both[key]) for key in ("tflop_per_s", "gb_per_s", "light_percent")]
        cells += ["-" if row.error is None else f"{row.error:.1e}", row.error_of or "-"]
        lines.append(cells)
    return lines


def absent_of(rows: Sequence[Row]) -> list[str]:
    """Return a line for each provider and reason why it was not tried, with the operations concerned.

    If the provider was tried on other cases of an operation, the line names the cases instead.
    """
    tried = {(row.provider, row.case.op) for row in rows if row.absent is None}
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.absent is not None:
            where = str(row.case) if (row.provider, row.case.op) in tried else row.case.op
            reasons.setdefault(f"{row.provider}: {row.absent}", {})[where] = None
    return [f"{reason} ({'; '.join(places)})" for reason, places in reasons.items()]


def print_case(rows: Sequence[Row]) -> None:
    """Print the table of one case, the failures, and which rows the errors cover unless it is all."""
    print(f"\n{rows[0].case}")
    lines = table_of(rows)
    if len(lines) > 1:
        print_table(lines)
    for row in rows:
        if row.failure:
            print(f"  failed: {row.provider}: {row.failure}")
    for rows_compared in sorted({row.error_on for row in rows if row.error_on and row.error_on != "all rows"}):
        print(f"  error: {rows_compared}")


def print_table(lines: Sequence[Sequence[str]], *, width: int | None = None) -> None:
    """Print lines of cells, the names of the columns first: the first column to the left, the others to the right.

    With rich, a table that is wider than `width` is folded; without rich, or with width None, it is never cut.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            print("  " + "  ".join(cells))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for number, name in enumerate(lines[0]):
        folds = width is not None and (number == 0 or "loads" in name)
        table.add_column(name, justify="right" if number else "left", no_wrap=not folds, overflow="fold")
    for line in lines[1:]:
        table.add_row(*line, style="bold" if line[0].startswith("sftx") else None)
    Console(width=width or max(200, Console().width), highlight=False, soft_wrap=width is None).print(table)


def _number(value: float | None) -> str:
    """Format three significant digits without an exponent, two or fewer under 0.1."""
    if value is None:
        return "-"
    decimals = next((digits for digits, least in ((0, 99.95), (1, 9.995), (2, 0.0995)) if value >= least), 3)
    return f"{value:.{decimals}f}"


def _megabytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else _number(num_bytes / 1e6)


# ---- in files


def write_json(path: Path, environment: Mapping[str, Any], rows: Iterable[Row], not_run: Iterable[Case]) -> None:
    document = {
        "format": FORMAT,
        "environment": environment,
        "rows": [row.as_json() for row in rows],
        "not_run": [str(case) for case in not_run],
    }
    with files.writing(path) as file:
        file.write(json.dumps(document, indent=1) + "\n")


def write_csv(path: Path, environment: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """Write a line for each pass; a provider that was not measured has one line, with the reason."""
    columns = ["op", "shape", "dtype", "mask", "provider", "version", "pass", "median_ms", "p20_ms", "p80_ms"]
    columns += ["tflop_per_s", "gb_per_s", "light_percent", "peak_bytes", "peak_rss_bytes", "error", "error_of"]
    columns += ["error_on", "num_rounds", "failure", "absent", "device", "torch", "git"]
    where = {key: environment[key] for key in ("device", "git")} | {"torch": environment["versions"].get("torch")}
    with files.writing(path) as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            for name, figures in (row.passes or {"": {}}).items():
                writer.writerow(row.as_json() | {"pass": name} | figures | where)
