"""A `Baseline` compares sftx's times and memory with an earlier result of `sftx bench --json`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sftx_kernels.bench import BenchError, files
from sftx_kernels.bench.report import FORMAT, Row


class Change(NamedTuple):
    what: str
    old: float
    new: float
    unit: str
    fastest: float  # the 20th percentile of the new rounds; for memory the same as `new`

    @property
    def growth(self) -> float:
        return self.new / self.old - 1

    def __str__(self) -> str:
        return f"{self.what}: {self.old:.4g} -> {self.new:.4g} {self.unit} ({self.growth:+.1%})"


class Baseline:
    """A Baseline is an earlier result; all fields that are compared are validated when it is read.

    Raises:
        BenchError: it cannot be read, or is not a result of `sftx bench`.
    """

    def __init__(self, path: Path) -> None:
        document, self.path = files.read_json(path), path
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise BenchError(f"{path}: expected a result of sftx bench --json in format {FORMAT}")
        if wrong := next(_problems(document), None):
            raise BenchError(f"{path}: {wrong}")
        self._environment: Mapping[str, Any] = document["environment"]
        self._rows = {_key(row): row for row in document["rows"] if row["ours"]}
        self.differences: list[str] = []
        """These package versions differ, so that a change may have another cause than sftx."""

    def match(self, environment: Mapping[str, Any]) -> None:
        """Fill `differences`; raises BenchError if the baseline was measured on another device."""
        old, new = self._environment, environment
        if old["device"] != new["device"]:
            raise BenchError(f"{self.path}: measured on {old['device']}, this is {new['device']}")
        versions = [(name, old["versions"].get(name), new["versions"].get(name))
                    for name in sorted({*old["versions"], *new["versions"]} - {"sftx"})]  # fmt: skip
        self.differences = [f"{name}: {before} -> {now}" for name, before, now in versions if before != now]

    def compare(self, rows: Sequence[Row]) -> tuple[list[Change], int]:
        """Return each figure of sftx that both results have, and how many of sftx's rows the baseline lacks."""
        own_rows = [row for row in rows if row.ours and row.passes]
        known = [(row, self._rows[_key(row.as_json())]) for row in own_rows if _key(row.as_json()) in self._rows]
        return [change for row, old in known for change in _changes(row, old)], len(own_rows) - len(known)


def regressed(change: Change, max_regress: float) -> bool:
    """Return True if a figure grew by more than that share, and also the fastest fifth of the rounds is slower."""
    return change.growth > max_regress and change.fastest > change.old


def _problems(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is missing or of a wrong type among the fields that are compared."""
    environment, rows = document.get("environment"), document.get("rows")
    if not isinstance(environment, dict) or not isinstance(environment.get("device"), str):
        yield 'expected "environment" with a "device"'
    elif not isinstance(environment.get("versions"), dict):
        yield 'environment: expected "versions" by name'
    if not isinstance(rows, list):
        yield 'expected a list of "rows"'
        return
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("ours"), bool):
            yield f'row {number}: expected an object that says whether it is "ours"'
        elif row["ours"]:
            yield from (f"row {number}: {problem}" for problem in _problems_of_row(row))


def _problems_of_row(row: Mapping[str, Any]) -> Iterator[str]:
    for name in ("op", "shape", "dtype", "provider"):
        if not isinstance(row.get(name), str):
            yield f"{name}: expected a text, got {row.get(name)!r}"
    mask = row.get("mask")
    if isinstance(mask, bool) or not isinstance(mask, int | float):
        yield f"mask: expected a share, got {mask!r}"
    passes = row.get("passes")
    if not isinstance(passes, dict) or not all(isinstance(figures, dict) for figures in passes.values()):
        yield "passes: expected the figures of each by name"
        return
    for name, figures in passes.items():
        if not _is_figure(figures.get("median_ms")):
            yield f"{name}: median_ms: expected a finite number > 0, got {figures.get('median_ms')!r}"
    if row.get("peak_bytes") is not None and not _is_figure(row["peak_bytes"]):
        yield f"peak_bytes: expected a finite number > 0, got {row['peak_bytes']!r}"


def _is_figure(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max  # False for NaN


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["op"], row["shape"], row["dtype"], row["mask"], row["provider"]


def _changes(row: Row, old: Mapping[str, Any]) -> Iterator[Change]:
    where = f"{row.provider}, {row.case}"
    for name, figures in row.passes.items():
        if name in old["passes"]:
            before = old["passes"][name]["median_ms"]
            yield Change(f"{where}, {name}", before, figures["median_ms"], "ms", figures["p20_ms"])
    if row.peak_bytes is not None and old.get("peak_bytes") is not None:
        peak = row.peak_bytes / 1e6
        yield Change(f"{where}, peak memory", old["peak_bytes"] / 1e6, peak, "MB", peak)
