"""The account of every row that does not reach training as it was written."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sftx.errors import DataError
from sftx.types import Location


@dataclass(frozen=True)
class Entry:
    """One row that was dropped or changed."""

    where: Location
    action: Literal["dropped", "cut"]
    reason: str
    length: int
    """Tokens of the row as it was written; 0 when it was never encoded."""
    kept: int
    """Tokens that are left."""


@dataclass
class Ledger:
    """Collects the entries of one source of rows."""

    entries: list[Entry] = field(default_factory=list)
    num_rows: int = 0

    def drop(self, where: Location, reason: str, *, length: int = 0) -> None:
        self.entries.append(Entry(where, "dropped", reason, length, 0))

    def cut(self, where: Location, reason: str, *, length: int, kept: int) -> None:
        self.entries.append(Entry(where, "cut", reason, length, kept))

    def check(self, max_dropped: float) -> None:
        """Raises DataError when more than the share `max_dropped` of all rows was dropped, or every one."""
        dropped = [entry for entry in self.entries if entry.action == "dropped"]
        if not dropped or (len(dropped) <= max_dropped * self.num_rows and len(dropped) < self.num_rows):
            return
        first = dropped[0]
        reasons = Counter(entry.reason for entry in dropped)
        others = f" (reasons: {'; '.join(f'{n}x {reason}' for reason, n in reasons.most_common(3))})"
        tokens = f" (the row has {first.length} tokens)" if first.length else ""
        shown = f"{first.where}: {first.reason}{tokens}; "
        shown += f"{len(dropped)} of {self.num_rows} rows train nothing or were dropped"
        others = others if len(reasons) > 1 else ""
        if len(dropped) == self.num_rows:
            raise DataError(f"{shown}{others}; mend the rows")
        raise DataError(
            f"{shown}, more than data.max_dropped={max_dropped:g} allows{others}; "
            "mend the rows, or raise data.max_dropped"
        )

    def summary(self) -> list[str]:
        """One line for each kind of entry: how many, why, and where the first stands."""
        lines = []
        for (action, reason), number in Counter((e.action, e.reason) for e in self.entries).most_common():
            first = next(e for e in self.entries if (e.action, e.reason) == (action, reason))
            lines.append(f"{number} of {self.num_rows} rows {action}: {reason} (first: {first.where})")
        return lines

    def write(self, path: Path) -> None:
        """Writes one JSON line an entry."""
        with path.open("w", encoding="utf-8") as file:
            for entry in self.entries:
                row = dataclasses.asdict(entry) | {"where": str(entry.where)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
