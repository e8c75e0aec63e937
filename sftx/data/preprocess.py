"""Sources become a dataset: every row read, encoded by one or several processes, kept in memory or on disk."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, TypeAlias

from sftx.config.options import Filters, Source
from sftx.data import sources
from sftx.data.cache import Cache
from sftx.data.dataset import Examples, Writer
from sftx.data.ledger import Ledger
from sftx.data.row_encoder import Encoded, Question, Row, RowEncoder, check_rows
from sftx.errors import DataError, PluginError, one_line
from sftx.types import Location, Record

log = logging.getLogger(__name__)

MANY_BYTES: Final = 32 * 2**20
"""Sources larger than this are encoded by several processes and cached, unless the options say otherwise: below it, a
few seconds of work, starting processes costs more than it gains."""
_MOST_PROCESSES: Final = 8  # unless asked for more: each holds a tokenizer and torch, 130 to 300 MB
_CHUNK: Final = 500  # rows sent to a process at once
DUPLICATE: Final = "the same tokens as an earlier row"

Chunk: TypeAlias = tuple[int, Source, list[tuple[Location, Record]]]
"""Number of the source, the source, and some of its rows."""


@dataclass
class Dataset:
    """The examples of one split, and the account of the rows they came from."""

    examples: Examples = field(default_factory=lambda: Writer().finish())
    questions: list[Question] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    formats: Counter[str] = field(default_factory=Counter)
    trains_stop: bool = False
    """Whether any example trains one of the template's stop tokens."""
    has_turns: bool = False
    """Whether any row was a conversation."""

    def check(self, encode: RowEncoder, *, max_dropped: float | None = None) -> None:
        """Raises DataError for what a run is not begun with: see `check_rows`."""
        first = self.examples[0].row_id if len(self.examples) else ""
        check_rows(self, encode, first, max_dropped=max_dropped)

    @property
    def num_label_tokens(self) -> int:
        return int(self.examples.num_label_tokens.sum())

    @property
    def num_input_tokens(self) -> int:
        return self.examples.num_input_tokens


def prepare(wanted: Sequence[Source], encode: RowEncoder, *, identity: Mapping[str, Any] | None = None) -> Dataset:
    """Reads, parses and encodes every row of the sources.

    With `identity`, all else that decides what an encoded row is (plugins, their options and code), the dataset may
    come from the cache, and go there. Raises DataError, naming file and line, for a row that cannot be read.
    """
    config = encode.config
    many = sum(sources.num_bytes(source) for source in wanted) > MANY_BYTES
    cache = None
    if identity is not None and wanted and (many if config.cache is None else config.cache):
        cache = Cache.of(wanted, encode, identity)
    data = cache.load() if cache is not None else None
    if data is None:
        num_proc = config.num_proc or (min(_num_cores(), _MOST_PROCESSES) if many else 1)
        if cache is None:
            data = _encode_all(wanted, encode, num_proc, Writer())
        else:
            with cache.writing() as directory:
                data = _encode_all(wanted, encode, num_proc, Writer(directory))
                if Cache.of(wanted, encode, identity or {}) != cache:
                    raise DataError(f"{wanted[0].path}: the data changed while they were read; start again")
                cache.save(data, directory)
            data = cache.load() or data
    return data


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode_all(wanted: Sequence[Source], encode: RowEncoder, num_proc: int, writer: Writer) -> Dataset:
    data = Dataset()
    collect = _Collector(data, writer, encode, [source.filters or encode.config.filters for source in wanted])
    try:
        for number, row in _rows(wanted, encode, num_proc):
            collect(number, row)
        data.examples = writer.finish()
    finally:
        writer.close()
    return data


class _Collector:
    """Takes encoded rows in their order; finds duplicates, counts, and hands the examples to the writer."""

    def __init__(self, data: Dataset, writer: Writer, encode: RowEncoder, filters: Sequence[Filters]) -> None:
        self._data = data
        self._writer = writer
        self._filters = filters
        self._encode = encode
        self._seen: set[bytes] | None = set() if any(f.duplicates == "drop" for f in filters) else None

    def __call__(self, source: int, row: Row) -> None:
        data = self._data
        if self._seen is not None and row.examples:
            key = digest(row.examples)
            if key in self._seen and self._filters[source].duplicates == "drop":
                length = sum(len(one.token_ids) for one in row.examples)
                row.drop(DUPLICATE, length=length, action="filtered")
            self._seen.add(key)
        data.ledger.num_rows += 1
        data.ledger.entries += row.entries
        data.formats[row.format] += 1
        data.questions += row.questions
        data.has_turns = data.has_turns or row.has_turns
        data.trains_stop = data.trains_stop or self._encode.trains_stop(row)
        self._writer.add(row, source)


def digest(examples: Sequence[Encoded]) -> bytes:
    """What two rows have in common that train the same: 16 bytes."""
    hashed = hashlib.blake2b(digest_size=16)
    for one in examples:
        hashed.update(len(one.token_ids).to_bytes(8, "little"))
        hashed.update(one.token_ids.tobytes())
        hashed.update(one.loss_mask.tobytes())
    return hashed.digest()


# --- rows, by one process or several ------------------------------------------------------------


def _rows(wanted: Sequence[Source], encode: RowEncoder, num_proc: int) -> Iterator[tuple[int, Row]]:
    """The rows of every source in their order, encoded, with the number of their source."""
    from tqdm import tqdm

    chunks = _chunks(wanted)
    encoded = (_encode(encode, chunk) for chunk in chunks) if num_proc == 1 else _parallel(chunks, encode, num_proc)
    # On a terminal only, and only when it takes longer than a moment.
    with tqdm(desc="encoding", unit=" rows", delay=2, disable=None, leave=False) as bar:
        for number, rows in encoded:
            yield from ((number, row) for row in rows)
            bar.update(len(rows))


def _chunks(wanted: Sequence[Source]) -> Iterator[Chunk]:
    for number, source in enumerate(wanted):
        rows = sources.read(source)
        while chunk := list(islice(rows, _CHUNK)):
            yield number, source, chunk


def _encode(encode: RowEncoder, chunk: Chunk) -> tuple[int, list[Row]]:
    number, source, rows = chunk
    return number, [encode(where, record, source) for where, record in rows]


_of_this_process: RowEncoder


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there can it be said
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start(pickled: bytes) -> None:
    global _of_this_process
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _of_this_process = pickle.loads(pickled)


def _die_with_parent() -> None:
    """A parent that was killed cannot tell its workers to stop, and they would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_here(chunk: Chunk) -> tuple[int, list[Row]]:
    return _encode(_of_this_process, chunk)


def _parallel(chunks: Iterator[Chunk], encode: RowEncoder, num_proc: int) -> Iterator[tuple[int, list[Row]]]:
    """In the order of the chunks; at most two chunks a process are under way, so that memory stays bounded."""
    try:
        pickled = pickle.dumps(encode)
    except Exception as error:  # whatever a plugin holds that cannot be pickled
        raise PluginError(
            f"a parser or the template cannot be sent to other processes: {one_line(error)}; set data.num_proc=1"
        ) from error
    # Not forked: torch and tokenizers have threads, which a fork leaves behind with their locks held.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start, initargs=(pickled,))
    under_way: deque[Future[tuple[int, list[Row]]]] = deque()
    try:
        for chunk in chunks:
            # Workers are started with the first chunk, and inherit that Ctrl-C is for this process to act upon.
            with nullcontext() if under_way else _ctrl_c_ignored():
                under_way.append(pool.submit(_encode_here, chunk))
            if len(under_way) >= 2 * num_proc:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that encodes rows died, for want of memory perhaps; lower data.num_proc (now {num_proc})"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
