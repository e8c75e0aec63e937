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

_MOST_SHOWN = 10


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
        """One line for each kind of entry, the most frequent first: how many, why, and where the first stands."""
        first: dict[tuple[str, str], Location] = {}
        for entry in self.entries:
            first.setdefault((entry.action, entry.reason), entry.where)
        kinds = Counter((entry.action, entry.reason) for entry in self.entries).most_common()
        lines = [
            f"{number} of {self.num_rows} rows {kind[0]}: {kind[1]} (first: {first[kind]})"
            for kind, number in kinds[:_MOST_SHOWN]
        ]
        if len(kinds) > _MOST_SHOWN:
            rest = sum(number for _, number in kinds[_MOST_SHOWN:])
            lines.append(f"{rest} more rows for {len(kinds) - _MOST_SHOWN} other reasons: see the ledger")
        return lines

    def write(self, path: Path) -> None:
        """Writes one JSON line an entry."""
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(entry.as_dict(), ensure_ascii=False) + "\n" for entry in self.entries)

    @staticmethod
    def read(lines: Iterable[str]) -> list[Entry]:
        """The entries that `write` wrote."""
        return [Entry.of(json.loads(line)) for line in lines]
