"""Rows of any format are exported as messages, which are read back unchanged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftx import Conversation, DataError, Location, Message, Parsed, Parser, PlainText, Tokens, ToolCall
from sftx.config.options import DataConfig, Filters, Source
from sftx.data import export
from sftx.data.ledger import Ledger

WHERE = Location("x.jsonl", 1)


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    from sftx.assembly import registry
    from sftx.config import loading

    return registry.activate(loading.load(None)).parsers()


def read_back(parsers: dict[str, Parser], parsed: Parsed) -> Parsed:
    record = json.loads(json.dumps(export.to_record(parsed)))
    parser = next(parser for parser in parsers.values() if parser.accepts(record))
    (found,) = parser.parse(record, WHERE)
    return found


TEXT = st.text(max_size=12)
NAME = st.text(min_size=1, max_size=6).filter(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=3),
    max_leaves=6,
)
CALL = st.builds(ToolCall, NAME, st.dictionaries(NAME, JSON, max_size=3), st.none() | NAME)
TRAINING = {
    "trainable": st.none() | st.booleans(),
    "weight": st.just(1.0) | st.floats(min_value=0, max_value=1e6, exclude_min=True),
}
MESSAGE = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user"]), TEXT, **TRAINING),
    st.builds(Message, st.just("tool"), TEXT, **TRAINING, name=st.none() | NAME, tool_call_id=st.none() | NAME),
    st.builds(
        Message,
        st.just("assistant"),
        TEXT,
        **TRAINING,
        reasoning=TEXT,
        tool_calls=st.lists(CALL, max_size=3).map(tuple),
    ),
)
TOOL = st.builds(
    lambda name, about, parameters: {
        "type": "function",
        "function": {"name": name, "description": about, "parameters": parameters},
    },
    NAME,
    TEXT,
    st.dictionaries(NAME, JSON, max_size=3),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(MESSAGE, max_size=4).map(tuple), st.lists(TOOL, max_size=2).map(tuple))
def test_a_conversation_is_read_back_unchanged(
    parsers: dict[str, Parser], messages: tuple[Message, ...], tools: tuple[Any, ...]
) -> None:
    conversation = Conversation(messages, tools)
    assert read_back(parsers, conversation) == conversation


def test_text_and_tokens_are_read_back_unchanged(parsers: dict[str, Parser]) -> None:
    for parsed in (PlainText("床前明月光\r\n"), Tokens((5, 6, 7), (False, True, True))):
        assert read_back(parsers, parsed) == parsed


def test_every_sample_of_every_format_is_read_back_unchanged(parsers: dict[str, Parser]) -> None:
    for parser in parsers.values():
        for sample in parser.samples:
            found = parser.parse(sample, WHERE)
            if len(found) == 1:
                assert read_back(parsers, found[0]) == dataclasses.replace(found[0], extras={})


def test_conversations_are_written_in_the_format_of_openai() -> None:
    call = ToolCall("weather", {"city": "北京", "day": None}, "c1")
    messages = (
        Message("user", "Q"),
        Message("assistant", "", reasoning="R", tool_calls=(call,), trainable=False),
        Message("tool", "sun", name="weather", tool_call_id="c1"),
        Message("assistant", "A", weight=0.5),
        Message("assistant", "B", weight=0.0),
    )
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    assert export.to_record(Conversation(messages, (tool,))) == {
        "messages": [
            {"role": "user", "content": "Q"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "R",
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city": "北京", "day": null}'},
                    }
                ],
                "train": False,
            },
            {"role": "tool", "content": "sun", "name": "weather", "tool_call_id": "c1"},
            {"role": "assistant", "content": "A", "weight": 0.5},
            {"role": "assistant", "content": "B", "train": False},
        ],
        "tools": [tool],
    }


# --- whole sources ------------------------------------------------------------------------------

PAIR = {"prompt": "Q", "completion": "A"}
LONG = {"messages": [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]}


def written(
    parsers: dict[str, Parser], tmp_path: Path, *rows: Any, source: dict[str, Any] | None = None, **options: Any
) -> tuple[list[Any], Ledger]:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ledger = Ledger()
    source_list = [Source(str(file), **(source or {}))]
    lines = list(export.export_lines(source_list, DataConfig(**options), parsers, ledger))
    assert not any("\n" in line for line in lines)
    return [json.loads(line) for line in lines], ledger


def reasons(ledger: Ledger) -> list[tuple[int, str, str]]:
    return [(entry.where.number, entry.action, entry.reason) for entry in ledger.entries]


def test_rows_of_every_format_are_merged_in_order(parsers: dict[str, Parser], tmp_path: Path) -> None:
    sharegpt = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    rows, ledger = written(parsers, tmp_path, PAIR, sharegpt, {"text": "T"}, LONG)
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    assert rows == [
        {"messages": [question | {"train": False}, answer]},  # a prompt is never trained
        {"messages": [question, answer]},
        {"text": "T"},
        LONG,
    ]
    assert (ledger.num_rows, ledger.entries) == (4, [])


def test_filtered_and_invalid_rows_are_in_the_ledger(parsers: dict[str, Parser], tmp_path: Path) -> None:
    filters = Filters(duplicates="drop", max_turns=2)
    rows, ledger = written(
        parsers, tmp_path, PAIR, LONG, PAIR, {"prompt": 5, "completion": "A"}, {"text": "T"},
        filters=filters, invalid_rows="drop", max_dropped=0.5,
    )  # fmt: skip
    assert len(rows) == 2
    assert reasons(ledger) == [
        (2, "filtered", "filters.max_turns=2"),
        (3, "filtered", "the same as an earlier row"),
        (4, "dropped", "prompt is a number, expected text"),
    ]
    with pytest.raises(DataError, match=r"x\.jsonl:1: prompt is a number"):
        written(parsers, tmp_path, {"prompt": 5, "completion": "A"}, PAIR)
    with pytest.raises(DataError, match=r"x\.jsonl:1: prompt is a number.*max_dropped"):
        written(parsers, tmp_path, {"prompt": 5, "completion": "A"}, PAIR, invalid_rows="drop")


def test_options_that_decide_which_turns_are_trained_are_applied(parsers: dict[str, Parser], tmp_path: Path) -> None:
    (row,), _ = written(parsers, tmp_path, LONG, train_turns="last", system="S")
    assert [(m["role"], m.get("train")) for m in row["messages"]] == [
        ("system", None),
        ("user", None),
        ("assistant", False),
        ("user", None),
        ("assistant", None),
    ]


def test_columns_and_limit_of_the_source_are_applied(parsers: dict[str, Parser], tmp_path: Path) -> None:
    source = {"columns": {"prompt": "q", "completion": "a"}, "limit": 1}
    rows, _ = written(parsers, tmp_path, {"q": "Q", "a": "A"}, {"q": 5}, source=source)
    assert [m["content"] for m in rows[0]["messages"]] == ["Q", "A"]


def test_a_preference_pair_is_refused(tmp_path: Path) -> None:
    """As two lines, the rejected answer would be trained like the preferred one."""

    class Pairs:
        fields = "chosen, rejected"
        samples = ()

        def accepts(self, record: Any) -> bool:
            return True

        def parse(self, record: Any, where: Location) -> tuple[Parsed, ...]:
            return (PlainText("a"), PlainText("b"))

    with pytest.raises(DataError, match=r"x\.jsonl:1: its format makes 2 examples of it that belong together"):
        written({"pairs": Pairs()}, tmp_path, {"chosen": "a"})


def test_a_lone_surrogate_is_read_back_unchanged(parsers: dict[str, Parser], tmp_path: Path) -> None:
    rows, _ = written(parsers, tmp_path, {"text": "a \ud800 b"}, {"text": "é"})
    assert rows == [{"text": "a \ud800 b"}, {"text": "é"}]
