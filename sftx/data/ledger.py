"""The ledger has an entry for every row that was dropped, filtered, held out, cut or split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from sftx import atomic_files
from sftx.errors import DataError, counted
from sftx.types import LEDGER_KEYS, Location

LINE_ERRORS: Final = "backslashreplace"
"""How the lines of a ledger are encoded: a path can hold lone surrogates, which this writes as JSON's own escapes."""
_MOST_SHOWN: Final = 10


@dataclass(frozen=True)
class Entry:
    """An entry says what happened to one row, and why."""

    where: Location
    action: Literal["dropped", "filtered", "held out", "cut", "split"]
    """`filtered` rows were left out by `data.filters`, and `held out` rows by `data.eval_fraction`; neither count
    against `data.max_dropped`."""
    reason: str
    length: int
    """Number of tokens of the whole row; 0 when it was not encoded."""
    kept: int
    """Number of tokens that are left of it."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of a line of ledger.jsonl."""
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
        """Return the entry whose `as_dict` is `values`."""
        unit = next(name for name in values if name not in LEDGER_KEYS)
        where = Location(values["source"], values[unit], unit)
        return cls(where, values["action"], values["reason"], values["length"], values["kept"])


@dataclass
class Ledger:
    """A ledger collects the entries of the training rows or of the held-out rows, and counts the rows."""

    entries: list[Entry] = field(default_factory=list)
    num_rows: int = 0

    def check(self, max_dropped: float) -> None:
        """Raise DataError when more than the share `max_dropped` of all rows was dropped, or when no row is left."""
        dropped = [entry for entry in self.entries if entry.action == "dropped"]
        left_out = [entry for entry in self.entries if entry.action in ("dropped", "filtered")]
        num_rows = self.num_rows - sum(entry.action == "held out" for entry in self.entries)
        is_empty = bool(left_out) and len(left_out) == num_rows
        if len(dropped) <= max_dropped * num_rows and not is_empty:
            return
        first = (dropped or left_out)[0]
        reasons = Counter(entry.reason for entry in (dropped or left_out))
        num_first = reasons.pop(first.reason)
        rest = "; ".join(f"{n}x {reason}" for reason, n in reasons.most_common(3))
        tokens = f" (the row has {counted(first.length, 'token')})" if first.length else ""
        shown = f"{first.where}: {first.reason}{tokens}; "
        others = f" ({num_first}x for this reason; {rest})" if reasons else ""
        if not dropped:
            raise DataError(f"{shown}the filters leave none of {counted(num_rows, 'row')}{others}; loosen data.filters")
        verbs = "trains nothing or was dropped" if len(dropped) == 1 else "train nothing or were dropped"
        shown += f"{len(dropped):,} of {counted(num_rows, 'row')} {verbs}"
        if is_empty:
            raise DataError(f"{shown}{others}; correct the rows")
        raise DataError(
            f"{shown}, more than data.max_dropped={max_dropped:g} allows{others}; "
            "correct the rows, or raise data.max_dropped"
        )

    def summary(self) -> list[str]:
        """Return a line for each action and reason, the most frequent first: count, reason and the first location."""
        first: dict[tuple[str, str], Location] = {}
        for entry in self.entries:
            first.setdefault((entry.action, entry.reason), entry.where)
        kinds = Counter((entry.action, entry.reason) for entry in self.entries).most_common()
        lines = [
            f"{number:,} of {counted(self.num_rows, 'row')} {kind[0]}: {kind[1]} (first: {first[kind]})"
            for kind, number in kinds[:_MOST_SHOWN]
        ]
        if len(kinds) > _MOST_SHOWN:
            rest = sum(number for _, number in kinds[_MOST_SHOWN:])
            lines.append(f"{rest} more rows for {len(kinds) - _MOST_SHOWN} other reasons: see the ledger")
        return lines

    def lines(self) -> Iterator[str]:
        """Yield one line of JSON for each entry."""
        return (json.dumps(entry.as_dict(), ensure_ascii=False) + "\n" for entry in self.entries)

    def write(self, path: Path) -> None:
        """Write the lines to a file. Raises OutputError; the old content of `path` is kept then."""
        with atomic_files.open_text(path, errors=LINE_ERRORS) as file:
            file.writelines(self.lines())

    @staticmethod
    def read(lines: Iterable[str]) -> list[Entry]:
        """Return the entries of these lines."""
        return [Entry.of(json.loads(line)) for line in lines]
