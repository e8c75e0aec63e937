"""Encoded examples as columns: in memory, or in files that are memory-mapped.

A million examples as Python lists take twenty gigabytes; as columns they take five bytes a token, on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Final, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from sftx.data.ledger import Ledger
from sftx.data.row_encoder import EncodedRow, RowEncoder, check_rows
from sftx.errors import OutputError, one_line
from sftx.types import Example, Location, Question

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

_WRITTEN_TOGETHER: Final = 500  # examples, for each of which a call of numpy takes longer than its bytes

Columns: TypeAlias = dict[str, NDArray[Any]]


class Examples(Sequence[Example]):
    """The examples of one split. An empty column `weights` stands for weights that are all 1."""

    def __init__(
        self,
        columns: Columns,
        places: Sequence[tuple[str, str]],
        extras: Mapping[int, Mapping[str, Any]],
        largest_id: int,
        *,
        starts: NDArray[np.int64] | None = None,
        whole: Examples | None = None,
    ) -> None:
        """`starts`: offset of each example among the tokens; by default the end of the one before it."""
        self._columns = columns
        self._places = places
        """Path and unit of the places that the column `files` refers to."""
        self._extras = extras
        ends = np.cumsum(columns["lengths"])
        self._starts = ends - columns["lengths"] if starts is None else starts
        self._ends = self._starts + columns["lengths"]
        self.largest_id = largest_id
        self._whole = whole

    @property
    def whole(self) -> Examples:
        """The examples before `wrapped` cut them."""
        # No reference to itself: mapped files are closed when the last other one goes.
        return self if self._whole is None else self._whole

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[n], number of tokens of each example."""
        return self._columns["lengths"]

    @property
    def num_label_tokens(self) -> NDArray[np.int64]:
        """[n], number of label tokens of each example; its first token is never one."""
        return self._columns["num_label_tokens"]

    @property
    def groups(self) -> NDArray[np.int64]:
        """[n], ascending; equal for examples that share a micro-batch."""
        return self._columns["groups"]

    @property
    def sources(self) -> NDArray[np.int32]:
        """[n], number of the source that each example came from."""
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
        span = slice(self._starts[at], self._ends[at])
        weights = self._columns["weights"]
        if len(weights):
            weights = weights[span]
        path, unit = self._places[self._columns["files"][at]]
        where, part = Location(path, int(self._columns["numbers"][at]), unit), int(self._columns["parts"][at])
        return Example(
            token_ids=self._columns["token_ids"][span],
            loss_mask=self._columns["loss_mask"][span],
            row_id=f"{where}#{part}" if part else str(where),
            group=int(self.groups[at]),
            weights=weights if (weights != 1).any() else None,
            extras=self._extras.get(at, {}),
        )

    def where(self, index: int) -> Location:
        """Return the place of the record that an example came from."""
        path, unit = self._places[self._columns["files"][index]]
        return Location(path, int(self._columns["numbers"][index]), unit)

    def tokens(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return ids and loss mask of an example, [length] each, as views."""
        span = slice(self._starts[index], self._ends[index])
        return self._columns["token_ids"][span], self._columns["loss_mask"][span]

    def digests(self) -> Iterator[bytes]:
        """Yield for each example what `digest` returns of it."""
        return (digest(*self.tokens(index), self._extras.get(index, {})) for index in range(len(self)))

    def content_digest(self) -> str:
        """Return a SHA-256 of all examples in their order: tokens, labels, weights, groups and extras."""
        hashed = hashlib.sha256(json.dumps(self._extras, sort_keys=True).encode())
        for name in ("lengths", "groups"):
            hashed.update(np.ascontiguousarray(self._columns[name]).tobytes())
        hashed.update(np.ascontiguousarray(self._starts).tobytes())
        for name in _OF_TOKENS:
            hashed.update(np.ascontiguousarray(self._columns[name]).tobytes())
        return hashed.hexdigest()

    def prompt_digest(self, index: int, length: int) -> bytes:
        """Return what `digest` returns of the first tokens of an example, none of them trained, and its extras."""
        token_ids, loss_mask = self.tokens(index)
        return digest(token_ids[:length], loss_mask[:length], self._extras.get(index, {}))

    def wrapped(self, length: int) -> Examples:
        """Cut the examples wherever their concatenation passes a multiple of `length`.

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
        return Examples(columns, self._places, extras, self.largest_id, starts=starts[kept], whole=self)

    @classmethod
    def load(cls, directory: Path) -> Examples:
        """Memory-map what a Writer wrote into `directory`. Raises ValueError when it is incomplete."""
        described = json.loads((directory / "examples.json").read_text(encoding="utf-8"))
        columns: Columns = {}
        for name, dtype in _DTYPES.items():
            file = directory / f"{name}.bin"
            if file.stat().st_size != described["bytes"][name]:
                raise ValueError(f"{file} does not have the size that was written")
            columns[name] = np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)
        extras = {int(at): values for at, values in described["extras"].items()}
        places = [(path, unit) for path, unit in described["places"]]
        return cls(columns, places, extras, described["largest_id"])


def digest(token_ids: NDArray[np.int32], loss_mask: NDArray[np.bool_], extras: Mapping[str, Any]) -> bytes:
    """Return 16 bytes that are equal for examples with the same tokens, labels and extras."""
    hashed = hashlib.blake2b(np.ascontiguousarray(token_ids, np.int32).tobytes(), digest_size=16)
    hashed.update(np.packbits(loss_mask).tobytes())
    if extras:  # a question about one image is another one about another image
        hashed.update(json.dumps(extras, sort_keys=True).encode())
    return hashed.digest()


class Writer:
    """Collects encoded rows as columns: in files of `directory`, or in memory."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._sinks: dict[str, Any] = {
            name: BytesIO() if directory is None else (directory / f"{name}.bin").open("wb") for name in _DTYPES
        }
        self._pending: dict[str, list[Any]] = {name: [] for name in _DTYPES}
        """Values of the last examples, which are written together."""
        self._places: dict[tuple[str, str], int] = {}
        self._extras: dict[int, Mapping[str, Any]] = {}
        self._largest_id = 0
        self._num_tokens = 0
        self._has_weights = False
        self._next_group = 0
        self.num_examples = 0

    def add(self, row: EncodedRow, source: int) -> None:
        """Append the examples of one row; `source` is the number of the source that it came from."""
        place = (row.where.path, row.where.unit)
        file = self._places.setdefault(place, len(self._places))
        pending = self._pending
        for n, example in enumerate(row.examples):
            length, weights = len(example.token_ids), example.weights
            pending["token_ids"].append(example.token_ids)
            pending["loss_mask"].append(example.loss_mask)
            pending["lengths"].append(length)
            pending["num_label_tokens"].append(example.num_label_tokens)
            pending["groups"].append(self._next_group + example.group)
            pending["sources"].append(source)
            pending["files"].append(file)
            pending["numbers"].append(row.where.number)
            pending["parts"].append(n + 1 if len(row.examples) > 1 else 0)
            if weights is not None and not self._has_weights:  # the examples before it have weights of 1 from now on
                self._has_weights = True
                pending["weights"].append(np.ones(self._num_tokens))
            if self._has_weights:
                pending["weights"].append(np.ones(length) if weights is None else weights)
            self._num_tokens += length
            if example.extras:
                self._extras[self.num_examples] = example.extras
            self.num_examples += 1
        self._next_group += row.num_groups
        if len(pending["lengths"]) >= _WRITTEN_TOGETHER:
            self._write()

    def _write(self) -> None:
        """Write what is pending. Raises OutputError."""
        try:
            for name, values in self._pending.items():
                if values:
                    column = np.concatenate(values) if name in _OF_TOKENS else np.array(values)
                    if name == "token_ids":
                        self._largest_id = max(self._largest_id, int(column.max()))
                    self._sinks[name].write(np.ascontiguousarray(column, _DTYPES[name]).tobytes())
                values.clear()
        except OSError as error:
            raise OutputError(f"{self._directory}: cannot be written: {one_line(error)}") from error

    def finish(self) -> Examples:
        """Return the examples, memory-mapped when they were written to files. Raises OutputError."""
        self._write()
        if self._directory is None:
            columns = {name: np.frombuffer(self._sinks[name].getbuffer(), dtype) for name, dtype in _DTYPES.items()}
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
        """Flush the files to disk and close them; nothing may be added afterwards."""
        if self._directory is not None:
            for sink in self._sinks.values():
                if not sink.closed:
                    sink.flush()
                    os.fsync(sink.fileno())
                    sink.close()


@dataclass
class Dataset:
    """The examples of one split, and the account of the rows that they came from."""

    examples: Examples = field(default_factory=lambda: Writer().finish())
    questions: list[Question] = field(default_factory=list)
    """Its conversations that end with an assistant's turn, where evaluation asks for them."""
    ledger: Ledger = field(default_factory=Ledger)
    formats: Counter[str] = field(default_factory=Counter)
    """Rows by the parser that read them."""
    trains_stop: bool = False
    """Whether any example trains one of the template's stop tokens."""
    has_turns: bool = False
    """Whether any row was a conversation."""

    def check(self, encode: RowEncoder, *, max_dropped: float | None = None) -> None:
        """Raise DataError for what no run may start with: see `check_rows`."""
        first = self.examples[0].row_id if len(self.examples) else ""
        check_rows(self, encode, first, max_dropped=max_dropped)

    @property
    def num_label_tokens(self) -> int:
        return int(self.examples.num_label_tokens.sum())

    @property
    def num_input_tokens(self) -> int:
        return self.examples.num_input_tokens
