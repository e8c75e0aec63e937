"""Addresses that source plugins read: they stand wherever a path of data may stand, and work as files do."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sftx.assembly import registry
from sftx.assembly.registry import Assembly
from sftx.assembly.stages.data_stages import RowSourceStage
from sftx.cli import main
from sftx.config import loading
from sftx.config.options import DataConfig, RunConfig, Source
from sftx.data import preprocess, sources
from sftx.data.held_out import choose
from sftx.errors import ConfigError, DataError, PluginError
from sftx.types import Location


def write_database(path: str, num: int = 12, table: str = "chats") -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, prompt, completion, extra)")
        rows = [
            (7 * n, f"Count to {n}", "" if n == 4 else "one two three"[: 3 + n % 10], None) for n in range(1, num + 1)
        ]
        database.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", rows)
        database.commit()


@pytest.fixture(autouse=True)
def _in_a_directory_with_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    write_database("chats.db")


def assembly(*data: str, add: tuple[str, ...] = (), remove: tuple[str, ...] = (), **options: Any) -> Assembly:
    given = [("data.train", list(data), "--data")]
    given += [(name.replace("__", "."), value, name) for name, value in options.items()]
    return registry.activate(loading.load(None, add=["chatml", *add], remove=remove, assignments=given))


def sftx(command: str, *more: str) -> Result:
    return CliRunner().invoke(main, [*command.split(), *more])


def run(*more: str, code: int = 0, out: str = "out") -> str:
    arguments = "run --model sftx:tiny --plugin chatml --plugin lora --use-cpu --max-steps 4 --max-dropped 0.2"
    done = sftx(f"{arguments} --output-dir {out}", *more)
    assert done.exit_code == code, done.output
    return done.output


# --- which plugin -------------------------------------------------------------------------------


def test_the_built_in_plugin_is_added_by_its_scheme_alone() -> None:
    assert [a.info.name for a in assembly("sqlite:chats.db").providers("sftx_source")] == ["sqlite"]
    assert assembly("chats.jsonl").providers("sftx_source") == []
    assert assembly("sqlite:chats.db", remove=("sqlite",)).row_sources == {}
    options = {"sqlite__json_columns": ["extra"]}
    assert assembly("sqlite:chats.db", **options).resolved(RunConfig())["plugins"]["sqlite"] == {
        "json_columns": ["extra"]
    }
    with pytest.raises(ConfigError, match=r"plugin 'sqlite' is not in this run; add --plugin sqlite"):
        assembly("chats.jsonl", **options)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sqlit:chats.db", "no plugin of this run reads sqlit:...; did you mean 'sqlite'? A source plugin is added"),
        ("mail:inbox", "no plugin of this run reads mail:...; known is sqlite. A source plugin is added with --plugin"),
        ("mail:SELECT * FROM a WHERE b?", "no plugin of this run reads mail:..."),
        ("acme:x", "no plugin of this run reads acme:...; add --plugin acme"),
        ("other:x", "installed: acme"),
        ("chats:x", "no such file; chats is there, and 'x' is no weight from 0 to 1000"),
        ("rows.jsonl:x", "rows.jsonl:x: no such file"),
        ("c:x", "c:x: no such file"),
    ],
)
def test_an_unknown_scheme_is_named_with_the_known_ones(install_plugin: Any, path: str, message: str) -> None:
    install_plugin("acme", "class Acme: ...", {"acme": "Acme"})
    Path("chats").mkdir()
    with pytest.raises(DataError) as caught:
        sources.check(Source(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_whose_name_has_a_colon_is_a_file() -> None:
    Path("sqlite:chats.jsonl").write_text('{"text": "a"}\n')
    Path("data:1.jsonl").write_text('{"text": "b"}\n')
    row_sources = assembly("sqlite:chats.db").row_sources
    for path, text in (("sqlite:chats.jsonl", "a"), ("data:1.jsonl", "b"), ("data:*.jsonl", "b")):
        assert [row for _, row in sources.read(Source(path), row_sources)] == [{"text": text}]
    assert sources.file_names(Source("data:*.jsonl"), row_sources) == ["data:1.jsonl"]


def test_two_plugins_of_one_scheme_and_a_plugin_without_data_are_named(
    install_plugin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        "from dataclasses import dataclass\nimport sftx\n"
        "@dataclass(frozen=True, eq=False)\nclass Acme:\n"
        "    scheme = 'sqlite'\n"
        "    @sftx.hookimpl\n    def sftx_source(self): return self\n"
        "    def check(self, address): ...\n    def rows(self, address, start): ...\n"
        "    def fingerprint(self, address): ...\n"
    )
    install_plugin("acme", code, {"acme": "Acme"})
    with pytest.raises(
        PluginError, match=r"'acme' \(acme 1.0\) and plugin 'sqlite' .* both read sqlite:\.\.\.; leave one"
    ):
        assembly("sqlite:chats.db", add=("acme",)).row_sources  # noqa: B018
    Path("a.jsonl").write_text('{"text": "a"}\n')
    config = RunConfig(data=DataConfig(train=(Source("a.jsonl"),)))
    with caplog.at_level(logging.WARNING):
        sources.check_data_config(config, assembly("a.jsonl", add=("sqlite",)).row_sources)
    ours = version("sftx")
    assert f"plugin 'sqlite' (sftx {ours}) reads sqlite:..., and no path of the data begins so" in caplog.text


@pytest.mark.parametrize(
    ("option", "value"), [("split", "x"), ("subset", "x"), ("encoding", "cp1252"), ("delimiter", ";")]
)
def test_options_of_files_and_datasets_are_refused(option: str, value: str) -> None:
    source = Source("sqlite:chats.db", **{option: value})
    with pytest.raises(
        ConfigError, match=rf"sqlite:chats.db: is read by plugin 'sqlite' .*, which has no {option}; leave"
    ):
        sources.check(source, assembly("sqlite:chats.db").row_sources)


# --- what a source returns ----------------------------------------------------------------------


class Rows:
    """Yields what it is told to."""

    scheme = "rows"

    def __init__(self, rows: list[Any], fingerprint: Any = "same") -> None:
        self._rows, self._fingerprint = rows, fingerprint

    def check(self, address: str) -> None: ...

    def rows(self, address: str, start: int) -> Iterator[Any]:
        return iter(self._rows[start:])

    def fingerprint(self, address: str) -> Any:
        return self._fingerprint


def stage(rows: list[Any], fingerprint: Any = "same") -> dict[str, RowSourceStage]:
    return {"rows": RowSourceStage("plugin 'rows'", Rows(rows, fingerprint))}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1}, "rows gave {'a': 1} after x:1, expected a pair of a Location and a row"),
        (("x:2", {"a": 1}), "rows gave ('x:2', {'a': 1}) after x:1, expected a pair"),
        ((Location("x", 2, "reason"), {"a": 1}), "after x:1, expected a pair of a Location"),
        ((Location("x", 2**63), {"a": 1}), "after x:1, expected a pair of a Location"),
        ((Location("x", 2), [1]), "x:2: the row is of type list, expected a dict"),
        (
            (Location("x", 2), {"a": {"b": [1, b"2"]}}),
            "x:2: the row['a']['b'][1] is of type bytes, which is no JSON value",
        ),
        ((Location("x", 2), {"a": float("nan")}), "x:2: the row['a'] is nan, which is no JSON value"),
        ((Location("x", 2), {"a": {1: 2}}), "x:2: the row['a'] has the key 1, which is no JSON value"),
        ((Location("x", 2), {"a": (1,)}), "x:2: the row['a'] is of type tuple, which is no JSON value"),
    ],
)
def test_a_row_that_is_none_is_refused_with_plugin_and_place(row: Any, message: str) -> None:
    given = stage([(Location("x", 1), {"a": 0}), row])
    with pytest.raises(PluginError) as caught:
        list(sources.read(Source("rows:x"), given))
    assert str(caught.value).startswith("plugin 'rows': ")
    assert message in str(caught.value)


def test_every_json_value_passes_and_its_place_is_in_the_ledger() -> None:
    record = {"a": [None, True, 1, -0.5, "ü", {"b": []}], "c": {}}
    where = Location("x[y]", -3, "rowid")
    assert list(sources.read(Source("rows:x"), stage([(where, record)]))) == [(where, record)]
    from sftx.data.ledger import Entry

    entry = Entry(where, "dropped", "why", 1, 0)
    assert entry.as_dict()["rowid"] == -3
    assert Entry.of(json.loads(json.dumps(entry.as_dict()))) == entry


def test_rows_that_a_resumed_run_misses_are_found() -> None:
    given = stage([(Location("x", n), {"n": n}) for n in (1, 2, 3)])
    source = Source("rows:x")
    assert [row["n"] for _, row in sources.read(source, given, start=1)] == [2, 3]
    assert list(sources.read(source, given, start=3)) == []
    with pytest.raises(DataError, match=r"rows:x: holds fewer than the 4 rows that were read of it before"):
        list(sources.read(source, given, start=4))
    with pytest.raises(DataError, match="rows:x: holds no rows"):
        list(sources.read(source, stage([])))


def test_a_source_that_cannot_tell_whether_rows_change_is_never_cached_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from sftx.data.pipeline import build_pipeline

    given = assembly("sqlite:chats.db")
    data = DataConfig(train=(Source("rows:x"),), cache=True)
    pipeline = build_pipeline(RunConfig(model="sftx:tiny", data=data), given, loading.run_file.Origins())
    rows = [(Location("x", n), {"prompt": f"{n}?", "completion": "yes"}) for n in range(3)]
    for fingerprint, is_cached in (("1", True), (None, False)):
        caplog.clear()
        shutil.rmtree("cache", ignore_errors=True)
        made = stage(rows, fingerprint)
        for _ in range(2):
            found = preprocess.load_dataset(data.train, pipeline.encode, identity={}, row_sources=made)
            assert len(found.examples) == 3
        assert Path("cache/encoded").exists() == is_cached
        said = [line for line in caplog.messages if "cannot tell whether its rows change: they are not cached" in line]
        assert len(said) == (not is_cached)
        assert sources.fingerprint(data.train[0], made) is None or is_cached


# --- as files do --------------------------------------------------------------------------------


def test_a_run_reads_its_rows_and_the_ledger_names_them() -> None:
    write_database("held.db", 3)
    source = {
        "path": "sqlite:chats.db",
        "weight": 2,
        "columns": {"prompt": "completion", "completion": "prompt"},
        "limit": 5,
    }
    Path("run.yaml").write_text(json.dumps({"data": {"train": [source], "eval": "sqlite:held.db?table=chats"}}))
    run("run.yaml", "--plugin", "exact-match")
    ledger = [json.loads(line) for line in Path("out/ledger.jsonl").read_text().splitlines()]
    assert ledger == []
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["data"][0]["path"] == "sqlite:chats.db"
    shown = sftx("data export", "--data", "sqlite:chats.db", "--output", "-", "--max-dropped", "0.2")
    assert shown.exit_code == 0, shown.output
    assert "1 of 12 rows dropped: " in shown.stderr
    assert "(first: chats.db[chats] rowid 28)" in shown.stderr
    run("--data", "sqlite:chats.db:2", out="other")
    (entry,) = (json.loads(line) for line in Path("other/ledger.jsonl").read_text().splitlines())
    assert (entry["where"], entry["source"], entry["rowid"]) == ("chats.db[chats] rowid 28", "chats.db[chats]", 28)
    other = json.loads(Path("other/manifest.json").read_text())
    assert len({manifest["data"][0]["fingerprint"], other["data"][0]["fingerprint"]}) == 2
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["held_out"]["after"]["exact-match"] >= 0


def test_the_same_address_is_not_trained_on_and_held_out_but_another_table_is() -> None:
    write_database("chats.db", 3, "other")
    table = "sqlite:chats.db?table="
    said = run("--data", f"{table}chats", "--eval-data", f"{table}chats", code=1)
    assert f"{table}chats: is both training data and held-out data" in said
    run("--data", f"{table}chats", "--eval-data", f"{table}other", "--max-overlap", "1")


def test_rows_are_held_out_of_a_database_as_of_a_file_with_the_same_rows() -> None:
    rows = [row for _, row in sources.read(Source("sqlite:chats.db"), assembly("sqlite:chats.db").row_sources)]
    Path("same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        choose(config.train, config, made.parsers(), made.row_sources)
        for path in ("sqlite:chats.db", "same.jsonl")
        for config in [DataConfig(train=(Source(path),), eval_fraction=0.3)]
        for made in [assembly(path)]
    ]
    assert found[0] == found[1] != frozenset()


def test_a_resumed_run_finds_another_content_and_other_options() -> None:
    data = ("--data", "sqlite:chats.db")
    run(*data, "--save-steps", "2")
    Path("out/summary.json").unlink()
    said = run(*data, "--save-steps", "2", "--set", "sqlite.json_columns=[extra]", "--resume", code=1)
    assert "sqlite.json_columns" in said
    with closing(sqlite3.connect("chats.db")) as database:
        database.execute("UPDATE chats SET prompt = 'Count to 99' WHERE id = 7")
        database.commit()
    assert "was begun with another content of data" in run(*data, "--save-steps", "2", "--resume", code=1)


def test_the_default_name_of_a_run_is_that_of_the_database() -> None:
    loaded = loading.load(None, assignments=[("data.train", ["sqlite:a/chats.db?query=SELECT x/y FROM t"], "--data")])
    assert loading.default_name(None, loaded.config) == "chats"
    assert loaded.config.data.train[0].weight == 1
