"""Records become conversations by the built-in formats, or one line says why not."""

from __future__ import annotations

from typing import Any

import pytest

from sftx import Conversation, DataError, Location, Message, Parser

TEXT = "你好, naïve café 🙂\u2028\u0085 «x»"
WHERE = Location("x.jsonl", 7)


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    from sftx.assembly import entry_points, registry
    from sftx.config import default_plugins, loading

    loaded = loading.load(None, assignments=[("data.train", ["x.jsonl"], "--data x.jsonl")], remove=["masked-ce"])
    assembly = registry.Assembly(loaded.origins)
    for name in default_plugins.DEFAULT_PLUGINS["sftx_parser"]:
        assembly.add(entry_points.find(name, entry_points.discover()), {})
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
        (
            {"messages": [{"content": "x"}]},
            "messages[0].role is missing or null, expected system, user, assistant, tool",
        ),
        (
            {"messages": [USER, {"role": "asistant", "content": "x"}]},
            "messages[1].role is 'asistant'; did you mean 'assistant'?",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role is a list, expected system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing or null, expected text"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is missing or null, expected text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content is a number, expected text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text is missing or null, expected text",
        ),
        ({"prompt": None, "completion": "x"}, "prompt is missing or null, expected text"),
        ({"prompt": "x", "completion": 5}, "completion is a number, expected text"),
        ({"prompt": "x", "completion": ["y"]}, "completion[0] is text, expected an object with role and content"),
        ({"prompt": [{"role": "usr", "content": "x"}], "completion": "x"}, "did you mean 'user'?"),
        ({"instruction": None, "output": "x"}, "instruction is missing or null, expected text"),
        ({"instruction": "x", "output": 5}, "output is a number, expected text"),
        ({"instruction": "x", "output": "y", "input": 5}, "input is a number, expected text"),
        ({"instruction": "x", "output": "y", "system": ["s"]}, "system is a list, expected text"),
        ({"instruction": "x", "output": "y", "history": "z"}, "history is text, expected a list"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history[0] is not a pair [question, answer]"),
        ({"instruction": "x", "output": "y", "history": [["a", None]]}, "history[0][1] is missing or null"),
        ({"conversations": {"from": "human"}}, "conversations is an object, expected a list"),
        ({"conversations": ["x"]}, "conversations[0] is text, expected an object with from and value"),
        (
            {"conversations": [{"from": "humn", "value": "x"}]},
            "conversations[0].from is 'humn'; did you mean 'human'?",
        ),
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
    "record", [{}, {"prompt": "x"}, {"completion": "x"}, {"instruction": "x"}, {"texts": "x"}, {"conversation": []}]
)
def test_a_record_of_other_fields_is_nobody_s(parsers: dict[str, Parser], record: dict[str, Any]) -> None:
    assert [name for name, parser in parsers.items() if parser.accepts(record)] == []


def test_a_parser_that_is_named_for_a_record_of_other_fields_says_what_it_misses(parsers: dict[str, Parser]) -> None:
    """`data.format` sends every row to one parser, which then never asked whether it accepts it."""
    for parser in parsers.values():
        with pytest.raises(DataError, match=r"^x\.jsonl:7: \w+ is missing or null"):
            parser.parse({"other": "x"}, WHERE)


def test_message_of_a_role_other_than_assistant_may_be_trained_when_said_so() -> None:
    assert [Message(role, "x").trained for role in ("system", "user", "assistant", "tool")] == [
        False,
        False,
        True,
        False,
    ]
    assert Message("user", "x", trainable=True).trained
    assert not Message("assistant", "x", trainable=False).trained


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"instruction": "x", "ouput": "y"},
            "the field 'ouput' is unknown; did you mean 'output' of the format alpaca (instruction, output)? If n",
        ),
        (
            {"Messages": [], "id": 7},
            "the field 'Messages' is unknown; did you mean 'messages' of the format messages (",
        ),
        (
            {"prompts": "x", "completions": "y"},
            "the fields 'prompts', 'completions' are unknown; did you mean 'prompt', 'completion' of the format pro",
        ),
        (
            {"instruction": "x", "context": "", "response": "y"},
            "the format alpaca (instruction, output) needs 'output' too, and the row has 'context', 'instruction', 'r",
        ),
        (
            {"a": 1, "b": 2},
            "no format has the fields 'a', 'b'; known are messages: messages; prompt-completion: prompt, ",
        ),
    ],
)
def test_a_row_of_no_format_is_compared_with_the_nearest_one(
    parsers: dict[str, Any], record: dict[str, Any], message: str
) -> None:
    from sftx.config.options import DataConfig, Source
    from sftx.data.row_encoder import EncodedRow, parse_record

    with pytest.raises(DataError) as refused:
        parse_record(record, EncodedRow(WHERE), parsers, Source("rows.jsonl"), DataConfig())
    assert str(refused.value).startswith(f"{WHERE}: {message}")
    assert ("known are" in str(refused.value)) == ("a" in record)
