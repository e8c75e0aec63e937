"""A file becomes records that know their place, and records become conversations, or one line says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sftx
from sftx import Conversation, DataError, Location, Message, Parser
from sftx.data import sources

TEXT = "你好, naïve café 🙂\u2028\u0085 «x»"


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def rows(name: str, content: str | bytes) -> list[tuple[str, Any]]:
    """The records of a file of that content, with their places as an error shows them."""
    return [(str(where), record) for where, record in sources.read(write(name, content))]


def error_of(name: str, content: str | bytes | None = None) -> str:
    with pytest.raises(DataError) as caught:
        list(sources.read(name) if content is None else sources.read(write(name, content)))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- JSON lines ---------------------------------------------------------------------------------


def test_json_lines_may_have_different_fields_and_know_their_lines() -> None:
    content = f'{{"a": 1}}\n\n   \n{{"b": [null, {{"c": {json.dumps(TEXT)}}}]}}'
    assert rows("x.jsonl", content) == [("x.jsonl:1", {"a": 1}), ("x.jsonl:4", {"b": [None, {"c": TEXT}]})]


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.ndjson", "x.json"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\r\n", "\ufeff\r\n"], ids=["bare", "bom", "blank", "bom-blank"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing_but_the_line(name: str, start: str) -> None:
    first = 1 + start.count("\n")
    expected = [(f"{name}:{first}", {"a": 1}), (f"{name}:{first + 2}", {"a": "x\r\n"})]
    assert rows(name, f'{start}{{"a": 1}}\r\n\r\n{{"a": "x\\r\\n"}}\r\n') == expected


def test_only_a_newline_ends_a_line() -> None:
    """JSON may hold U+2028 and U+0085 as they are, which str.splitlines takes for ends of lines."""
    content = json.dumps({"a": TEXT}, ensure_ascii=False) + "\n" + '{"b": 1}\n'
    assert rows("x.jsonl", content) == [("x.jsonl:1", {"a": TEXT}), ("x.jsonl:2", {"b": 1})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": 1\n', "x.jsonl:2: not valid JSON: Expecting ',' delimiter at column "),
        ('{"a": 1}\n\n{"a": 1} {"a": 2}\n', "x.jsonl:3: not valid JSON: Extra data at column 10"),
        ("{'a': 1}", "x.jsonl:1: not valid JSON: "),
        ('{"a": 1}\n[1]\n', 'x.jsonl:2: got a list, expected an object such as {"messages": [...]}'),
        ('"text"', "x.jsonl:1: got a str, expected an object"),
        ("null", "x.jsonl:1: got a NoneType, expected an object"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', "x.jsonl:2: is not UTF-8: invalid continuation byte at byte 8"),
        ('{"a": 1}'.encode("utf-16"), "x.jsonl:1: is not UTF-8: "),
        ('{"a": ' + "1" * 5000 + "}", "x.jsonl:1: not readable JSON: a number of too many digits"),
        ("[" * 200_000, "x.jsonl:1: not "),
        ("", "x.jsonl: holds no rows"),
        ("\n \n\r\n", "x.jsonl: holds no rows"),
        ("\ufeff", "x.jsonl: holds no rows"),
    ],
)
def test_a_broken_line_is_named(content: str | bytes, message: str) -> None:
    assert error_of("x.jsonl", content).startswith(message)


def test_rows_before_a_broken_one_are_read() -> None:
    reader = sources.read(write("x.jsonl", '{"a": 1}\n{'))
    assert next(reader)[1] == {"a": 1}
    with pytest.raises(DataError, match=r"^x\.jsonl:2: "):
        next(reader)


# --- JSON ---------------------------------------------------------------------------------------


def test_a_json_list_knows_the_line_of_each_row() -> None:
    content = ' \n[\n  {"a": 1}, {"a": 2},\n  {\n    "a": 3\n  }\n  , {"b": "x"}\n]\n'
    assert rows("x.json", content) == [
        ("x.json:3", {"a": 1}),
        ("x.json:3", {"a": 2}),
        ("x.json:4", {"a": 3}),
        ("x.json:7", {"b": "x"}),
    ]


def test_a_json_file_of_json_lines_is_read_as_such() -> None:
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
        ('[\n  {"a": 1},\n  "text"\n]', "x.json:3: got a str, expected an object"),
        ('{\n  "data": [{"a": 1}]\n}', "x.json:1: got one object over several lines, expected a list of objects"),
        ('{"a": 1}\n{"a": \n', "x.json:2: not valid JSON: "),
        ("5", "x.json:1: got a int, expected an object"),
        ("[\n" + "[" * 200_000, "x.json:2: not "),
        ('[{"a": ' + "1" * 5000 + "}]", "x.json:1: not readable JSON: a number of too many digits"),
        (b'[{"a": "\xe9"}]', "x.json: cannot be read: "),
        ("[]", "x.json: holds no rows"),
        ("", "x.json: holds no rows"),
    ],
)
def test_a_broken_json_file_is_named_with_the_line(content: str | bytes, message: str) -> None:
    assert error_of("x.json", content).startswith(message)


# --- CSV and parquet ----------------------------------------------------------------------------


def test_csv_is_text_and_stays_what_it_is() -> None:
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
        ('a,b\n"1\n2",2\n1\n', "x.csv:4: got 1 fields, expected the 2 of the first line"),
        ("a,a\n1,2\n", "x.csv:1: two columns have the same name: a, a"),
        ('a,b\n1,"2\n', "x.csv:2: not valid CSV: "),
        (b"a,b\n\xe9,2\n", "x.csv: cannot be read: "),
        ("a,b\n", "x.csv: holds no rows"),
        ("", "x.csv: holds no rows"),
    ],
)
def test_a_broken_csv_file_is_named_with_the_line(content: str | bytes, message: str) -> None:
    assert error_of("x.csv", content).startswith(message)


def test_parquet_gives_nested_rows_with_their_numbers() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"messages": [{"role": "user", "content": TEXT}]}, {"messages": [{"role": "user", "content": None}]}]
    pq.write_table(pa.Table.from_pylist(records), "x.parquet")
    read = [(str(where), record) for where, record in sources.read("x.parquet")]
    assert read == [("x.parquet row 1", records[0]), ("x.parquet row 2", records[1])]


def test_a_broken_or_empty_parquet_file_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert error_of("x.parquet", "no parquet").startswith("x.parquet: cannot be read: ")
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), "y.parquet")
    assert error_of("y.parquet") == "y.parquet: holds no rows"
    assert capfd.readouterr() == ("", "")


# --- files --------------------------------------------------------------------------------------


def test_what_is_no_readable_file_is_said() -> None:
    Path("folder").mkdir()
    assert error_of("folder") == "folder: is a directory; name a file (.jsonl, .json, .parquet or .csv)"
    assert error_of("none.jsonl") == f"none.jsonl: no such file (looked in {Path.cwd()})"
    assert error_of("/none/none.jsonl") == "/none/none.jsonl: no such file"
    assert error_of("x.txt", "") == (
        "x.txt: unknown kind of file '.txt'; known are .jsonl, .ndjson, .json, .parquet, .csv"
    )
    assert error_of("sftx:demo/none.jsonl") == "sftx:demo/none.jsonl: no such file"


def test_a_path_may_begin_at_home_or_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write("x.jsonl", "{}")
    assert [str(where) for where, _ in sources.read("~/x.jsonl")] == ["~/x.jsonl:1"]
    assert sources.resolve("sftx:errors.py") == Path(sftx.__file__).with_name("errors.py")


def test_a_file_s_hash_is_that_of_its_bytes() -> None:
    write("x.jsonl", "abc")
    assert sources.sha256("x.jsonl") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- parsers ------------------------------------------------------------------------------------

WHERE = Location("x.jsonl", 7)


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    from sftx import config, hookspecs, plugins

    loaded = config.load(None, assignments=[("data.train", ["x.jsonl"], "--data x.jsonl")], remove=["masked-ce"])
    assembly = plugins.Assembly(loaded.origins)
    for name in hookspecs.DEFAULTS["sftx_parser"]:
        assembly.add(plugins.find(name, plugins.discover()), {})
    return assembly.parsers()


def parse(parsers: dict[str, Parser], record: dict[str, Any]) -> tuple[str, list[tuple[str, str, bool]]]:
    """The format that takes a record, and its turns: (role, content, whether it is trained)."""
    name, parser = next((name, parser) for name, parser in parsers.items() if parser.accepts(record))
    (conversation,) = parser.parse(record, WHERE)
    assert isinstance(conversation, Conversation)
    return name, [(m.role, m.content, m.trained) for m in conversation.messages]


USER, ANSWER = {"role": "user", "content": TEXT}, {"role": "assistant", "content": "🙂"}
PAIR = [("user", TEXT, False), ("assistant", "🙂", True)]
BRIEF = ("system", "Be brief.", False)


@pytest.mark.parametrize(
    ("record", "name", "turns"),
    [
        ({"messages": [USER, ANSWER]}, "messages", PAIR),
        ({"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}, "messages", [BRIEF, *PAIR]),
        ({"messages": [USER, ANSWER, USER, ANSWER], "id": 3}, "messages", [*PAIR, *PAIR]),
        ({"messages": [USER, {"role": "tool", "content": "5"}]}, "messages", [PAIR[0], ("tool", "5", False)]),
        ({"messages": []}, "messages", []),
        ({"prompt": TEXT, "completion": "🙂"}, "prompt-completion", PAIR),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt-completion", PAIR),
        ({"prompt": [USER], "completion": "🙂", "score": 1}, "prompt-completion", PAIR),
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            "prompt-completion",
            [PAIR[0], ("assistant", "🙂", False), *PAIR],
        ),
        ({"instruction": TEXT, "output": "🙂"}, "alpaca", PAIR),
        ({"instruction": TEXT, "input": "", "output": "🙂", "history": None, "system": None}, "alpaca", PAIR),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            "alpaca",
            [("user", "a\nb", False), ("assistant", "c", True)],
        ),
        (
            {"instruction": TEXT, "output": "🙂", "system": "Be brief.", "history": [["a", "b"]]},
            "alpaca",
            [BRIEF, ("user", "a", False), ("assistant", "b", True), *PAIR],
        ),
        ({"conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": "🙂"}]}, "sharegpt", PAIR),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "user", "value": TEXT}, {"from": "assistant", "value": "🙂"}],
            },
            "sharegpt",
            [BRIEF, *PAIR],
        ),
        ({"conversations": [{"from": "system", "value": "Be brief."}], "system": ""}, "sharegpt", [BRIEF]),
    ],
)
def test_a_record_is_recognised_by_its_fields_and_becomes_turns(
    parsers: dict[str, Parser], record: dict[str, Any], name: str, turns: list[tuple[str, str, bool]]
) -> None:
    assert parse(parsers, record) == (name, turns)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": None}, "messages is missing or null, expected a list"),
        ({"messages": "text"}, "messages is text, expected a list"),
        ({"messages": ["text"]}, "messages[0] is text, expected an object with role and content"),
        ({"messages": [USER, None]}, "messages[1] is missing or null, expected an object"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is None, expected system, user, assistant, tool"),
        (
            {"messages": [USER, {"role": "asistant", "content": "x"}]},
            "messages[1].role is 'asistant', expected system, user, assistant, tool; did you mean 'assistant'?",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role is ['user'], expected system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing or null, expected text"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is missing or null, expected text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content is a number, expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content is a list"),
        ({"prompt": None, "completion": "x"}, "prompt is missing or null, expected text"),
        ({"prompt": "x", "completion": 5}, "completion is a number, expected text"),
        ({"prompt": "x", "completion": ["y"]}, "completion[0] is text, expected an object with role and content"),
        ({"prompt": [{"role": "usr", "content": "x"}], "completion": "x"}, "did you mean 'user'?"),
        ({"instruction": None, "output": "x"}, "instruction is missing or null, expected text"),
        ({"instruction": "x", "output": 5}, "output is a number, expected text"),
        ({"instruction": "x", "output": "y", "input": 5}, "input is a number, expected text"),
        ({"instruction": "x", "output": "y", "system": ["s"]}, "system is a list, expected text"),
        ({"instruction": "x", "output": "y", "history": "z"}, "history is text, expected a list"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history[0] is no pair [question, answer]"),
        ({"instruction": "x", "output": "y", "history": [["a", None]]}, "history[0][1] is missing or null"),
        ({"conversations": {"from": "human"}}, "conversations is an object, expected a list"),
        ({"conversations": ["x"]}, "conversations[0] is text, expected an object with from and value"),
        (
            {"conversations": [{"from": "humn", "value": "x"}]},
            "conversations[0].from is 'humn', expected human, gpt, system, user, assistant; did you mean 'human'?",
        ),
        ({"conversations": [{"role": "user", "content": "x"}]}, "conversations[0].from is None, expected human"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value is missing or null, expected text"),
        ({"conversations": [{"from": "gpt", "value": 5}]}, "conversations[0].value is a number, expected text"),
        ({"conversations": [], "system": 5}, "system is a number, expected text"),
    ],
)
def test_a_bad_value_is_named_with_line_field_and_what_was_expected(
    parsers: dict[str, Parser], record: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        parse(parsers, record)
    assert str(caught.value).startswith("x.jsonl:7: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "record", [{}, {"prompt": "x"}, {"completion": "x"}, {"instruction": "x"}, {"text": "x"}, {"conversation": []}]
)
def test_a_record_of_other_fields_is_nobody_s(parsers: dict[str, Parser], record: dict[str, Any]) -> None:
    assert [name for name, parser in parsers.items() if parser.accepts(record)] == []


def test_a_parser_that_is_named_for_a_record_of_other_fields_says_what_it_misses(parsers: dict[str, Parser]) -> None:
    """`data.format` sends every row to one parser, which then never asked whether it accepts it."""
    for parser in parsers.values():
        with pytest.raises(DataError, match=r"^x\.jsonl:7: \w+ is missing or null"):
            parser.parse({"text": "x"}, WHERE)


def test_message_of_a_role_other_than_assistant_may_be_trained_when_said_so() -> None:
    assert [Message(role, "x").trained for role in ("system", "user", "assistant", "tool")] == [
        False,
        False,
        True,
        False,
    ]
    assert Message("user", "x", trainable=True).trained
    assert not Message("assistant", "x", trainable=False).trained
