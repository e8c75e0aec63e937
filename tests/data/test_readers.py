"""Readers of each kind of file yield rows with their locations, or raise an error of one line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from row_files import TEXT, error_of, rows, write
from sftx import ConfigError, DataError
from sftx.config.options import Source
from sftx.data import json_text, readers, sources

TWICE = "the key 'a' has two values in one object; keep one"


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- JSON lines ---------------------------------------------------------------------------------


def test_json_lines_may_have_different_fields_and_keep_their_line_numbers() -> None:
    content = f'{{"a": 1}}\n\n   \n{{"b": [null, {{"c": {json.dumps(TEXT)}}}]}}'
    assert rows("x.jsonl", content) == [("x.jsonl:1", {"a": 1}), ("x.jsonl:4", {"b": [None, {"c": TEXT}]})]


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.ndjson", "x.json"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\r\n", "\ufeff\r\n"], ids=["bare", "bom", "blank", "bom-blank"])
def test_a_byte_order_mark_and_windows_line_ends_do_not_change_the_rows(name: str, start: str) -> None:
    first = 1 + start.count("\n")
    expected = [(f"{name}:{first}", {"a": 1}), (f"{name}:{first + 2}", {"a": "x\r\n"})]
    assert rows(name, f'{start}{{"a": 1}}\r\n\r\n{{"a": "x\\r\\n"}}\r\n') == expected


def test_only_a_newline_ends_a_line() -> None:
    """JSON may contain U+2028 and U+0085 unescaped, which str.splitlines takes for line ends."""
    content = json.dumps({"a": TEXT}, ensure_ascii=False) + "\n" + '{"b": 1}\n'
    assert rows("x.jsonl", content) == [("x.jsonl:1", {"a": TEXT}), ("x.jsonl:2", {"b": 1})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": 1\n', "x.jsonl:2: not valid JSON: Expecting ',' delimiter at column "),
        ('{"a": [\n', "x.jsonl:1: not valid JSON: Expecting value at column 8"),
        ('{"a": 1}\n\n{"a": 1} {"a": 2}\n', "x.jsonl:3: not valid JSON: Extra data at column 10"),
        ("{'a': 1}", "x.jsonl:1: not valid JSON: "),
        ('{"a": "\t"}', "x.jsonl:1: not valid JSON: Invalid control character at column 8"),
        ('{"a": 1}\n[1]\n', 'x.jsonl:2: got a list, expected an object such as {"messages": [...]}'),
        ('"text"', "x.jsonl:1: got text, expected an object"),
        ("null", "x.jsonl:1: got null, expected an object"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', "x.jsonl:2: is not UTF-8: invalid continuation byte at byte 8"),
        ('{"a": 1}'.encode("utf-16-le"), "x.jsonl: every other byte is 0, as in utf-16-le; say so with --encoding"),
        ('{"a": ' + "1" * 5000 + "}", "x.jsonl:1: not readable JSON: a number of too many digits"),
        ('{"a": 1}\n{"b": {"a": 1, "b": 2, "a": 1}}', f"x.jsonl:2: not readable JSON: {TWICE}"),
        ("[" * 200_000, "x.jsonl:1: not "),
        ("", "x.jsonl: holds no rows"),
        ("\n \n\r\n", "x.jsonl: holds no rows"),
        ("\ufeff", "x.jsonl: holds no rows"),
    ],
)
def test_a_broken_line_is_reported(content: str | bytes, message: str) -> None:
    assert error_of("x.jsonl", content).startswith(message)


def test_rows_before_a_broken_one_are_read() -> None:
    reader = sources.read(Source(write("x.jsonl", '{"a": 1}\n{')))
    assert next(reader)[1] == {"a": 1}
    with pytest.raises(DataError, match=r"^x\.jsonl:2: "):
        next(reader)


# --- JSON ---------------------------------------------------------------------------------------


def test_the_rows_of_a_json_list_keep_their_line_numbers() -> None:
    content = ' \n[\n  {"a": 1}, {"a": 2},\n  {\n    "a": 3\n  }\n  , {"b": "x"}\n]\n'
    assert rows("x.json", content) == [
        ("x.json:3", {"a": 1}),
        ("x.json:3", {"a": 2}),
        ("x.json:4", {"a": 3}),
        ("x.json:7", {"b": "x"}),
    ]


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson"])
def test_a_file_of_json_lines_may_hold_a_list(name: str) -> None:
    for start in ("", "\ufeff", " \n"):
        at = 2 + start.count("\n")
        read = rows(name, f'{start}[\n  {{"a": 1}},\n  {{\n"a": 2}}\n]\n')
        assert read == [(f"{name}:{at}", {"a": 1}), (f"{name}:{at + 1}", {"a": 2})]
    assert error_of(name, '[{"a": 1}\n').startswith(f"{name}:2: not valid JSON: expected ',' or ']' after a row")


def test_a_json_file_may_hold_json_lines() -> None:
    assert rows("x.json", '{"a": 1}\n{"a": 2}\n') == [("x.json:1", {"a": 1}), ("x.json:2", {"a": 2})]
    assert rows("y.json", '{"a": 1}') == [("y.json:1", {"a": 1})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n  {"a": 1},\n  {"a": 2\n]', "x.json:4: not valid JSON: "),
        ('[\n  {"a": 1}\n  {"a": 2}\n]', "x.json:3: not valid JSON: expected ',' or ']' after a row"),
        ('[{"a": 1}\n', "x.json:2: not valid JSON: expected ',' or ']' after a row"),
        ('[{"a": 1},\n', "x.json:2: not valid JSON: Expecting value at column 1"),
        ('[{"a": 1}]\n[{"a": 2}]\n', "x.json:2: not valid JSON: text follows the list"),
        ('[\n  {"a": 1},\n  "text"\n]', "x.json:3: got text, expected an object"),
        ('{\n  "data": [{"a": 1}]\n}', "x.json:1: got one object over several lines, expected a list of objects"),
        ('{"a": 1}\n{"a": \n', "x.json:2: not valid JSON: "),
        ("5", "x.json:1: got a number, expected an object"),
        ("[\n" + "[" * 200_000, "x.json:2: not "),
        ('[{"a": ' + "1" * 5000 + "}]", "x.json:1: not readable JSON: a number of too many digits"),
        ('[{"a": 1},\n{"a": 1, "b": 2, "a": 1}]', f"x.json:2: not readable JSON: {TWICE}"),
        (b'[{"a": "\xe9"}]', "x.json:1: is not UTF-8: invalid continuation byte at byte 9"),
        (b'[\n{"a": "\xc3\xa9"},\n{"a": "\xe9"}]', "x.json:3: is not UTF-8: invalid continuation byte at byte 8"),
        ("[]", "x.json: holds no rows"),
        ("", "x.json: holds no rows"),
    ],
)
def test_a_broken_json_file_is_reported_with_the_line(content: str | bytes, message: str) -> None:
    assert error_of("x.json", content).startswith(message)


# --- CSV and parquet ----------------------------------------------------------------------------


def test_csv_fields_are_unchanged_text() -> None:
    content = f'prompt,completion\r\n042,NA\r\n\r\n"two\r\nlines, ""quoted""",\r\n"{TEXT}",1e5\r\n'
    assert rows("x.csv", content) == [
        ("x.csv:2", {"prompt": "042", "completion": "NA"}),
        ("x.csv:4", {"prompt": 'two\r\nlines, "quoted"', "completion": ""}),
        ("x.csv:6", {"prompt": TEXT, "completion": "1e5"}),
    ]


def test_csv_may_begin_with_a_byte_order_mark_and_hold_long_texts() -> None:
    long = "long " * 100_000
    assert rows("x.csv", f"\ufeff\na,b\n1,{long}\n") == [("x.csv:3", {"a": "1", "b": long})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", "x.csv:3: got 3 fields, expected the 2 of the first line"),
        ('a,b\n"1\n2",2\n1\n', "x.csv:4: got 1 field, expected the 2 of the first line"),
        ("a,a\n1,2\n", "x.csv:1: two columns have the same name: a, a"),
        ('a,b\n1,"2\n', "x.csv:2: not valid CSV: "),
        (b"a,b\n\xe9,2\n", "x.csv:2: is not UTF-8: invalid continuation byte at byte 1"),
        ("a,b\n1,2\n".encode("utf-16-be"), "x.csv: every other byte is 0, as in utf-16-be; say so with --encoding"),
        ("a;b\n1;2\n3;4;5\n", "x.csv:3: got 3 fields, expected the 2 of the first line, separated by semicolons"),
        ("a,,\n1,2,3\n", "x.csv:1: two columns have the same name: a, '', ''"),
        ("a,b\n", "x.csv: holds no rows"),
        ("", "x.csv: holds no rows"),
    ],
)
def test_a_broken_csv_file_is_reported_with_the_line(content: str | bytes, message: str) -> None:
    assert error_of("x.csv", content).startswith(message)


def test_parquet_yields_nested_rows_with_their_row_numbers() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"messages": [{"role": "user", "content": TEXT}]}, {"messages": [{"role": "user"}]}]
    pq.write_table(pa.Table.from_pylist(records), "x.parquet")
    read = [(str(where), record) for where, record in sources.read(Source("x.parquet"))]
    assert read == [("x.parquet row 1", records[0]), ("x.parquet row 2", records[1])]


def test_a_broken_or_empty_parquet_file_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert error_of("x.parquet", "no parquet").startswith("x.parquet: cannot be read: ")
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), "y.parquet")
    assert error_of("y.parquet") == "y.parquet: holds no rows"
    assert capfd.readouterr() == ("", "")


# --- encodings ----------------------------------------------------------------------------------

ENCODED = {
    "x.jsonl": '{"a": "café"}\n\n{"a": "für\u00a0é"}\n',
    "x.json": '[{"a": "café"},\n\n{"a": "für\u00a0é"}]',
    "x.csv": "a\ncafé\n\nfür\u00a0é\n",
    "x.tsv": "a\tb\ncafé\t1\n",
    "x.txt": "café\nfür\n",
}


def read_as(name: str, content: bytes, **options: Any) -> list[tuple[str, Any]]:
    return [(str(where), row) for where, row in sources.read(Source(write(name, content), **options))]


@pytest.mark.parametrize("name", ENCODED)
def test_a_file_of_a_named_encoding_yields_the_rows_of_its_utf_8(name: str, caplog: pytest.LogCaptureFixture) -> None:
    text = ENCODED[name]
    expected = rows(name, text)
    for encoding in ("latin-1", "cp1252", "utf-16", "utf-16-le", "UTF_16_BE", "utf-32", "utf-8-sig", "gb18030"):
        if encoding == "gb18030":
            text, expected = text.replace("\u00a0", " "), rows(name, text.replace("\u00a0", " "))
        content = text.encode(encoding)
        assert read_as(name, content, encoding=encoding) == expected, encoding
        assert [(str(w), row) for w, row in sources.read(Source(name), encoding=encoding)] == expected, encoding
        assert read_as(f"{name}.gz", gzip.compress(content), encoding=encoding) == [
            (where.replace(name, f"{name}.gz"), row) for where, row in expected
        ]
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_names_the_encoding(name: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    text = ENCODED[name]
    expected = rows(name, text)
    caplog.set_level("INFO")
    for _ in range(2):
        assert read_as(name, f"\ufeff{text}".encode(order)) == expected
    assert [record.message for record in caplog.records] == [
        f"{name}: is read as {order}, which its byte order mark names"
    ]
    assert read_as(name, f"\ufeff{text}".encode(order), encoding=order) == expected


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        (b'{"a": 1}\n{"a": "caf\xe9 noir"}\n', "utf-8", "may be cp1252 ('é noir\"}'): say so with --encoding cp1252"),
        ('{"a": 1}\n{"a": "你好"}\n'.encode("gb18030"), "utf-8", "it may be gb18030 ('你好"),
        ('{"a": 1}\n{"a": "привет"}\n'.encode("cp1251"), "utf-8", "may be cp1251 ('привет\"}') or cp1252"),
        ('{"a": 1}\n{"a": "Größe"}\n'.encode("cp1252"), "utf-8", "cp1252 ('öße\"}'): say so with --encoding"),
        (b'{"a": 1}\n{"a": "\x81"}\n', "cp1252", "is not cp1252: character maps to <undefined> at byte 17 of the file"),
        (b'{"a": 1}\n{"a": "caf\xe9"}\n', "ascii", "is not ascii: ordinal not in range(128) at byte 20 of the file"),
        ('{"a": 1}\n{"a": "é'.encode("utf-16-le") + b"\x00", "utf-16-le", "is not utf-16-le: truncated data at byte "),
        ('{"a": 1}\n{"a": "\ud800"}'.encode("utf-16-le", "surrogatepass"), "utf-16-le", "is not utf-16-le: illegal "),
    ],
)  # fmt: skip
def test_a_byte_of_another_encoding_is_reported_with_its_line(content: bytes, encoding: str, message: str) -> None:
    reader = sources.read(Source(write("x.jsonl", content)), encoding=encoding)
    assert next(reader)[1] == {"a": 1}
    with pytest.raises(DataError) as caught:
        next(reader)
    assert str(caught.value).startswith("x.jsonl:2: ")
    assert message in str(caught.value)


def test_an_encoding_that_contradicts_the_byte_order_mark_is_an_error() -> None:
    for encoding, content in {"cp1252": "\ufeff{}".encode(), "utf-16-be": "\ufeff{}".encode("utf-16-le")}.items():
        with pytest.raises(
            DataError, match=rf"^x\.jsonl: begins with the byte order mark of utf-.*is to be {encoding};"
        ):
            read_as("x.jsonl", content, encoding=encoding)
    with pytest.raises(DataError, match=r"^x\.jsonl: has no byte order mark; write utf-16-le or utf-16-be as its enc"):
        read_as("x.jsonl", "{}".encode("utf-16-le"), encoding="utf-16")
    assert error_of("x.jsonl", b"\xff\xfe") == "x.jsonl: holds no rows"
    write("x.parquet", "")
    for option in ({"encoding": "cp1252"}, {"delimiter": ";"}):
        with pytest.raises(ConfigError, match=r"^x\.parquet: is no text, and "):
            sources.check(Source("x.parquet", **option))  # type: ignore[arg-type]


# --- delimiters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("mark", "called"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_another_delimiter_is_taken_from_the_first_line_and_said(
    mark: str, called: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    content = '\na;"b, or\nc;d";c\r\n"x, y;\n""z""";1,5;\r\n'.replace(";", mark)
    names = ["a", f"b, or\nc{mark}d", "c"]
    expected = [("x.csv:4", dict(zip(names, [f'x, y{mark}\n"z"', "1,5", ""], strict=True)))]
    assert rows("x.csv", content) == rows("x.csv", content) == expected
    assert [record.message for record in caplog.records] == [
        f"x.csv: its fields are separated by {called}, going by its first line; `delimiter` of the source names another"
    ]


def test_a_delimiter_that_is_expected_or_given_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert rows("x.tsv", 'a\tb\n1,2;3\t"4\t5"\n') == [("x.tsv:2", {"a": "1,2;3", "b": "4\t5"})]
    assert rows("X.TSV", "a\n1,2;3\n") == [("X.TSV:2", {"a": "1,2;3"})]
    assert read_as("x.csv", b"a;b,c;d\n1;2,3;4\n", delimiter=",") == [("x.csv:2", {"a;b": "1;2", "c;d": "3;4"})]
    assert rows("y.csv", "a\nfree; text | with, all\n".replace(", ", " ")) == [
        ("y.csv:2", {"a": "free; text | with all"})
    ]
    assert rows("z.csv", "sep=;\r\na\r\n1,5\r\n") == [("z.csv:3", {"a": "1,5"})]
    assert rows("z.csv", "a,b;c\n1,2\n") == [("z.csv:2", {"a": "1", "b;c": "2"})]


# --- compressed ---------------------------------------------------------------------------------


def zst(content: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", f'\ufeff{{"a": "{TEXT}"}}\n\n{{"a": "b"}}'),
        ("x.json", f'[\n{{"a": "{TEXT}"}},\n{{"a": "b"}}]'),
        ("x.csv", f'a\n"{TEXT}"\nb'),
        ("x.txt", TEXT),
    ],
)
def test_a_compressed_file_yields_the_same_rows(name: str, content: str, suffix: str) -> None:
    plain = [(where.removeprefix(name), row) for where, row in rows(name, content)]
    packed = name + suffix
    assert [(w.removeprefix(packed), r) for w, r in rows(packed, COMPRESS[suffix](content.encode()))] == plain


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_truncated_compressed_file_is_an_error(suffix: str) -> None:
    content = b"".join(json.dumps({"a": number, "b": os.urandom(40).hex()}).encode() + b"\n" for number in range(9999))
    packed = COMPRESS[suffix](content)
    name = "x.jsonl" + suffix
    assert len(rows(name, packed)) == 9999
    assert error_of(name, packed[: len(packed) // 2]).startswith(f"{name}: cannot be read")
    assert error_of(name, "no such thing").startswith(f"{name}: cannot be read: ")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_what_follows_a_compressed_stream_is_read_or_refused_and_never_ignored(suffix: str) -> None:
    first, second = (COMPRESS[suffix](f'{{"a": {number}}}\n'.encode()) for number in (1, 2))
    name = "x.jsonl" + suffix
    assert [row for _, row in rows(name, first + second)] == [{"a": 1}, {"a": 2}]
    assert error_of(name, first + b"damaged" + second[7:]).startswith(f"{name}: cannot be read")
    if suffix == ".xz":
        assert len(rows(name, first + bytes(8) + second + bytes(4))) == 2


@pytest.mark.parametrize(
    ("suffix", "compress"), [*COMPRESS.items(), (".parquet", lambda content: b"PAR1\x15" + content)]
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
def test_a_file_with_the_wrong_suffix_is_reported_with_the_right_one(name: str, suffix: str, compress: Any) -> None:
    assert error_of(name, compress(b"{}")) == f"{name}: begins as a {suffix} file does; give it that name"


# --- a list of any size -------------------------------------------------------------------------

WIDE = [
    {"a": TEXT * 3, "b": [1.5e10, -2, True, None, {"c": '\\u12 🙂 " \\ \t' * 2}]},
    {},
    {"long": "x" * 700, "d": {"e": [[], {}, [[3]]]}},
]


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_a_list_does_not_depend_on_the_size_of_the_pieces_read(
    indent: int | None, ensure_ascii: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "\ufeff \n" + json.dumps(WIDE * 2, indent=indent, ensure_ascii=ensure_ascii) + " \n"
    whole = rows("x.json", content)
    assert [row for _, row in whole] == WIDE * 2
    monkeypatch.setattr(json_text, "_READ_CHARS", 1)
    for size in (*range(1, 40), 997):
        monkeypatch.setattr(readers, "_PIECE_BYTES", size)
        assert rows("x.json", content) == whole


def test_the_location_of_an_error_in_a_list_does_not_depend_on_the_size_of_the_pieces_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = [
        '[{"a": "é"},\n\n {"a": 1, é}]',
        '[{"a": "é"},\n {"a": "x\ny"}]',
        '[{"a": 1} {"a": 1}]',
        '[{"a": 1},\n {"a": "never ends}]',
        '[{"a": 1}] é',
        '[ \n\n{"a": 1}, \n{"a": [1 2], "b": "é"}]',
    ]
    whole = [error_of("x.json", content) for content in broken]
    assert [message.partition(" at ")[0] for message in whole] == [
        "x.json:3: not valid JSON: Expecting property name enclosed in double quotes",
        "x.json:2: not valid JSON: Invalid control character",
        "x.json:1: not valid JSON: expected ',' or ']' after a row",
        "x.json:2: not valid JSON: Unterminated string starting",
        "x.json:1: not valid JSON: text follows the list",
        "x.json:4: not valid JSON: Expecting ',' delimiter",
    ]
    monkeypatch.setattr(json_text, "_READ_CHARS", 1)
    for size in range(1, 40):
        monkeypatch.setattr(readers, "_PIECE_BYTES", size)
        assert [error_of("x.json", content) for content in broken] == whole
    assert error_of("x.json", b'[{"a": "\xc3\xa9 \xe9"}]').partition(";")[0].endswith(" at byte 12")


# --- parquet and Arrow --------------------------------------------------------------------------


def arrow_table(num_rows: int) -> tuple[Any, list[dict[str, Any]]]:
    import pyarrow as pa

    records = [{"messages": [{"role": "user", "content": f"{TEXT} {n}"}], "n": n} for n in range(num_rows)]
    return pa.Table.from_pylist(records), records


@pytest.mark.parametrize("form", ["new_stream", "new_file"])
def test_both_arrow_formats_are_read(form: str) -> None:
    import pyarrow as pa

    table, records = arrow_table(600)
    with getattr(pa.ipc, form)("x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=400)
    read = [(str(where), record) for where, record in sources.read(Source("x.arrow"))]
    assert read == [(f"x.arrow row {number}", record) for number, record in enumerate(records, 1)]
    whole = Path("x.arrow").read_bytes()
    assert error_of("x.arrow", whole[: len(whole) // 2]).startswith("x.arrow: cannot be read")
    assert error_of("x.arrow", "no arrow").startswith("x.arrow: cannot be read: ")


def test_a_damaged_arrow_file_is_an_error() -> None:
    import pyarrow as pa

    table = pa.table({"a": ["xxxxx", "y"]})
    with pa.ipc.new_stream("x.arrow", table.schema) as writer:
        writer.write_table(table)
    whole = Path("x.arrow").read_bytes()
    offsets = struct.pack("<3i", 0, 5, 6)
    assert whole.count(offsets) == 1
    damaged = whole.replace(offsets, struct.pack("<3i", 0, 2**30, 6))
    assert error_of("x.arrow", damaged).startswith("x.arrow: cannot be read: ")


def test_json_of_any_shape_in_a_column_is_decoded() -> None:
    """`datasets` writes such columns for tools, whose fields differ from row to row."""
    from datasets import Dataset, Features, Json, List, Value

    records = [{"n": 1, "tools": [{"a": {"b": 1}}]}, {"n": 2, "tools": [{"c": "x"}, 5]}, {"n": 3, "tools": None}]
    features = Features({"n": Value("int64"), "tools": List(Json())})
    Dataset.from_list(records, features=features).to_parquet("x.parquet")
    assert [row for _, row in sources.read(Source("x.parquet"))] == records


def _tool(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "parameters": {"properties": {f"of_{name}": schema}}}


PADDED = [
    {"tools": [_tool("f", type="integer", default=None, enum=["a", None])], "chat": [{"role": "user", "n": 1}]},
    {
        "tools": [_tool("g", type="string", default="x"), _tool("h", type="string")],
        "chat": [{"role": "tool", "id": "a"}],
    },
    {
        "tools": [],
        "chat": [{"role": "user", "arguments": {"a": 1}}, {"role": "user", "arguments": {"b": None, "c": 2}}],
    },
    {"tools": None, "chat": [{"role": "user", "arguments": {"a": 2}, "meta": {"note": None}}, None]},
]
"""Rows without the keys that Arrow gives to their objects."""


@pytest.mark.parametrize("form", ["x.parquet", "x.arrow", "saved", "saved by split"])
def test_keys_that_arrow_gave_to_an_object_are_removed_and_a_null_that_was_written_is_kept(form: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, DatasetDict

    table = pa.Table.from_pylist(PADDED)
    if form == "x.parquet":
        pq.write_table(table, form)
    elif form == "x.arrow":
        with pa.OSFile(form, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif form == "saved":
        Dataset(table).save_to_disk(form)
    else:
        DatasetDict({"test": Dataset(table)}).save_to_disk(form)
    assert table.to_pylist() != PADDED
    read = [row for _, row in sources.read(Source(form, split="test" if form == "saved by split" else None))]
    expected = json.loads(json.dumps(PADDED))
    # `b` is null in every row, but this object lacks the key `a`, so that `b` is taken for padding as well.
    del expected[2]["chat"][1]["arguments"]["b"]
    assert read == expected


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_every_null_of_json_is_kept(name: str) -> None:
    content = json.dumps(PADDED) if name == "x.json" else "\n".join(map(json.dumps, PADDED))
    assert [row for _, row in rows(name, content)] == PADDED


def test_two_columns_with_the_same_name_are_refused() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([["x"], ["y"]], names=["a", "a"]), "x.parquet")
    assert error_of("x.parquet") == "x.parquet: two columns have the same name: a, a"
