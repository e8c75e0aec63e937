"""Hub datasets, and directories that are laid out as one, become rows by way of `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

from sftx.config.options import Source
from sftx.data.readers import Rows, Skip
from sftx.errors import DataError, SftxError, did_you_mean, one_line
from sftx.types import Location

DEFAULT_SPLIT: Final = "train"
_PATIENCE_S: Final = 5


def is_saved(directory: Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    one = (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()
    return one or (directory / "dataset_dict.json").is_file()


def read_saved(directory: Path, source: Source, skip: Skip) -> Rows:
    """The rows of a directory that `save_to_disk` wrote; memory-mapped. Raises DataError."""
    import datasets

    with _explained(source.path):
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
    """The rows of one split of a directory laid out as a hub dataset; read file by file. Raises DataError."""
    import datasets

    with _explained(source.path):
        split = source.split or DEFAULT_SPLIT
        data = datasets.load_dataset(str(directory), source.subset, split=split, streaming=True)
        yield from _numbered(data, source, skip)


def read_hub(source: Source, skip: Skip, *, streaming: bool) -> Rows:
    """The rows of a hub dataset: downloaded once, into the cache of `datasets`, or again each time when streaming.

    A source with a limit is streamed, which need not download what comes after. Raises DataError.
    """
    import datasets

    streaming = (streaming or source.limit is not None) and not datasets.config.HF_HUB_OFFLINE
    with _explained(source.path):
        yield from _numbered(_load(source, streaming=streaming), source, skip)


def hub_fingerprint(source: Source) -> str:
    """What names the present content of a hub dataset: its commit; offline, where the cache keeps it."""
    import datasets

    with _explained(source.path):
        if not datasets.config.HF_HUB_OFFLINE:
            return _commit(source.path)
        return " ".join(str(file["filename"]) for file in _load(source, streaming=False).cache_files)


def _load(source: Source, *, streaming: bool) -> Any:
    import datasets

    return datasets.load_dataset(
        source.path,
        source.subset,
        split=source.split or DEFAULT_SPLIT,
        streaming=streaming,
        revision=None if datasets.config.HF_HUB_OFFLINE else _commit(source.path),
    )


@cache
def _commit(path: str) -> str:
    """The commit that this process reads. Raises DataError.

    Asked before anything else: `datasets` would try for 23 s to reach a hub that is not there.
    """
    from huggingface_hub import HfApi, errors

    nothing_here = f"{path}: no such file or directory (looked in {Path.cwd()})"
    try:
        return str(HfApi().dataset_info(path, timeout=_PATIENCE_S).sha)
    except errors.RepositoryNotFoundError:
        hint = "a private one needs `hf auth login`"
        raise DataError(f"{nothing_here}, and no such dataset on the hub; {hint}") from None
    except errors.HfHubHTTPError as error:
        raise DataError(f"{path}: the hub answers: {one_line(error)}") from error
    except Exception as error:  # the errors of whichever HTTP client it uses
        raise DataError(
            f"{nothing_here}, and the hub cannot be reached ({one_line(error, max_chars=120)}); set HF_HUB_OFFLINE=1 "
            "to use a dataset that was downloaded before"
        ) from error


def _numbered(data: Any, source: Source, skip: Skip) -> Rows:
    import datasets

    chosen = "/".join(part for part in (source.subset, source.split) if part is not None)
    path = f"{source.path}[{chosen}]" if chosen else source.path
    # All but the last of them by `datasets`, which does not say how many there were.
    passed = skip.left - 1
    if isinstance(data, datasets.Dataset):
        passed = min(passed, len(data) - 1)
    if passed > 0:
        data = data.skip(skip.over(passed))
    for number, row in enumerate(data, max(passed, 0) + 1):
        if not skip.over(1):
            yield Location(path, number, "row"), row


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Raises DataError for what `datasets` raises, which has many roots."""
    try:
        yield
    except SftxError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
