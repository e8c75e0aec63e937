"""Encode whole sources into a dataset, in one process or several, in memory or in the cache on disk."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeAlias

from sftx.collector import collector_paused
from sftx.config.options import Source
from sftx.data import sources
from sftx.data.cache import Cache
from sftx.data.dataset import Dataset, Writer, digest
from sftx.data.ledger import Entry
from sftx.data.row_encoder import EncodedRow, RowEncoder
from sftx.data.sources import NO_PLUGINS, RowSources
from sftx.errors import DataError, PluginError, one_line
from sftx.types import Location, Record

log = logging.getLogger(__name__)

MANY_BYTES: Final = 32 * 2**20
"""Sources larger than this are encoded by several processes and cached, unless the options say otherwise. Smaller ones
take a few seconds, and starting processes would cost more than it gains."""
_MOST_PROCESSES: Final = 8  # unless the user asks for more: each holds a tokenizer and torch, 130 to 300 MB
_CHUNK: Final = 500  # rows sent to a process at once
DUPLICATE: Final = "the same tokens as an earlier row"

Chunk: TypeAlias = tuple[int, Source, list[tuple[Location, Record]]]
"""Number of the source, the source, and some of its rows."""


@dataclass(frozen=True)
class Part:
    """The rows of sources that are trained on, or those that are held out of them."""

    held_out: Callable[[], Collection[tuple[int, int]]]
    """Returns the rows that are held out, as `held_out.choose` does; not called when the cache has the encoded rows."""
    is_held_out: bool

    def rows(
        self, number: int, rows: Iterator[tuple[Location, Record]], left_out: list[Location]
    ) -> Iterator[tuple[Location, Record]]:
        """Yield the rows of the source `number` that belong to this part, and note where the others are."""
        held_out = self.held_out()
        for index, (where, record) in enumerate(rows):
            if ((number, index) in held_out) == self.is_held_out:
                yield where, record
            else:
                left_out.append(where)


def load_dataset(
    data_sources: Sequence[Source],
    encode: RowEncoder,
    *,
    identity: Mapping[str, Any] | None = None,
    part: Part | None = None,
    row_sources: RowSources = NO_PLUGINS,
    count: Callable[[int], object] = lambda num_rows: None,
) -> Dataset:
    """Read, parse and encode every row of the sources, or of a part of them; `count` is told each number of rows.

    `identity` holds everything besides the options and the tokenizer that determines the encoding (plugins, their
    options and code); with it the dataset may be read from the cache and written to it, unless a source cannot tell
    whether its rows change. Raises DataError, naming file and line, for a row that cannot be read.
    """
    config = encode.config
    many = sum(sources.num_bytes(source, row_sources) for source in data_sources) > MANY_BYTES
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_proc = config.num_proc or (min(num_cores, _MOST_PROCESSES) if many else 1)
    if identity is not None and part is not None:
        identity = {**identity, "is_held_out": part.is_held_out}
    cache = None
    if identity is not None and data_sources and (many if config.cache is None else config.cache):
        cache = Cache.of(data_sources, encode, identity, row_sources)
    if cache is None or identity is None:
        return _encode_all(data_sources, encode, num_proc, Writer(), part, row_sources, count)
    if (cached := cache.load()) is not None:
        return cached
    with cache.writing() as directory:
        data = _encode_all(data_sources, encode, num_proc, Writer(directory), part, row_sources, count)
        if Cache.of(data_sources, encode, identity, row_sources) != cache:
            raise DataError(f"{data_sources[0].path}: the data changed while they were read; start again")
        cache.save(data, directory)
        del data  # Windows renames no directory of which a file is mapped
    return cache.load() or _encode_all(data_sources, encode, num_proc, Writer(), part, row_sources, count)


def _encode_all(
    data_sources: Sequence[Source],
    encode: RowEncoder,
    num_proc: int,
    writer: Writer,
    part: Part | None,
    row_sources: RowSources,
    count: Callable[[int], object],
) -> Dataset:
    """Encode every row in order; find duplicates, keep the account of rows, and write the examples."""
    data = Dataset()
    filters = [source.filters or encode.config.filters for source in data_sources]
    seen: set[bytes] | None = set() if any(f.duplicates == "drop" for f in filters) else None
    left_out: list[Location] = []
    chunks = _chunks(data_sources, row_sources, encode.config.encoding, part, left_out)
    encoded = (
        (_encode_chunk(encode, chunk) for chunk in chunks)
        if num_proc == 1
        else _encode_parallel(chunks, encode, num_proc)
    )
    try:
        for number, rows in encoded:
            for row in rows:
                if seen is not None and row.examples:
                    key = b"".join(
                        digest(example.token_ids, example.loss_mask, example.extras) for example in row.examples
                    )
                    if key in seen and filters[number].duplicates == "drop":
                        length = sum(len(example.token_ids) for example in row.examples)
                        row.drop(DUPLICATE, length=length, action="filtered")
                    seen.add(key)
                data.ledger.num_rows += 1
                data.ledger.entries += row.entries
                data.formats[row.format] += 1
                data.questions += row.questions
                data.has_turns = data.has_turns or row.has_turns
                data.trains_stop = data.trains_stop or encode.trains_stop(row)
                writer.add(row, number)
            count(len(rows))
        if part is not None and not part.is_held_out:
            reason = f"data.eval_fraction={encode.config.eval_fraction:g}"
            data.ledger.num_rows += len(left_out)
            data.ledger.entries += [Entry(where, "held out", reason, 0, 0) for where in left_out]
        data.examples = writer.finish()
    finally:
        writer.close()
    return data


# --- one process or several ---------------------------------------------------------------------


def _chunks(
    data_sources: Sequence[Source],
    row_sources: RowSources,
    encoding: str,
    part: Part | None,
    left_out: list[Location],
) -> Iterator[Chunk]:
    for number, source in enumerate(data_sources):
        rows = sources.read(source, row_sources, encoding=encoding)
        if part is not None:
            rows = part.rows(number, rows, left_out)
        while chunk := list(islice(rows, _CHUNK)):
            yield number, source, chunk


def _encode_chunk(encode: RowEncoder, chunk: Chunk) -> tuple[int, list[EncodedRow]]:
    number, source, rows = chunk
    with collector_paused():
        return number, encode.rows(rows, source)


_worker_encoder: RowEncoder


def _start_worker(pickled: bytes) -> None:
    global _worker_encoder
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes keep all cores busy without more threads
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_encoder = pickle.loads(pickled)


def _exit_with_parent() -> None:
    """End a worker whose parent was killed and could not stop it; it would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: Chunk) -> tuple[int, list[EncodedRow]]:
    return _encode_chunk(_worker_encoder, chunk)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Let no process that is started within the block import the user's script, whose `sftx.run` would begin there."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _ignore_sigint() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # handlers can only be set in the main thread
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _encode_parallel(
    chunks: Iterator[Chunk], encode: RowEncoder, num_proc: int
) -> Iterator[tuple[int, list[EncodedRow]]]:
    """Encode chunks in several processes, in order; at most two chunks a process are queued, which bounds memory."""
    try:
        pickled = pickle.dumps(encode)
    except Exception as error:  # a plugin holds something that cannot be pickled
        raise PluginError(
            f"a parser or the template cannot be sent to other processes: {one_line(error)}; set data.num_proc=1"
        ) from error
    needs_main = b"__main__" in pickled
    # Spawned, not forked: torch and tokenizers have threads, which a fork leaves behind with their locks held.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start_worker, initargs=(pickled,))
    queued: deque[Future[tuple[int, list[EncodedRow]]]] = deque()
    try:
        for chunk in chunks:
            # Workers start when a chunk finds none idle. They inherit the ignored SIGINT: this process handles Ctrl-C.
            with _ignore_sigint(), nullcontext() if needs_main else _without_main_module():
                queued.append(pool.submit(_work, chunk))
            if len(queued) >= 2 * num_proc:
                yield queued.popleft().result()
        while queued:
            yield queued.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that encodes rows died, probably because memory ran out; lower data.num_proc (now {num_proc})"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
