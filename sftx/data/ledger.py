"""The account of every row that does not reach training as it was written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sftx.errors import DataError
from sftx.types import Location


@dataclass(frozen=True)
class Entry:
    """One row that was dropped, filtered or changed."""

    where: Location
    action: Literal["dropped", "filtered", "cut", "split"]
    """`filtered`: the run asked for it, so that it does not count against `max_dropped`."""
    reason: str
    length: int
    """Tokens of the row as it was written; 0 when it was never encoded."""
    kept: int
    """Tokens that are left."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values, as ledger.jsonl holds them."""
        return {
            "where": str(self.where),
            "source": self.where.path,
            self.where.unit: self.where.number,
            "action": self.action,
            "reason": self.reason,
            "length": self.length,
            "kept": self.kept,
        }

    @classmethod
    def of(cls, values: dict[str, Any]) -> Entry:
        """What `as_dict` gave."""
        unit = "line" if "line" in values else "row"
        where = Location(values["source"], values[unit], unit)
        return cls(where, values["action"], values["reason"], values["length"], values["kept"])


@dataclass
class Ledger:
    """Collects the entries of one split."""

    entries: list[Entry] = field(default_factory=list)
    num_rows: int = 0

    def check(self, max_dropped: float) -> None:
        """Raises DataError when more than the share `max_dropped` of all rows was dropped, or none is left."""
        dropped = [entry for entry in self.entries if entry.action == "dropped"]
        gone = [entry for entry in self.entries if entry.action in ("dropped", "filtered")]
        is_empty = bool(gone) and len(gone) == self.num_rows
        if len(dropped) <= max_dropped * self.num_rows and not is_empty:
            return
        first = (dropped or gone)[0]
        reasons = Counter(entry.reason for entry in (dropped or gone))
        others = f" (reasons: {'; '.join(f'{n}x {reason}' for reason, n in reasons.most_common(3))})"
        tokens = f" (the row has {first.length} tokens)" if first.length else ""
        shown = f"{first.where}: {first.reason}{tokens}; "
        others = others if len(reasons) > 1 else ""
        if not dropped:
            raise DataError(f"{shown}the filters leave none of {self.num_rows} rows{others}; loosen data.filters")
        shown += f"{len(dropped)} of {self.num_rows} rows train nothing or were dropped"
        if is_empty:
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
            file.writelines(json.dumps(entry.as_dict(), ensure_ascii=False) + "\n" for entry in self.entries)

    @staticmethod
    def read(lines: Iterable[str]) -> list[Entry]:
        """The entries that `write` wrote."""
        return [Entry.of(json.loads(line)) for line in lines]
