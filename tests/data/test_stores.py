"""Data by an address: files, patterns and directories of a store are read as those of a disk, and copied once."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from sftx import DataError, stores
from sftx.config.loading import load
from sftx.config.options import Source
from sftx.data import sources
from sftx.errors import ConfigError, SftxError, redacted
from web_server import Web, serving

SIGNED = "X-Amz-Signature=0123456789abcdef0123456789abcdef&X-Amz-Expires=3600"


def line(text: str) -> bytes:
    return json.dumps({"prompt": text, "completion": "yes"}).encode() + b"\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "_DELAY_S", 0.0)
    stores.refresh()


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    for name, content in (("a.jsonl", line("a")), ("more/b.jsonl.gz", gzip.compress(line("b"))), ("notes.md", b"-")):
        files.pipe_file(f"/bucket/rows/{name}", content)
    yield files
    files.rm("/bucket", recursive=True)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "rows.jsonl").write_bytes(line("a"))
    with serving(tmp_path / "web") as web:
        yield web


def prompts(address: str) -> list[str]:
    return [row["prompt"] for _, row in sources.read(Source(address))]


@pytest.mark.usefixtures("memory")
def test_files_patterns_and_directories_are_read_and_rows_are_named_by_address() -> None:
    rows = "memory://bucket/rows"
    found = {
        address: [str(where) for where, _ in sources.read(Source(address))]
        for address in (f"{rows}/a.jsonl", f"{rows}/*.jsonl", f"{rows}/**/*.gz", rows, f"{rows}/")
    }
    both = [f"{rows}/a.jsonl:1", f"{rows}/more/b.jsonl.gz:1"]
    assert list(found.values()) == [both[:1], both[:1], both[1:], both, both]
    assert prompts(rows) == ["a", "b"]
    assert (
        Source(f"{rows}/a.jsonl")
        == load(None, assignments=[("data.train", [f"{rows}/a.jsonl"], "--data")]).config.data.train[0]
    )


def test_the_fingerprint_of_a_file_is_that_of_its_bytes_wherever_it_is(
    memory: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("a"))
    here, there = Source(str(tmp_path / "a.jsonl")), Source("memory://bucket/rows/a.jsonl")
    before = sources.fingerprint(there), sources.glance(there)
    assert before[0] == sources.fingerprint(here)
    memory.pipe_file("/bucket/rows/a.jsonl", line("c"))
    assert (sources.fingerprint(there), sources.glance(there)) == before, "one run sees one content"
    stores.refresh()
    assert sources.fingerprint(there) != before[0]
    assert sources.glance(there) != before[1]
    assert prompts(there.path) == ["c"]


def test_a_copy_is_made_once_until_the_file_changes(web: Web, tmp_path: Path) -> None:
    address = f"{web.address}/rows.jsonl"
    for _ in range(2):
        stores.refresh()
        assert prompts(address) == ["a"]
    assert web.num_downloads("rows.jsonl") == 1
    (tmp_path / "web" / "rows.jsonl").write_bytes(line("z"))
    stores.refresh()
    assert prompts(address) == ["z"]
    assert web.num_downloads("rows.jsonl") == 2


def test_one_process_of_a_host_copies_and_the_others_wait_for_it(web: Web) -> None:
    code = f"from sftx import stores; print(stores.fetch({web.address + '/rows.jsonl'!r}).read_text())"
    started = [subprocess.Popen([sys.executable, "-c", code], env=os.environ, stdout=subprocess.PIPE) for _ in range(2)]
    assert [json.loads(process.communicate(timeout=60)[0])["prompt"] for process in started] == ["a"] * 2
    assert web.num_downloads("rows.jsonl") == 1


def test_of_a_stream_a_file_is_copied_when_its_turn_comes(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/bucket/rows/c.jsonl", line("c"))
    source = Source("memory://bucket/rows/*.jsonl")
    rows = sources.read(source, streaming=True)
    assert next(rows)[1]["prompt"] == "a"
    copies = stores.copies_of(source.path)
    assert [path.name for path in copies.iterdir()] == ["a.jsonl"]
    assert [row["prompt"] for _, row in rows] == ["c"]


def test_a_copy_is_removed_when_the_store_has_the_file_no_longer(memory: fsspec.AbstractFileSystem) -> None:
    assert prompts("memory://bucket/rows") == ["a", "b"]
    memory.rm_file("/bucket/rows/a.jsonl")
    stores.refresh()
    assert prompts("memory://bucket/rows") == ["b"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("memory://bucket/none.jsonl", "memory://bucket/none.jsonl: no such file or directory in the store"),
        ("memory://bucket/*.none", "no file matches this pattern"),
        ("memory://bucket/rows/notes.md", "no file of rows is there, but memory://bucket/rows/notes.md; known are"),
        ("s4://bucket/rows.jsonl", "nothing here reads s4://; s3, gs, abfs, hf, https and others"),
        ("oci://bucket/rows.jsonl", "oci:// needs ocifs; pip install ocifs"),
        ("gs://bucket/rows.jsonl", "gs:// needs gcsfs; pip install 'sftx[gcs]'"),
        ("http://127.0.0.1:9/rows.jsonl", "no such file or directory in the store (Cannot connect to host 127.0.0.1:9"),
    ],
)
@pytest.mark.usefixtures("memory")
def test_what_is_not_there_is_said_in_one_line(address: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        prompts(address)
    assert str(caught.value).startswith(address)
    assert said in str(caught.value)


def test_a_file_that_arrives_in_part_is_no_copy(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(self: object, path: str, to: str, **kwargs: object) -> None:
        Path(to).write_bytes(line("a")[:7])

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", torn)
        with pytest.raises(DataError, match=r"cannot be read: OSError: 7 of 37 bytes came"):
            prompts("memory://bucket/rows/a.jsonl")
    assert not any(stores.copies_of("memory://bucket/rows/a.jsonl").iterdir())
    assert prompts("memory://bucket/rows/a.jsonl") == ["a"]


# --- secrets ------------------------------------------------------------------------------------


def test_a_signed_address_is_read_and_never_shown(web: Web) -> None:
    loaded = load(None, assignments=[("data.train", [f"{web.address}/rows.jsonl?{SIGNED}"], "--data")])
    (source,) = loaded.config.data.train
    assert source.path == f"{web.address}/rows.jsonl?***"
    assert [str(where) for where, _ in sources.read(source)] == [f"{web.address}/rows.jsonl?***:1"]
    assert "0123456789abcdef" not in redacted(f"403 for http://h/rows.jsonl?{SIGNED}")
    later = SIGNED.replace("0123", "4567")
    again = load(None, assignments=[("data.train", [f"{web.address}/rows.jsonl?{later}"], "--data")])
    assert again.config.data.train == (source,), "another signature of the same file is no other source"


def test_what_was_masked_cannot_be_read() -> None:
    with pytest.raises(DataError, match="its secret was masked when the run file was written; give the whole address"):
        prompts("https://elsewhere.example/rows.jsonl?***")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://h/rows.jsonl?version=2&download=true", None),
        ("https://h/rows.jsonl?sv=1&sig=abc%2B", "https://h/rows.jsonl?***"),
        ("https://h/rows.jsonl?x=0123456789abcdef", "https://h/rows.jsonl?***"),
        ("sftp://me:hunter2@h/rows.jsonl", "sftp://me:***@h/rows.jsonl"),
        ("abfs://container@account.dfs.core.windows.net/rows", None),
        ("s3://bucket/part-?.jsonl", None),
        ("data/rows.jsonl", None),
        ("owner/name", None),
    ],
)
def test_a_secret_is_masked_and_other_queries_are_not(address: str, shown: str | None) -> None:
    assert stores.mask(address) == (shown or address)
    assert stores.mask(stores.mask(address)) == (shown or address)


def test_addresses_that_would_look_the_same_are_refused() -> None:
    given = [f"https://h/download?id={n}&token=abc" for n in (1, 2)]
    with pytest.raises(ConfigError, match=r"https://h/download\?\*\*\* is there twice"):
        load(None, assignments=[("data.train", given, "--data")])


@pytest.mark.parametrize(
    ("option", "address", "said"),
    [
        ("upload_to", "runs/x", "an address in a store, such as s3://bucket/runs/x"),
        ("upload_to", "https://h/runs", "a place that can be written to"),
        ("output_dir", "sftp://me:hunter2@h/x", "without a password"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_with_the_options(option: str, address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load(None, assignments=[(option, address, f"--{option}")])
    assert "hunter2" not in str(caught.value)


def test_a_plugin_reads_its_own_addresses() -> None:
    """What looks like an address of a store is the plugin's when it has that scheme."""
    with pytest.raises(SftxError, match="nothing here reads chats://"):
        stores.find("chats://all")
