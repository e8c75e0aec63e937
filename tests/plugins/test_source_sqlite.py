"""Rows from SQLite databases: tables and queries in an order, values, and databases that are in use or broken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sftx import DataError
from sftx.testing import check_source
from sftx_plugins.sources.sqlite import Databases, SQLite

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(*statements: str, file: str = "chats.db") -> None:
    with closing(sqlite3.connect(file)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


def rows(address: str, start: int = 0, *, json_columns: tuple[str, ...] | None = None) -> list[tuple[str, Any]]:
    source = SQLite(json_columns).sftx_source()
    return [(str(where), record) for where, record in source.rows(address, start)]


def error_of(address: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        rows(address, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files() -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path().iterdir()}


# --- tables and queries -------------------------------------------------------------------------


def test_a_table_is_read_by_rowid_and_its_rows_are_named_by_it() -> None:
    write("CREATE TABLE t (text)", "INSERT INTO t (rowid, text) VALUES (9, 'c'), (-2, 'a'), (5, 'b')")
    expected = [(f"chats.db[t] rowid {n}", {"text": text}) for n, text in ((-2, "a"), (5, "b"), (9, "c"))]
    for address in ("chats.db", "chats.db?table=t", "chats.db?table=T"):
        assert rows(address) == expected
        assert [rows(address, start) for start in range(5)] == [expected[start:] for start in range(5)]


def test_a_table_without_rowid_is_read_by_its_primary_key() -> None:
    write("CREATE TABLE t (b TEXT, a INT, PRIMARY KEY (a, b)) WITHOUT ROWID", "INSERT INTO t VALUES ('y', 2), ('z', 1)")
    assert rows("chats.db") == [("chats.db[t] row 1", {"b": "z", "a": 1}), ("chats.db[t] row 2", {"b": "y", "a": 2})]
    assert rows("chats.db", 1) == rows("chats.db")[1:]


@pytest.mark.parametrize("columns", ["rowid TEXT", "rowid TEXT, _rowid_ TEXT", "ROWID TEXT, oid TEXT"])
def test_a_column_that_is_called_as_the_rowid_is_a_column(columns: str) -> None:
    values = ", ".join(["'z'"] * (columns.count(",") + 1))
    write(f"CREATE TABLE t ({columns})", f"INSERT INTO t VALUES ({values})", "INSERT INTO t DEFAULT VALUES")
    assert [name for name, _ in rows("chats.db")] == ["chats.db[t] rowid 1", "chats.db[t] rowid 2"]
    assert set(rows("chats.db")[0][1].values()) == {"z"}


def test_names_of_tables_and_columns_are_any_text() -> None:
    write("""CREATE TABLE "a ""b"" &?=ü" ("x y" TEXT)""", """INSERT INTO "a ""b"" &?=ü" VALUES ('v')""")
    assert rows('chats.db?table=a "b" &?=ü') == [('chats.db[a "b" &?=ü] rowid 1', {"x y": "v"})]


def test_a_query_is_read_in_its_order_and_a_long_one_is_cut_in_names() -> None:
    write("CREATE TABLE t (n INT)", "INSERT INTO t VALUES (1), (2), (3)")
    query = "SELECT n AS text FROM t\n ORDER BY n DESC; "
    expected = [(f"chats.db[SELECT n AS text FROM t ORDER BY n DESC] row {4 - n}", {"text": n}) for n in (3, 2, 1)]
    assert rows(f"chats.db?query= {query}") == expected
    assert rows(f"chats.db?query={query}", 2) == expected[2:]
    names = {
        rows(f"chats.db?query=SELECT n AS {'a' * 90} FROM t WHERE n = {n} ORDER BY n")[0][0].rpartition("] row")[0]
        for n in (1, 2)
    }
    assert len(names) == 2
    assert all(len(name) < 70 for name in names)


@pytest.mark.parametrize(
    "query",
    [
        "WITH big AS (SELECT n FROM t) SELECT n FROM big ORDER BY n",
        "select n from t order\tby n limit 2",
        "SELECT n FROM t -- ORDER BY below\nORDER /* x */ BY n",
        "SELECT n FROM (SELECT n FROM t) ORDER BY (SELECT max(n) FROM t), n",
    ],
)
def test_queries_with_an_order(query: str) -> None:
    write("CREATE TABLE t (n INT)", "INSERT INTO t VALUES (1), (2)")
    assert [row["n"] for _, row in rows(f"chats.db?query={query}")] == [1, 2]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT n FROM t",
        "SELECT 'order by' FROM t",
        "SELECT n FROM t -- order by n",
        "SELECT n FROM (SELECT n FROM t ORDER BY n)",
        'SELECT n AS "order by" FROM t',
        "SELECT row_number() OVER (ORDER BY n) FROM t",
    ],
)
def test_a_query_without_an_order_is_refused(query: str) -> None:
    write("CREATE TABLE t (n INT)")
    assert "has no ORDER BY, and a resumed run needs the same order" in error_of(f"chats.db?query={query}")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nope.db", "nope.db: no such file"),
        ("~nobody-at-all/chats.db", "~nobody-at-all/chats.db: cannot be read: "),
        (".", ".: is no regular file"),
        ("chats.db", "chats.db: holds the tables a, b; choose one, as in sqlite:chats.db?table=a"),
        ("chats.db?table=c", "chats.db: no table 'c'; it has a, b"),
        (
            "chats.db?table=v",
            "'v' is a view, whose rows have no order; give one: sqlite:chats.db?query=SELECT * FROM v",
        ),
        ("chats.db?tabel=a", "?tabel= is not known; write ?table=NAME, or ?query=SELECT"),
        ("chats.db?table=", "nothing follows ?table="),
        ("chats.db?query=DROP TABLE a ORDER BY 1", "does not begin with SELECT or WITH; it may only read"),
        ("chats.db?query=SELECT z FROM a ORDER BY 1", "chats.db[SELECT z FROM a ORDER BY 1]: no such column: z"),
        ("chats.db?query=SELECT n FROM a ORDER BY ?", "Incorrect number of bindings supplied"),
        ("chats.db?query=SELECT 1 FROM a; DELETE FROM a ORDER BY 1", "one statement at a time"),
        (
            "chats.db?query=SELECT a.n, b.n FROM a, b ORDER BY 1",
            "two columns are called 'n'; rename one of them with AS",
        ),
        ("empty.db", "empty.db: holds no table"),
        ("text.db", "text.db: cannot be read: file is not a database"),
        ("cut.db", "database disk image is malformed"),
    ],
)
def test_what_cannot_be_read_is_one_line(address: str, message: str) -> None:
    write("CREATE TABLE a (n)", "CREATE TABLE b (n)", "CREATE VIEW v AS SELECT n FROM a", "INSERT INTO a VALUES (1)")
    write("INSERT INTO b VALUES (1)")
    write("CREATE TABLE t (n)", f"INSERT INTO t VALUES ('{'x' * 50_000}')", file="cut.db")
    Path("cut.db").write_bytes(Path("cut.db").read_bytes()[:9000])
    Path("empty.db").touch()
    Path("text.db").write_text("no database, but a text that is long enough to be one")
    before = files()
    assert message in error_of(address)
    assert files() == before


def test_a_query_cannot_write_a_file() -> None:
    write("CREATE TABLE t (n)")
    with closing(sqlite3.connect("other.db")):
        before = files()
    source = Databases(None)
    with source._opened("chats.db") as (_, database):
        for statement in ("ATTACH 'new.db' AS x", "DELETE FROM t", "CREATE TABLE u (n)", "VACUUM INTO 'copy.db'"):
            with pytest.raises(sqlite3.Error):
                database.execute(statement)
    assert files() == before


# --- values -------------------------------------------------------------------------------------


def test_json_is_decoded_in_the_columns_that_hold_it() -> None:
    write(
        "CREATE TABLE t (messages TEXT, tools, meta JSON, prompt TEXT, history TEXT)",
        f"""INSERT INTO t VALUES ('{json.dumps(CHAT)}', NULL, ' {{"a": null}}', '[1]', 'plain text')""",
    )
    whole = {"messages": CHAT, "tools": None, "meta": {"a": None}, "prompt": "[1]", "history": "plain text"}
    assert rows("chats.db")[0][1] == whole
    texts = {"messages": json.dumps(CHAT), "meta": ' {"a": null}'}
    assert rows("chats.db", json_columns=())[0][1] == whole | texts
    assert rows("chats.db", json_columns=("prompt",))[0][1] == whole | texts | {"prompt": [1]}
    query = "chats.db?query=SELECT messages, meta FROM t ORDER BY rowid"  # does not know what is declared
    assert rows(query)[0][1] == {"messages": CHAT, "meta": ' {"a": null}'}


@pytest.mark.parametrize("text", ["[1", '{"a": }', "[" * 100_000])
def test_wrong_json_is_named_with_row_and_column(text: str) -> None:
    write("CREATE TABLE t (messages TEXT)", f"INSERT INTO t VALUES (NULL), ('{text}')")
    message = error_of("chats.db")
    assert message.startswith("chats.db[t] rowid 2: column 'messages' is not valid JSON: ")
    assert message.endswith("; if it is plain text, leave it out of sqlite.json_columns")


def test_values_keep_their_types_and_bytes_are_refused() -> None:
    write("CREATE TABLE t (a, b, c, d)", "INSERT INTO t VALUES (9223372036854775807, 1.5, '2024-05-01', NULL)")
    assert rows("chats.db")[0][1] == {"a": 2**63 - 1, "b": 1.5, "c": "2024-05-01", "d": None}
    write("INSERT INTO t VALUES (1, 2, 3, x'00ff')")
    assert "chats.db[t] rowid 2: column 'd' holds bytes (a BLOB)" in error_of("chats.db")


def test_text_is_read_whatever_its_encoding_and_wrong_utf_8_is_named_with_the_row_before() -> None:
    write("PRAGMA encoding = 'UTF-16'", "CREATE TABLE t (a)", "INSERT INTO t VALUES ('北京 🙂')", file="wide.db")
    assert rows("wide.db")[0][1] == {"a": "北京 🙂"}
    write("CREATE TABLE t (a)", "INSERT INTO t VALUES ('ok')", "INSERT INTO t VALUES (CAST(x'e4f6' AS TEXT))")
    assert "chats.db[t]: cannot be read after 0 rows: Could not decode to UTF-8 column 'a'" in error_of("chats.db")
    assert rows("chats.db?query=SELECT a FROM t WHERE rowid = 1 ORDER BY 1")


def test_rows_are_read_one_after_the_other() -> None:
    write("CREATE TABLE t (a)", "INSERT INTO t VALUES ('first')")
    with closing(sqlite3.connect("chats.db")) as database:
        database.executemany("INSERT INTO t VALUES (?)", (("x" * 1000,) for _ in range(20_000)))
        database.commit()
    import tracemalloc

    tracemalloc.start()
    assert sum(1 for _ in SQLite().sftx_source().rows("chats.db", 0)) == 20_001
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


# --- databases that others use ------------------------------------------------------------------


@pytest.fixture(params=["rollback", "log", "open log", "log left behind"])
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """A database of two rows, as programs leave it or have it open."""
    with closing(sqlite3.connect("live.db")) as live:
        if request.param != "rollback":
            live.execute("PRAGMA journal_mode=WAL")
        live.execute("CREATE TABLE t (a)")
        live.execute("INSERT INTO t VALUES ('1'), ('2')")
        live.commit()
        if request.param == "open log":
            yield "live.db"
            return
        for suffix in ("", "-wal") if request.param == "log left behind" else ():
            shutil.copy(f"live.db{suffix}", f"left.db{suffix}")
    yield "left.db" if request.param == "log left behind" else "live.db"


def test_reading_leaves_no_trace_and_sees_what_was_committed(database: str) -> None:
    before = {name: digest for name, digest in files().items() if not name.endswith("-shm")}
    names = set(files())
    source = SQLite().sftx_source()
    source.check(database)
    assert [row["a"] for _, row in source.rows(database, 0)] == ["1", "2"]
    unread = source.rows(database, 0)
    next(unread)
    assert source.fingerprint(database) == SQLite().sftx_source().fingerprint(database)
    assert {name: digest for name, digest in files().items() if not name.endswith("-shm")} == before
    assert set(files()) == names


def test_a_program_that_writes_does_not_wait_and_the_run_says_that_rows_changed(database: str) -> None:
    source = SQLite().sftx_source()
    first = source.fingerprint(database)
    reading = source.rows(database, 0)
    next(reading)
    time.sleep(0.02)  # file systems tell the time of a change in steps of some milliseconds
    with closing(sqlite3.connect(database, timeout=0)) as writer:
        writer.execute("INSERT INTO t VALUES ('3')")
        writer.commit()
        for action in (
            lambda: list(reading),
            lambda: list(source.rows(database, 1)),
            lambda: source.fingerprint(database),
            lambda: source.check(database),
        ):
            with pytest.raises(
                DataError, match=r"\.db: has changed since this run began to read it; give the run a copy"
            ):
                action()
        assert SQLite().sftx_source().fingerprint(database) != first
        assert [row["a"] for _, row in rows(database)] == ["1", "2", "3"]


def test_a_database_that_is_being_written_is_named() -> None:
    write("CREATE TABLE t (a)", "INSERT INTO t VALUES ('1')")
    with closing(sqlite3.connect("chats.db")) as writer:
        writer.execute("PRAGMA cache_size=1")
        writer.execute("BEGIN EXCLUSIVE")
        writer.executemany("INSERT INTO t VALUES (?)", (("x" * 1000,) for _ in range(1000)))
        assert Path("chats.db-journal").exists()
        assert "chats.db: cannot be read: database is locked: another program is writing to it" in error_of("chats.db")


def test_a_transaction_that_was_killed_is_not_read() -> None:
    write("CREATE TABLE t (a)", "INSERT INTO t VALUES ('1')")
    with closing(sqlite3.connect("chats.db")) as writer:
        writer.execute("PRAGMA cache_size=1")
        writer.execute("BEGIN EXCLUSIVE")
        writer.executemany("INSERT INTO t VALUES (?)", (("x" * 1000,) for _ in range(1000)))
        for suffix in ("", "-journal"):
            shutil.copy(f"chats.db{suffix}", f"killed.db{suffix}")
    before = files()
    assert "a program that was writing to it did not end: open it once with that program" in error_of("killed.db")
    assert files() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named() -> None:
    write("CREATE TABLE t (a)")
    Path("chats.db").chmod(0)
    assert error_of("chats.db") == "chats.db: cannot be read: Permission denied"


def test_a_fingerprint_depends_on_the_data_the_address_and_the_options() -> None:
    write("CREATE TABLE t (a)", "CREATE TABLE u (a)", "INSERT INTO t VALUES (1)", "INSERT INTO u VALUES (1)")
    shutil.copy("chats.db", "same.db")
    prints = [
        SQLite(columns).sftx_source().fingerprint(address)
        for address, columns in (
            ("chats.db?table=t", None),
            ("chats.db?table=u", None),
            ("chats.db?query=SELECT a FROM t ORDER BY a", None),
            ("chats.db?table=t", ("a",)),
        )
    ]
    assert len({*prints}) == 4
    assert SQLite().sftx_source().fingerprint("same.db?table=t") == prints[0]
    assert SQLite().sftx_source().num_bytes("chats.db?table=t") == Path("chats.db").stat().st_size


def test_the_contract_holds_for_a_database_of_ones_own() -> None:
    write("CREATE TABLE t (text)", "INSERT INTO t VALUES ('a'), ('b'), ('c')")
    check_source(SQLite(), address="chats.db?query=SELECT text FROM t ORDER BY text DESC")
    check_source(SQLite(), address=str(Path("chats.db").absolute()))
