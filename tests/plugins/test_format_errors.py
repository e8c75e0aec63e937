"""What no built-in format can read is refused in one line: the place, what stands there, what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sftx import DataError, Location, Parser
from sftx_plugins.parsers.alpaca import Alpaca
from sftx_plugins.parsers.hh_rlhf import HHRLHF
from sftx_plugins.parsers.messages import Messages
from sftx_plugins.parsers.prompt_completion import PromptCompletion
from sftx_plugins.parsers.sharegpt import ShareGPT
from sftx_plugins.parsers.text import Text
from sftx_plugins.parsers.tokens import TokenIds

WHERE = Location("rows.jsonl", 7)
USER = {"role": "user", "content": "x"}
CALL = {"name": "f", "arguments": {}}
DEEP: Any = 0
for _ in range(900):
    DEEP = [DEEP]


def says(**keys: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **keys}]}


def calling(**call: Any) -> dict[str, Any]:
    return says(tool_calls=[call])


REFUSED: list[tuple[Parser, dict[str, Any], str]] = [
    (Messages(), {"messages": {}}, "messages is an object, expected a list"),
    (Messages(), {"messages": ["x"]}, "messages[0] is text, expected an object with role and content"),
    (Messages(), {"messages": [{"role": "asistant"}]}, "messages[0].role is 'asistant', expected system, user"),
    (Messages(), {"messages": [{"role": "Assistant"}]}, "did you mean 'assistant'?"),
    (Messages(), {"messages": [{"role": "x" * 10**6}]}, "messages[0].role is 'xxxx"),
    (Messages(), {"messages": [{"content": "x"}]}, "messages[0].role is missing or null, expected system"),
    (Messages(), {"messages": [{"role": DEEP}]}, "messages[0].role is a list, expected system"),
    (Messages(), {"messages": [{"role": 10**5000}]}, "messages[0].role is a number, expected system"),
    (Messages(), says(), "messages[1].content is missing or null, expected text"),
    (Messages(), says(content={"a": 1}), "messages[1].content is an object, expected text"),
    (Messages(), says(content=[{"type": "image_url"}]), "messages[1].content[0].type is 'image_url', expected text"),
    (Messages(), says(content=["x"]), "messages[1].content[0] is text, expected an object with type and text"),
    (Messages(), says(content="x", reasoning=7), "messages[1].reasoning is a number, expected text"),
    (Messages(), says(content="x", train="yes"), "messages[1].train is 'yes', expected true or false"),
    (
        Messages(),
        says(content="x", weight=float("nan")),
        "messages[1].weight is nan, expected a number from 0 to 1e+06",
    ),
    (Messages(), says(content="x", weight=-1), "messages[1].weight is -1, expected a number"),
    (
        Messages(),
        says(content="x", loss_weight=10**5000),
        "messages[1].loss_weight is a number, expected a number from 0",
    ),
    (Messages(), says(content="x", train=True, weight=0), "messages[1].train is true and weight is 0"),
    (Messages(), {"messages": [USER | {"tool_calls": [CALL]}]}, "messages[0] is a turn of the user and has tool calls"),
    (Messages(), {"messages": [USER | {"reasoning": "x"}]}, "messages[0] is a turn of the user and has reasoning"),
    (
        Messages(),
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": 7}]},
        "messages[0].tool_call_id is a num",
    ),
    (Messages(), calling(arguments={}), "messages[1].tool_calls[0]: the function's name is missing or null"),
    (Messages(), calling(name=" "), "messages[1].tool_calls[0]: the function's name is empty"),
    (
        Messages(),
        calling(name="f", arguments=[1]),
        "messages[1].tool_calls[0]: arguments are a list, expected an object",
    ),
    (Messages(), calling(name="f", arguments="{'a': 1}"), "messages[1].tool_calls[0]: arguments is no valid JSON"),
    (Messages(), calling(name="f", arguments={"a": float("inf")}), "messages[1].tool_calls[0] holds inf, which JSON"),
    (
        Messages(),
        calling(name="f", arguments='{"a": NaN}'),
        "messages[1].tool_calls[0]: arguments holds nan, which JSON",
    ),
    (Messages(), calling(name="f", arguments={"a": 10**5000}), "messages[1].tool_calls[0] holds a number, which JSON"),
    (Messages(), calling(name="f", arguments='{"a": ' + "7" * 5000 + "}"), "or has a number of too many digits"),
    (Messages(), calling(name="f", arguments={"a": DEEP}), "messages[1].tool_calls[0] is nested more than 64 deep"),
    (Messages(), calling(name="f", arguments="[" * 10**5), "messages[1].tool_calls[0]: arguments is JSON nested too"),
    (Messages(), calling(name="f", arguments={7: 1}), "messages[1].tool_calls[0] has the key 7, expected text"),
    (Messages(), calling(name="f", arguments={"a": b"x"}), "messages[1].tool_calls[0] holds bytes, which JSON cannot"),
    (Messages(), calling(name="f", id=7), "messages[1].tool_calls[0].id is a number, expected text"),
    (Messages(), calling(type="code", function=CALL), "messages[1].tool_calls[0].type is 'code', expected 'function'"),
    (Messages(), calling(function="f"), "messages[1].tool_calls[0].function is text, expected an object with a name"),
    (Messages(), says(tool_calls=[7]), "messages[1].tool_calls[0] is a number, expected an object with name"),
    (Messages(), says(tool_calls=7), "messages[1].tool_calls is a number, expected a list"),
    (Messages(), {"messages": [USER], "tools": [7]}, "tools[0] is a number, expected an object with the name"),
    (Messages(), {"messages": [USER], "tools": {}}, "tools is an object, expected a list"),
    (Messages(), {"messages": [USER], "tools": "[{]"}, "tools is no valid JSON: "),
    (Messages(), {"messages": [USER], "tools": [{"type": "function"}]}, "tools[0]: the function's name is missing"),
    (PromptCompletion(), {"prompt": "x", "completion": None}, "completion is missing or null, expected text"),
    (Alpaca(), {"instruction": "x", "output": ["good", "bad"]}, "output is a list, expected text"),
    (Alpaca(), {"instruction": "x", "output": "y", "history": [["x"]]}, "history[0] is no pair [question, answer]"),
    (ShareGPT(), {"conversations": [{"from": "human", "text": "x"}]}, "conversations[0].value is missing or null"),
    (ShareGPT(), {"conversations": [{"from": "humam", "value": "x"}]}, "did you mean 'human'?"),
    (
        ShareGPT(),
        {"conversations": [{"from": "function_call", "value": "f()"}]},
        "conversations[0].value is no valid JSON",
    ),
    (
        ShareGPT(),
        {"conversations": [{"from": "function_call", "value": "[]"}]},
        "conversations[0].value is '[]', expected",
    ),
    (
        ShareGPT(),
        {"conversations": [{"from": "system", "value": "a"}], "system": "b"},
        "has a text in system and another one in its first turn",
    ),
    (HHRLHF(), {"chosen": "Hello"}, "chosen begins with 'Hello', expected 'Human:' or 'Assistant:'"),
    (HHRLHF(), {"chosen": ""}, "chosen begins with '', expected 'Human:'"),
    (HHRLHF(), {"chosen": {"a": 1}}, "chosen is an object, expected text"),
    (Text(), {"text": ["x"]}, "text is a list, expected text"),
    (TokenIds(), {"input_ids": [1, True]}, "input_ids[1] is True, expected a whole number"),
    (TokenIds(), {"input_ids": [1, 2], "labels": [1]}, "labels has 1 values for 2 input_ids; give one each"),
    (TokenIds(), {"input_ids": [1, 2], "labels": 1}, "labels is a number, expected a list"),
    (TokenIds(), {"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "they are shifted by one, which sftx does itself"),
    (TokenIds(), {"input_ids": [1, 2, 3], "labels": [-100, 9, 3]}, "labels[1] of the tokens without padding is 9"),
    (TokenIds(), {"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask[1] is 2, expected 0 or 1"),
    (TokenIds(), {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask has a 0 between its ones"),
    (TokenIds(), {"input_ids": [1, 2], "attention_mask": [1, 2]}, "attention_mask[1] is 2, expected 0 or 1"),
]


@pytest.mark.parametrize(("parser", "record", "message"), REFUSED, ids=lambda value: getattr(value, "fields", ""))
def test_what_cannot_be_read_is_refused_by_its_place(parser: Parser, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^rows\.jsonl:7: .*{re.escape(message)}") as caught:
        parser.parse(record, WHERE)
    assert len(str(caught.value)) < 400, "an error is a line, however long the value was"
    assert "\n" not in str(caught.value)


def test_an_answer_that_is_said_to_be_bad_is_not_trained_on() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(DataError, match=r"label says whether the answer is a good one \(KTO\)"):
        Messages().parse({"messages": messages, "label": False}, Location("a.jsonl", 1))
    assert Messages().parse({"messages": messages, "label": "sports"}, Location("a.jsonl", 1))
