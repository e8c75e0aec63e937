"""Read hub datasets, and directories laid out as one, with the library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sftx import hub_lookup
from sftx.config.options import Source
from sftx.data.readers import Rows, Skip, padding_remover
from sftx.errors import DataError, SftxError, did_you_mean, one_line
from sftx.types import Location

DEFAULT_SPLIT: Final = "train"


def is_saved(directory: Path) -> bool:
    """Return whether `save_to_disk` wrote this directory: a dataset, or a dictionary of splits."""
    is_dataset = (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()
    return is_dataset or (directory / "dataset_dict.json").is_file()


def read_saved(directory: Path, source: Source, skip: Skip) -> Rows:
    """Yield the rows of a directory that `save_to_disk` wrote, memory-mapped. Raises DataError."""
    import datasets

    with _as_data_error(source.path):
        data = datasets.load_from_disk(str(directory))
        if isinstance(data, datasets.DatasetDict):
            split = source.split or DEFAULT_SPLIT
            if split not in data:
                hint = did_you_mean(split, data) or f"; it has {', '.join(data)}"
                raise DataError(f"{source.path}: no split {split!r}{hint}; choose one with split: NAME")
            data = data[split]
        elif source.split is not None:
            raise DataError(f"{source.path}: is one saved split; leave split: {source.split} out")
        yield from _numbered(data, source, skip)


def read_directory(directory: Path, source: Source, skip: Skip) -> Rows:
    """Yield the rows of one split of a directory laid out as a hub dataset, file by file. Raises DataError."""
    import datasets

    with _as_data_error(source.path):
        split = source.split or DEFAULT_SPLIT
        data = datasets.load_dataset(str(directory), source.subset, split=split, streaming=True)
        yield from _numbered(data, source, skip)


def read_hub(source: Source, skip: Skip, *, streaming: bool) -> Rows:
    """Yield the rows of a hub dataset. Raises DataError.

    The dataset is downloaded once, into the cache of `datasets`, or each time again when streaming. A source with a
    limit is always streamed, so that the rows after the limit are not downloaded.
    """
    import datasets

    streaming = (streaming or source.limit is not None) and not datasets.config.HF_HUB_OFFLINE
    with _as_data_error(source.path):
        yield from _numbered(_load(source, streaming=streaming), source, skip)


def hub_fingerprint(source: Source) -> str:
    """Return what identifies the content of a hub dataset: its commit, or offline the paths of its cached files."""
    import datasets

    with _as_data_error(source.path):
        if not datasets.config.HF_HUB_OFFLINE:
            return find_commit(source.path)
        return " ".join(str(file["filename"]) for file in _load(source, streaming=False).cache_files)


def _load(source: Source, *, streaming: bool) -> Any:
    import datasets

    return datasets.load_dataset(
        source.path,
        source.subset,
        split=source.split or DEFAULT_SPLIT,
        streaming=streaming,
        revision=None if datasets.config.HF_HUB_OFFLINE else find_commit(source.path),
    )


def find_commit(path: str) -> str:
    """Return the dataset's commit, before any call of `datasets`, which would try for 23 s. Raises DataError."""
    try:
        return hub_lookup.commit(path, "dataset")
    except SftxError as error:
        raise DataError(str(error)) from error


def _numbered(data: Any, source: Source, skip: Skip) -> Rows:
    """Yield the rows of a loaded dataset with their locations, after those to be skipped."""
    import datasets

    chosen = "/".join(part for part in (source.subset, source.split) if part is not None)
    path = f"{source.path}[{chosen}]" if chosen else source.path
    # `datasets` skips all of these rows but the last one, because it does not tell how many rows it skipped.
    num_skipped = skip.left - 1
    if isinstance(data, datasets.Dataset):
        num_skipped = min(num_skipped, len(data) - 1)
    if num_skipped > 0:
        data = data.skip(skip.over(num_skipped))
    # A stream may not tell its features.
    remove_padding = padding_remover(data.features.arrow_schema) if data.features else lambda row: row
    for number, row in enumerate(data, max(num_skipped, 0) + 1):
        if not skip.over(1):
            yield Location(path, number, "row"), remove_padding(row)


@contextmanager
def _as_data_error(path: str) -> Iterator[None]:
    """Raise DataError for every exception of `datasets`, which have no common base class."""
    try:
        yield
    except SftxError:
        raise
    except Exception as error:
        hint = hub_lookup.nearest(path) if isinstance(error, ConnectionError | FileNotFoundError) else ""
        raise DataError(f"{path}: cannot be read: {one_line(error)}{hint}") from error
