"""Whether sftx has become slower, or hungrier, than it was when an earlier result was written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sftx_kernels.bench import BenchError
from sftx_kernels.bench.report import FORMAT, Row


class Change(NamedTuple):
    what: str
    old: float
    new: float
    unit: str
    fastest: float  # of the new rounds, the time that a fifth of them stayed under; for memory the same as `new`

    @property
    def growth(self) -> float:
        return self.new / self.old - 1 if self.old else float("inf")

    def __str__(self) -> str:
        return f"{self.what}: {self.old:.4g} -> {self.new:.4g} {self.unit} ({self.growth:+.1%})"


class Baseline:
    """An earlier JSON.

    Raises:
        BenchError: it cannot be read, is none of ours, or was measured on another device.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any]) -> None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(f"{path}: cannot be read: {error}") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise BenchError(f"{path}: expected a result of sftx bench --json in format {FORMAT}")
        old, self.path = document["environment"], path
        if old["device"] != environment["device"]:
            raise BenchError(f"{path}: measured on {old['device']}, this is {environment['device']}")
        self._rows = {_key(row): row for row in document["rows"] if row["ours"]}
        names = sorted({*old["versions"], *environment["versions"]} - {"sftx"})
        self.differences = [
            f"{name}: {old['versions'].get(name)} -> {environment['versions'].get(name)}"
            for name in names
            if old["versions"].get(name) != environment["versions"].get(name)
        ]
        """Versions that are not what they were, so that a change may not be ours."""

    def compare(self, rows: Sequence[Row]) -> tuple[list[Change], int]:
        """Each figure of ours that both have, and how many of our rows the baseline lacks."""
        mine = [row for row in rows if row.ours and row.passes]
        known = [(row, self._rows[_key(row.as_json())]) for row in mine if _key(row.as_json()) in self._rows]
        return [change for row, old in known for change in _changes(row, old)], len(mine) - len(known)


def regressed(change: Change, max_regress: float) -> bool:
    """More by that share, and not by a few slow rounds: even the fast fifth of them is slower than it was."""
    return change.growth > max_regress and change.fastest > change.old


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["op"], row["shape"], row["dtype"], row["mask"], row["provider"]


def _changes(row: Row, old: Mapping[str, Any]) -> Iterator[Change]:
    where = f"{row.provider}, {row.case}"
    for name, figures in row.passes.items():
        if name in old["passes"]:
            before = old["passes"][name]["median_ms"]
            yield Change(f"{where}, {name}", before, figures["median_ms"], "ms", figures["p20_ms"])
    if row.peak_bytes is not None and old["peak_bytes"] is not None:
        peak = row.peak_bytes / 1e6
        yield Change(f"{where}, peak memory", old["peak_bytes"] / 1e6, peak, "MB", peak)
