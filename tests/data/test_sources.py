"""Sources yield records with their locations, or raise an error of one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sftx
from row_files import TEXT, error_of, rows, write
from sftx import ConfigError, DataError
from sftx.config.options import DataConfig, RunConfig, Source
from sftx.data import readers, sources


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- files --------------------------------------------------------------------------------------


def test_an_unreadable_path_is_reported() -> None:
    assert error_of("none.jsonl") == f"none.jsonl: no such file (looked in {Path.cwd()})"
    assert error_of("/none/none.jsonl") == "/none/none.jsonl: no such file"
    assert error_of("x.xlsx", "") == f"x.xlsx: unknown kind of file '.xlsx'; known are {readers.known()}"
    assert error_of("part-0", "") == f"part-0: has no suffix to tell how it is read; known are {readers.known()}"
    assert error_of("x.parquet.gz", "").startswith("x.parquet.gz: unknown kind of file '.gz'; known are .jsonl, ")
    assert error_of("sftx:demo/none.jsonl") == "sftx:demo/none.jsonl: no such file"
    assert error_of("a\0b.jsonl").startswith("a\0b.jsonl: ")
    assert error_of("x" * 300 + ".jsonl").startswith("x" * 300 + ".jsonl: cannot be read: ")
    Path("dangling.jsonl").symlink_to("nowhere.jsonl")
    assert error_of("dangling.jsonl") == "dangling.jsonl: is a link to nowhere.jsonl, which is not there"
    Path("loop.jsonl").symlink_to("loop.jsonl")
    assert error_of("loop.jsonl") == "loop.jsonl: is a link that leads back to itself"
    os.mkfifo("pipe.jsonl")  # opening it would block forever
    assert error_of("pipe.jsonl") == "pipe.jsonl: is no regular file"


@pytest.mark.parametrize("weight", ["nan", "-1", "inf", "1e300", "abc", ""])
def test_what_is_no_weight_is_named_when_the_file_is_there(weight: str) -> None:
    write("x.jsonl", "{}")
    known = f"x.jsonl is there, and {weight!r} is no weight from 0 to 1000, such as 2"
    assert error_of(f"x.jsonl:{weight}") == f"x.jsonl:{weight}: no such file; {known}"


def test_a_file_that_two_sources_read_alike_is_named(caplog: pytest.LogCaptureFixture) -> None:
    write("x.jsonl", "{}")
    Path("d").mkdir()
    write("d/y.jsonl", "{}")

    def warned(*train: Source) -> list[str]:
        caplog.clear()
        sources.check_data_config(RunConfig(data=DataConfig(train=train)))
        return [record.message for record in caplog.records]

    for again in ("x.jsonl", "./x.jsonl", "*.jsonl"):
        (message,) = warned(Source("x.jsonl"), Source("d"), Source(again, weight=2))
        assert message.startswith(f"{again}: ")
        assert "/x.jsonl is in two of the sources" in message
    assert warned(Source("x.jsonl"), Source("d/y.jsonl")) == []
    assert warned(Source("x.jsonl"), Source("x.jsonl", columns={"prompt": "a"})) == [], "another task of the same rows"


def test_what_cannot_be_looked_at_is_told_from_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where pathlib takes both for the same, as it does from Python 3.14 on."""
    for name in ("exists", "is_dir", "is_file"):
        monkeypatch.setattr(Path, name, getattr(os.path, name.replace("_", "")))
    for name in ("x" * 300 + ".jsonl", "[" + "x" * 300):
        assert f"{name}: cannot be read: " in (said := error_of(name))
        assert "File name too long" in said
    assert error_of("none.jsonl").startswith("none.jsonl: no such file")
    stat = os.stat

    def no_permission(path: Any, **options: Any) -> os.stat_result:  # chmod does not stop a root user
        if str(path).startswith("closed/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", no_permission)
    assert "closed/a.jsonl: cannot be read: [Errno 13] Permission denied" in error_of("closed/a.jsonl")


def test_a_path_may_begin_with_the_home_directory_or_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write("x.jsonl", "{}")
    assert [str(where) for where, _ in sources.read(Source("~/x.jsonl"))] == ["~/x.jsonl:1"]
    assert sources.resolve("sftx:errors.py") == Path(sftx.__file__).with_name("errors.py")


def test_a_file_without_read_permission_is_reported_before_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    write("x.jsonl", "{}")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # chmod does not stop a root user
    with pytest.raises(DataError, match=r"^x\.jsonl: cannot be read: permission denied$"):
        sources.check(Source("x.jsonl"))


def test_a_directory_that_may_not_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("d").mkdir()
    write("d/a.jsonl", "{}")
    is_dir = Path.is_dir

    def no_permission(path: Path) -> bool:  # chmod does not stop a root user
        if path.name == "a.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", no_permission)
    with pytest.raises(DataError, match=r"^d: cannot be read: .*Permission denied"):
        sources.check(Source("d"))


def test_a_limit_stops_before_a_broken_row() -> None:
    write("x.jsonl", '{"a": 1}\n{"a": 2}\n{')
    assert [row for _, row in sources.read(Source("x.jsonl", limit=2))] == [{"a": 1}, {"a": 2}]


def test_a_text_file_is_one_document() -> None:
    assert rows("x.txt", f"{TEXT}\r\n\n") == [("x.txt:1", {"text": f"{TEXT}\r\n\n"})]
    assert error_of("y.txt", "\n") == "y.txt: holds no rows"


# --- directories --------------------------------------------------------------------------------


def folder(**files: str) -> None:
    for name, content in files.items():
        path = Path(name.replace("__", "/").replace("_DOT_", "."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def test_a_directory_is_its_files_in_the_order_of_their_paths() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder(
        d__b_DOT_jsonl='{"n": 2}\n',
        d__a_DOT_json='[{"n": 1}]',
        d__sub__c_DOT_csv="n\n3\n",
        d__README_DOT_md="#",
        d__dataset_infos_DOT_json="{}",
        d___DOT_hidden_DOT_jsonl="{",
        d___DOT_git__x_DOT_jsonl="{",
        d__empty_DOT_jsonl="",
    )
    pq.write_table(pa.table({"n": [4]}), "d/z.parquet")
    Path("d/sub/up").symlink_to("..")  # a loop
    expected = ["d/a.json:1", "d/b.jsonl:1", "d/sub/c.csv:2", "d/z.parquet row 1"]
    assert [str(where) for where, _ in sources.read(Source("d"))] == expected
    assert [str(where) for where, _ in sources.read(Source("d/"))] == expected
    assert [str(where) for where, _ in sources.read(Source("d", limit=2))] == expected[:2]
    assert sources.num_bytes(Source("d")) == sum(
        Path(name).stat().st_size for name in ("d/a.json", "d/b.jsonl", "d/sub/c.csv", "d/z.parquet")
    )


def test_a_pattern_is_the_files_that_match_it_in_the_order_of_their_paths() -> None:
    folder(
        d__b_DOT_jsonl='{"n": 2}\n',
        d__a_DOT_jsonl='{"n": 1}\n',
        d__sub__c_DOT_jsonl='{"n": 3}\n',
        d__sub__x_DOT_csv="n\n4\n",
        d__README_DOT_md="#",
        d___DOT_hidden_DOT_jsonl="{",
    )
    Path("d/sub/up").symlink_to("..")  # a loop

    def found(pattern: str) -> list[str]:
        return [str(where) for where, _ in sources.read(Source(pattern))]

    assert found("d/*.jsonl") == ["d/a.jsonl:1", "d/b.jsonl:1"]
    assert found("./d/[b-z].jsonl") == ["d/b.jsonl:1"]
    assert found(f"{Path.cwd()}/d/?.jsonl") == [f"{Path.cwd()}/d/a.jsonl:1", f"{Path.cwd()}/d/b.jsonl:1"]
    assert found("**/*.jsonl") == ["d/a.jsonl:1", "d/b.jsonl:1", "d/sub/c.jsonl:1"]
    assert found("d/*") == found("d") == ["d/a.jsonl:1", "d/b.jsonl:1", "d/sub/c.jsonl:1", "d/sub/x.csv:2"]
    assert sources.file_names(Source("d/*.jsonl")) == ["d/a.jsonl", "d/b.jsonl"]
    assert sources.file_names(Source("d/a.jsonl")) == []
    assert sources.num_bytes(Source("d/*.jsonl")) == 18
    write("d/[1].jsonl", '{"n": 5}')
    assert found("d/[1].jsonl") == ["d/[1].jsonl:1"]  # a file of that name comes before the pattern


def test_a_pattern_without_rows_is_reported(tmp_path: Path) -> None:
    assert error_of("d/*.jsonl") == f"d/*.jsonl: no file matches this pattern (looked in {Path.cwd()})"
    assert error_of(f"{tmp_path}/*.jsonl") == f"{tmp_path}/*.jsonl: no file matches this pattern"
    folder(d__a_DOT_md="", d__train_DOT_jsonl="{}", d__test_DOT_jsonl="{}")
    assert error_of("d/*.md") == (
        f"d/*.md: no file of rows matches this pattern, but d/a.md; known are {readers.known()}"
    )
    assert error_of("d/*.jsonl") == (
        "d/*.jsonl: holds several splits (d/test.jsonl, d/train.jsonl); name the files of one"
    )
    with pytest.raises(ConfigError, match=r"^d/t\*\.jsonl: names files, and split 'train' is for datasets"):
        sources.check(Source("d/t*.jsonl", split="train"))


def test_a_directory_without_rows_is_reported() -> None:
    Path("empty").mkdir()
    assert error_of("empty").startswith("empty: no file of rows is in this directory, which holds nothing; known are .")
    folder(d__a_DOT_md="", d__b_DOT_py="")
    assert "which holds a.md, b.py; known are" in error_of("d")
    folder(d__c_DOT_jsonl="\n")
    assert error_of("d") == "d: holds no rows"
    folder(d__c_DOT_jsonl='{"a": 1}\n{')
    assert error_of("d").startswith("d/c.jsonl:2: not valid JSON")
    Path("d/e.parquet").symlink_to("gone")  # a missing shard is an error
    assert error_of("d") == "d/e.parquet: is a link to gone, which is not there"


@pytest.mark.parametrize(
    "files",
    [
        {"d__train_DOT_jsonl": "{}", "d__test_DOT_jsonl": "{}"},
        {"d__data__train-00000-of-00001_DOT_jsonl": "{}", "d__data__validation-00000-of-00001_DOT_jsonl": "{}"},
        {"d__train__a_DOT_jsonl": "{}", "d__eval__a_DOT_jsonl": "{}"},
        {"d__train_DOT_jsonl": "{}", "d__held_out_DOT_jsonl": "{}"},
    ],
)
def test_a_directory_with_several_splits_is_refused(files: dict[str, str]) -> None:
    folder(**files)
    with pytest.raises(DataError, match=r"^d: holds several splits \(.*\); choose one with split: NAME"):
        sources.check(Source("d"))


def test_a_directory_of_shards_yields_the_chosen_split() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path("d/data").mkdir(parents=True)
    for split in ("train", "test"):
        for shard in range(2):
            path = f"d/data/{split}-0000{shard}-of-00002.parquet"
            pq.write_table(pa.table({"a": [f"{split} {shard}"]}), path)
    source = Source("d", split="test")
    sources.check(source)
    read = [(str(where), row["a"]) for where, row in sources.read(source)]
    assert read == [("d[test] row 1", "test 0"), ("d[test] row 2", "test 1")]
    with pytest.raises(DataError, match=r"^d: cannot be read: Bad split: tset\. Available splits: \['train', 'test'\]"):
        list(sources.read(Source("d", split="tset")))


def test_a_saved_dataset_is_read_with_its_splits(capfd: pytest.CaptureFixture[str]) -> None:
    from datasets import Dataset, DatasetDict
    from datasets.utils import logging

    logging.disable_progress_bar()
    try:
        records = [{"messages": [{"role": "user", "content": f"{TEXT} {n}"}]} for n in range(3)]
        dataset = Dataset.from_list(records)
        dataset.save_to_disk("one")
        DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk("dict")
    finally:
        logging.enable_progress_bar()
    assert [row for _, row in sources.read(Source("one"))] == records
    assert [row for _, row in sources.read(Source("dict"))] == records
    assert [(str(where), row) for where, row in sources.read(Source("dict", split="test"))] == [
        ("dict[test] row 1", records[2])
    ]
    with pytest.raises(DataError, match=r"^dict: no split 'tets'; did you mean 'test'\?"):
        list(sources.read(Source("dict", split="tets")))
    with pytest.raises(DataError, match=r"^one: is one saved split; leave split: test out"):
        list(sources.read(Source("one", split="test")))
    with pytest.raises(ConfigError, match=r"^one: is a saved dataset, which has no subsets; leave 'en' out"):
        list(sources.read(Source("one", subset="en")))
    assert sources.num_bytes(Source("one")) > 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("option", ["split", "subset"])
def test_a_file_has_no_splits(option: str) -> None:
    write("x.jsonl", "{}")
    with pytest.raises(ConfigError, match=rf"^x\.jsonl: is a file, and {option} 'a' is for datasets"):
        sources.check(Source("x.jsonl", **{option: "a"}))


# --- columns ------------------------------------------------------------------------------------


def mapped(record: dict[str, Any], **columns: str) -> dict[str, Any]:
    write("x.jsonl", json.dumps(record))
    ((where, row),) = sources.read(Source("x.jsonl"))
    row = dict(sources.mapped(row, columns, where))
    return dict(row)


def test_columns_give_fields_the_names_of_the_format() -> None:
    record = {"q": "Q", "qa": {"answer": {"text": "A"}}, "a.b": 1, "prompt": "not this", "none": None}
    assert mapped(record, prompt="q", completion="qa.answer.text") == {"prompt": "Q", "completion": "A"}
    assert mapped(record, x="a.b", y="none") == {"x": 1, "y": None}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("questoin", "no column 'questoin'; did you mean 'question'?"),
        ("zzz", "no column 'zzz'; there are question, qa, n"),
        ("qa.answr", "no column 'qa.answr'; did you mean 'answer'?"),
        ("n.x", "no column 'n.x'"),
    ],
)
def test_a_missing_column_is_reported_with_its_line(column: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        mapped({"question": "Q", "qa": {"answer": "A"}, "n": None}, prompt=column)
    assert str(caught.value) == f"x.jsonl:1: columns: {message}"


def test_a_column_that_some_rows_lack_is_reported_with_the_first_such_line() -> None:
    write("x.jsonl", '{"q": 1}\n{"q": 2}\n{"a": 3}\n')
    *others, (where, row) = sources.read(Source("x.jsonl"))
    assert [sources.mapped(row, {"prompt": "q"}, where) for where, row in others] == [{"prompt": 1}, {"prompt": 2}]
    with pytest.raises(DataError, match=r"^x\.jsonl:3: columns: no column 'q'; there are a$"):
        sources.mapped(row, {"prompt": "q"}, where)


# --- fingerprints -------------------------------------------------------------------------------


def test_the_fingerprint_of_a_file_alone_is_the_hash_of_its_bytes() -> None:
    write("x.jsonl", "abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sources.fingerprint(Source("x.jsonl")) == expected
    assert sources.fingerprint(Source("x.jsonl", weight=2, format="messages")) == expected


def test_a_fingerprint_changes_when_the_rows_change() -> None:
    folder(d__a_DOT_jsonl='{"a": 1}', d__b_DOT_jsonl='{"a": 2}')
    seen = [
        sources.fingerprint(source)
        for source in (
            Source("d"),
            Source("d", limit=1),
            Source("d", columns={"b": "a"}),
            Source("d", split="train"),
            Source("d/a.jsonl", limit=1),
        )
    ]
    assert sources.fingerprint(Source("d/")) == seen[0]
    folder(d__a_DOT_jsonl='{"a": 3}')
    seen.append(sources.fingerprint(Source("d")))
    Path("d/b.jsonl").rename("d/c.jsonl")
    seen.append(sources.fingerprint(Source("d")))
    folder(d__unread_DOT_md="x", d___DOT_hidden_DOT_jsonl="x")
    assert sources.fingerprint(Source("d")) == seen[-1]
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_of_a_pattern_changes_when_the_files_do() -> None:
    folder(d__a_DOT_jsonl='{"a": 1}', d__b_DOT_jsonl='{"a": 2}')
    first = sources.fingerprint(Source("d/*.jsonl"))
    folder(elsewhere__d__a_DOT_jsonl='{"a": 1}', elsewhere__d__b_DOT_jsonl='{"a": 2}')
    assert sources.fingerprint(Source(f"{Path.cwd()}/elsewhere/d/*.jsonl")) == first, "or data could not be moved"
    folder(d__c_DOT_jsonl='{"a": 1}')
    second = sources.fingerprint(Source("d/*.jsonl"))
    Path("d/c.jsonl").rename("d/e.jsonl")
    third = sources.fingerprint(Source("d/*.jsonl"))
    fourth = sources.fingerprint(Source("d/*.jsonl", encoding="cp1252"))
    assert len({first, second, third, fourth}) == 4


@pytest.mark.parametrize("name", ["./owner/name", "a/b/c", "owner/name.jsonl", "name", "/owner/name"])
def test_a_path_that_cannot_be_a_hub_id_is_a_missing_file(name: str) -> None:
    with pytest.raises(DataError, match=r": no such file"):
        sources.check(Source(name))


# --- memory -------------------------------------------------------------------------------------

MEASURE = """
import sys
import pyarrow.parquet
from sftx.config.options import DataConfig, RunConfig, Source
from sftx.data import sources

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

start = peak = resident_mib()
num_rows = 0
for where, row in sources.read(Source(sys.argv[1])):
    num_rows += 1
    if num_rows % 1000 == 1:
        peak = max(peak, resident_mib())
print(num_rows, peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow"])
def test_a_file_of_200_mb_is_read_in_little_memory(name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_rows, num_repeats = 1000, 100
    records = [{"prompt": os.urandom(500).hex(), "completion": os.urandom(500).hex()} for _ in range(num_rows)]
    lines = [json.dumps(record) for record in records]
    with Path(name).open("wb") as file:
        if name == "x.jsonl":
            file.writelines(["".join(line + "\n" for line in lines).encode()] * num_repeats)
        elif name == "x.json":  # all of it on one line
            file.writelines([b"[", *["".join(line + ", " for line in lines).encode()] * num_repeats, b"]"])
        elif name == "x.csv":
            file.write(b"prompt,completion\n")
            file.writelines(["".join(",".join(r.values()) + "\n" for r in records).encode()] * num_repeats)
        else:
            table = pa.concat_tables([pa.Table.from_pylist(records)] * num_repeats).combine_chunks()
            if name == "x.parquet":  # one row group is the worst case
                pq.write_table(table, file, use_dictionary=False, compression="none", row_group_size=len(table))
            else:
                with pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table, max_chunksize=1000)
    assert Path(name).stat().st_size > 195e6
    # Arrow's own allocator does not return freed memory to the system, so that the measurement needs the system's.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    read, growth_mib = done.stdout.split()
    Path(name).unlink()
    assert int(read) == num_rows * num_repeats
    assert float(growth_mib) < 50
