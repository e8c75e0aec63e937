"""Reading may start at any row of every kind of source, as a resumed run needs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftx.config.options import Source
from sftx.data import hub, readers, sources
from sftx.errors import DataError

NUM = 23
ROWS = [{"a": n, "b": f"row {n}"} for n in range(NUM)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format of the file's suffix, with blank lines, small row groups and small batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    match path.name.partition(".")[2]:
        case "jsonl" | "ndjson":
            path.write_text("\n".join(json.dumps(row) + "\n" * (row["a"] % 3) for row in rows))
        case "jsonl.gz":
            import gzip

            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        case "json":
            path.write_text(json.dumps(rows, indent=1))
        case "lines.json":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "csv":
            path.write_text("a,b\n" + "".join(f'{row["a"]},"{row["b"]}\n"\n' for row in rows))
        case "parquet":
            pq.write_table(table, path, row_group_size=5)
        case "one.parquet":
            pq.write_table(table, path)
        case "stream.arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=4)
        case "arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=4)


def check(source: Source, *, streaming: bool = False) -> list[Any]:
    """Check that reading from any row on yields the same rows and locations as reading all, and return all."""
    whole = list(sources.read(source, streaming=streaming))
    num = len(whole)
    assert num > 2
    for start in range(num + 1):
        assert list(sources.read(source, streaming=streaming, start=start)) == whole[start:]
    if source.limit is None:
        changed = (
            rf": holds fewer than the {num + 2} rows that were read of it before the run was resumed: it has changed"
        )
        with pytest.raises(DataError, match=changed):
            list(sources.read(source, streaming=streaming, start=num + 2))
    return whole


FILES = [
    "x.jsonl", "x.ndjson", "x.jsonl.gz", "x.json", "x.lines.json", "x.csv", "x.parquet", "x.one.parquet",
    "x.arrow", "x.stream.arrow",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_from_any_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_BATCH_ROWS", 3)
    path = tmp_path / name
    write(path, ROWS)
    assert len(check(Source(str(path)))) == NUM
    assert len(check(Source(str(path), limit=11))) == 11


def test_a_directory_of_several_kinds_is_read_from_any_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_BATCH_ROWS", 3)
    for name in FILES:
        write(tmp_path / name.replace("x.", f"{name[2:].replace('.', '-')}.", 1), ROWS)
    (tmp_path / "z.txt").write_text("one document")
    assert len(check(Source(str(tmp_path)))) == NUM * len(FILES) + 1
    assert len(check(Source(str(tmp_path), limit=2 * NUM))) == 2 * NUM


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.jsonl"])
def test_skipped_rows_are_not_decoded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / name, ROWS)
    made: list[Any] = []
    loads, decoder = readers._loads, readers._json_decoder
    monkeypatch.setattr(readers, "_loads", lambda text, where: made.append(text) or loads(text, where))
    monkeypatch.setattr(readers, "_json_decoder", lambda schema: lambda row: made.append(row) or decoder(schema)(row))
    assert len(list(sources.read(Source(str(tmp_path / name)), start=NUM - 2))) == len(made) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_from_any_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, streaming: bool) -> None:
    import datasets

    datasets.disable_progress_bars()
    try:
        data = datasets.Dataset.from_list(ROWS)
        data.save_to_disk(str(tmp_path / "saved"))
        check(Source(str(tmp_path / "saved")))

        (tmp_path / "data").mkdir()
        data.to_parquet(str(tmp_path / "data/train-00000-of-00001.parquet"), batch_size=5)
        check(Source(str(tmp_path / "data"), split="train"))

        load = datasets.load_dataset
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(hub, "find_commit", lambda path: "abc")
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda path, name, *, split, streaming, revision: load(
                "data", name, split=split, streaming=streaming, cache_dir="cache"
            ),
        )
        check(Source("owner/name"), streaming=streaming)
    finally:
        datasets.enable_progress_bars()
