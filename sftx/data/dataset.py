"""Encoded rows become columns, in memory or in files that are mapped and never read as a whole; columns give examples.

A million examples as Python lists take twenty gigabytes; as columns they take five bytes a token, on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from sftx.data.row_encoder import Encoded, Row
from sftx.errors import OutputError, one_line
from sftx.types import Example, Location

_OF_TOKENS: Final[dict[str, np.dtype[Any]]] = {
    "token_ids": np.dtype(np.int32),
    "loss_mask": np.dtype(np.bool_),
    "weights": np.dtype(np.float32),
}
_OF_EXAMPLES: Final[dict[str, np.dtype[Any]]] = {
    "lengths": np.dtype(np.int64),
    "num_label_tokens": np.dtype(np.int64),
    "groups": np.dtype(np.int64),
    "sources": np.dtype(np.int32),  # which of the run's sources it came from
    "files": np.dtype(np.int32),  # index into `places`
    "numbers": np.dtype(np.int64),  # line or row within the file
    "parts": np.dtype(np.int32),
}
_DTYPES: Final = _OF_TOKENS | _OF_EXAMPLES

Columns: TypeAlias = dict[str, NDArray[Any]]


class Examples(Sequence[Example]):
    """The examples of one split. `weights` may be an empty column: then every token's weight is 1."""

    def __init__(
        self,
        columns: Columns,
        places: Sequence[tuple[str, str]],
        extras: Mapping[int, Mapping[str, Any]],
        largest_id: int,
        *,
        starts: NDArray[np.int64] | None = None,
    ) -> None:
        """`starts`: where each example begins among the tokens; by default where the one before it ends."""
        self._columns = columns
        self._places = places
        """Path and unit of the locations that `files` points to."""
        self._extras = extras
        ends = np.cumsum(columns["lengths"])
        self._starts = ends - columns["lengths"] if starts is None else starts
        self._ends = self._starts + columns["lengths"]
        self.largest_id = largest_id

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[n], tokens of each."""
        return self._columns["lengths"]

    @property
    def num_label_tokens(self) -> NDArray[np.int64]:
        """[n], trained tokens of each; the first has nothing before it that could predict it."""
        return self._columns["num_label_tokens"]

    @property
    def groups(self) -> NDArray[np.int64]:
        """[n], rising; equal for the examples that share a micro-batch."""
        return self._columns["groups"]

    @property
    def sources(self) -> NDArray[np.int32]:
        """[n], which of the run's sources each came from."""
        return self._columns["sources"]

    @property
    def num_input_tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self._columns["lengths"])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return self._encoded(at).example(self.where(at), int(self.groups[at]))

    def where(self, index: int) -> Location:
        """The row that an example came from."""
        path, unit = self._places[self._columns["files"][index]]
        return Location(path, int(self._columns["numbers"][index]), unit)

    def tokens(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and loss mask of an example, [length] each, not copied."""
        span = slice(self._starts[index], self._ends[index])
        return self._columns["token_ids"][span], self._columns["loss_mask"][span]

    def _encoded(self, at: int) -> Encoded:
        token_ids, loss_mask = self.tokens(at)
        weights = self._columns["weights"]
        if len(weights):
            weights = weights[self._starts[at] : self._ends[at]]
        weighted = bool((weights != 1).any())
        part = int(self._columns["parts"][at])
        return Encoded(token_ids, loss_mask, weights if weighted else None, part, self._extras.get(at, {}))

    def wrapped(self, length: int) -> Examples:
        """The same tokens, cut wherever their concatenation passes a multiple of `length`.

        Neighbouring pieces then fill rows of `length` tokens, the last row apart. A piece that would train nothing,
        such as a single token, is no example; what follows it does not need it.
        """
        starts = np.union1d(self._starts, np.arange(0, self.num_input_tokens, length))
        lengths = np.diff(np.append(starts, self.num_input_tokens))
        mask = self._columns["loss_mask"]
        num_label_tokens = np.add.reduceat(mask, starts, dtype=np.int64) - mask[starts] if len(starts) else starts
        whole = np.searchsorted(self._ends, starts, side="right")  # the example that each piece is of
        first = np.searchsorted(whole, whole, side="left")
        is_cut = np.bincount(whole, minlength=len(self))[whole] > 1
        parts = np.where(is_cut, np.arange(len(starts)) - first + 1, self._columns["parts"][whole])
        columns: Columns = {name: self._columns[name] for name in _OF_TOKENS}
        columns |= {name: self._columns[name][whole] for name in ("sources", "files", "numbers")}
        columns |= {
            "lengths": lengths,
            "num_label_tokens": num_label_tokens,
            "parts": parts,
            "groups": np.arange(len(starts)),
        }
        kept = np.flatnonzero(num_label_tokens)
        columns = {name: column if name in _OF_TOKENS else column[kept] for name, column in columns.items()}
        extras = {n: self._extras[at] for n, at in enumerate(whole[kept].tolist()) if at in self._extras}
        return Examples(columns, self._places, extras, self.largest_id, starts=starts[kept])

    @classmethod
    def load(cls, directory: Path) -> Examples:
        """What a writer wrote into `directory`, mapped. Raises ValueError when it is not whole."""
        described = json.loads((directory / "examples.json").read_text(encoding="utf-8"))
        columns: Columns = {}
        for name, dtype in _DTYPES.items():
            file = directory / f"{name}.bin"
            if file.stat().st_size != described["bytes"][name]:
                raise ValueError(f"{file} has not the size that was written")
            columns[name] = np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)
        extras = {int(at): values for at, values in described["extras"].items()}
        places = [(path, unit) for path, unit in described["places"]]
        return cls(columns, places, extras, described["largest_id"])


class Writer:
    """Collects rows as columns: in files of `directory`, or in memory."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._sinks: dict[str, Any] = {
            name: bytearray() if directory is None else (directory / f"{name}.bin").open("wb") for name in _DTYPES
        }
        self._places: dict[tuple[str, str], int] = {}
        self._extras: dict[int, Mapping[str, Any]] = {}
        self._largest_id = 0
        self._num_written = 0
        self._has_weights = False
        self._next_group = 0
        self.num_examples = 0

    def add(self, row: Row, source: int) -> None:
        """Adds the examples of one row of the source of that number."""
        place = (row.where.path, row.where.unit)
        file = self._places.setdefault(place, len(self._places))
        for n, one in enumerate(row.examples):
            group = self._next_group + (0 if row.is_group else n)
            self._add_tokens(one)
            num_label_tokens = int(np.count_nonzero(one.loss_mask[1:]))
            values = (len(one.token_ids), num_label_tokens, group, source, file, row.where.number, one.part)
            for (name, dtype), value in zip(_OF_EXAMPLES.items(), values, strict=True):
                self._write(name, np.asarray(value, dtype))
            if one.extras:
                self._extras[self.num_examples] = one.extras
            self.num_examples += 1
        self._next_group += 1 if row.is_group else len(row.examples)

    def _add_tokens(self, one: Encoded) -> None:
        if one.weights is not None and not self._has_weights:
            self._has_weights = True
            self._write("weights", np.ones(self._num_written, np.float32))
        self._write("token_ids", one.token_ids)
        self._write("loss_mask", one.loss_mask)
        if self._has_weights:
            self._write("weights", np.ones(len(one.token_ids), np.float32) if one.weights is None else one.weights)
        self._num_written += len(one.token_ids)
        self._largest_id = max(self._largest_id, int(one.token_ids.max()))

    def _write(self, name: str, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values, _DTYPES[name]).tobytes()
        sink = self._sinks[name]
        if self._directory is None:
            sink.extend(data)
            return
        try:
            sink.write(data)
        except OSError as error:
            raise OutputError(f"{self._directory}: cannot be written: {one_line(error)}") from error

    def finish(self) -> Examples:
        """The examples, mapped from the files where there are any."""
        if self._directory is None:
            columns = {name: np.frombuffer(self._sinks[name], dtype) for name, dtype in _DTYPES.items()}
            return Examples(columns, list(self._places), self._extras, self._largest_id)
        self.close()
        described = {
            "places": list(self._places),
            "largest_id": self._largest_id,
            "bytes": {name: (self._directory / f"{name}.bin").stat().st_size for name in _DTYPES},
            "extras": self._extras,
        }
        (self._directory / "examples.json").write_text(json.dumps(described), encoding="utf-8")
        return Examples.load(self._directory)

    def close(self) -> None:
        """Closes the files, which are then on the disk; nothing may be added after it."""
        if self._directory is not None:
            for sink in self._sinks.values():
                if not sink.closed:
                    sink.flush()
                    os.fsync(sink.fileno())
                    sink.close()
