"""A record that a built-in parser cannot read raises one line: the place, the value there, the expected value."""

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


# Each record with the facts of its error, in order: the place, the value there, the expected value.
REFUSED: list[tuple[Parser, dict[str, Any], str]] = [
    (Messages(), {"messages": {}}, "messages … an object … a list"),
    (Messages(), {"messages": ["x"]}, "messages[0] … text … role and content"),
    (Messages(), {"messages": [{"role": "asistant"}]}, "messages[0].role … 'asistant' … did you mean 'assistant'?"),
    (Messages(), {"messages": [{"role": "nobody"}]}, "messages[0].role … 'nobody' … system, user"),
    (Messages(), says(contnet="x"), "messages[1] … 'contnet' … did you mean 'content'?"),
    (Messages(), {"messages": [{"rôle": "user", "content": "x"}]}, "messages[0] … 'rôle' … did you mean 'role'?"),
    (ShareGPT(), {"conversations": [{"from": "human", "vaule": "x"}]}, "conversations[0] … did you mean 'value'?"),
    (
        Messages(),
        calling(name="f", arguments='{"a": "\t"}'),
        "messages[1].tool_calls[0] … arguments … Invalid control character at character",
    ),
    (Messages(), {"messages": [{"role": "Assistant"}]}, "messages[0].role … 'Assistant' … 'assistant'"),
    (Messages(), {"messages": [{"role": "x" * 10**6}]}, "messages[0].role … 'xxxx"),
    (Messages(), {"messages": [{"content": "x"}]}, "messages[0].role … missing or null … system"),
    (Messages(), {"messages": [{"role": DEEP}]}, "messages[0].role … a list … system"),
    (Messages(), {"messages": [{"role": 10**5000}]}, "messages[0].role … a number … system"),
    (Messages(), says(), "messages[1].content … missing or null … text"),
    (Messages(), says(content={"a": 1}), "messages[1].content … an object … text"),
    (Messages(), says(content=[{"type": "image_url"}]), "messages[1].content[0].type … 'image_url' … text"),
    (Messages(), says(content=["x"]), "messages[1].content[0] … text … type and text"),
    (Messages(), says(content="x", reasoning=7), "messages[1].reasoning … a number … text"),
    (Messages(), says(content="x", train="yes"), "messages[1].train … 'yes' … true or false"),
    (
        Messages(),
        says(content="x", weight=float("nan")),
        "messages[1].weight … nan … from 0 to 1e+06",
    ),
    (Messages(), says(content="x", weight=-1), "messages[1].weight … -1 … from 0 to 1e+06"),
    (
        Messages(),
        says(content="x", loss_weight=10**5000),
        "messages[1].loss_weight … a number … from 0 to 1e+06",
    ),
    (Messages(), says(content="x", train=True, weight=0), "messages[1].train … true … weight … 0"),
    (Messages(), {"messages": [USER | {"tool_calls": [CALL]}]}, "messages[0] … user … tool calls"),
    (Messages(), {"messages": [USER | {"reasoning": "x"}]}, "messages[0] … user … reasoning"),
    (
        Messages(),
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": 7}]},
        "messages[0].tool_call_id … a number … text",
    ),
    (Messages(), calling(arguments={}), "messages[1].tool_calls[0] … name … missing or null"),
    (Messages(), calling(name=" "), "messages[1].tool_calls[0] … name … empty"),
    (
        Messages(),
        calling(name="f", arguments=[1]),
        "messages[1].tool_calls[0] … arguments … a list … an object",
    ),
    (
        Messages(),
        calling(name="f", arguments="{'a': 1}"),
        "messages[1].tool_calls[0] … arguments … valid JSON … at character 2",
    ),
    (Messages(), calling(name="f", arguments={"a": float("inf")}), "messages[1].tool_calls[0] … inf … JSON"),
    (
        Messages(),
        calling(name="f", arguments='{"a": NaN}'),
        "messages[1].tool_calls[0] … arguments … nan … JSON",
    ),
    (Messages(), calling(name="f", arguments={"a": 10**5000}), "messages[1].tool_calls[0] … a number … JSON"),
    (
        Messages(),
        calling(name="f", arguments='{"a": ' + "7" * 5000 + "}"),
        "messages[1].tool_calls[0] … arguments … digits",
    ),
    (Messages(), calling(name="f", arguments={"a": DEEP}), "messages[1].tool_calls[0] … nested … 64"),
    (Messages(), calling(name="f", arguments="[" * 10**5), "messages[1].tool_calls[0] … arguments … nested"),
    (Messages(), calling(name="f", arguments={7: 1}), "messages[1].tool_calls[0] … key 7 … text"),
    (Messages(), calling(name="f", arguments={"a": b"x"}), "messages[1].tool_calls[0] … bytes … JSON"),
    (Messages(), calling(name="f", id=7), "messages[1].tool_calls[0].id … a number … text"),
    (Messages(), calling(type="code", function=CALL), "messages[1].tool_calls[0].type … 'code' … 'function'"),
    (Messages(), calling(function="f"), "messages[1].tool_calls[0].function … text … name"),
    (Messages(), says(tool_calls=[7]), "messages[1].tool_calls[0] … a number … name"),
    (Messages(), says(tool_calls=7), "messages[1].tool_calls … a number … a list"),
    (Messages(), {"messages": [USER], "tools": [7]}, "tools[0] … a number … name"),
    (Messages(), {"messages": [USER], "tools": {}}, "tools … an object … a list"),
    (Messages(), {"messages": [USER], "tools": "[{]"}, "tools … valid JSON"),
    (Messages(), {"messages": [USER], "tools": [{"type": "function"}]}, "tools[0] … name … missing"),
    (PromptCompletion(), {"prompt": "x", "completion": None}, "completion … missing or null … text"),
    (Alpaca(), {"instruction": "x", "output": ["good", "bad"]}, "output … a list … text"),
    (Alpaca(), {"instruction": "x", "output": "y", "history": [["x"]]}, "history[0] … [question, answer]"),
    (ShareGPT(), {"conversations": [{"from": "human", "text": "x"}]}, "conversations[0].value … missing or null"),
    (ShareGPT(), {"conversations": [{"from": "humam", "value": "x"}]}, "conversations[0].from … 'humam' … 'human'?"),
    (
        ShareGPT(),
        {"conversations": [{"from": "function_call", "value": "f()"}]},
        "conversations[0].value … valid JSON",
    ),
    (
        ShareGPT(),
        {"conversations": [{"from": "function_call", "value": "[]"}]},
        "conversations[0].value … '[]' … JSON",
    ),
    (
        ShareGPT(),
        {"conversations": [{"from": "system", "value": "a"}], "system": "b"},
        "system … first turn",
    ),
    (HHRLHF(), {"chosen": "Hello"}, "chosen … 'Hello' … 'Human:' … 'Assistant:'"),
    (HHRLHF(), {"chosen": ""}, "chosen … '' … 'Human:'"),
    (HHRLHF(), {"chosen": {"a": 1}}, "chosen … an object … text"),
    (Text(), {"text": ["x"]}, "text … a list … text"),
    (TokenIds(), {"input_ids": [1, True]}, "input_ids[1] … True … whole number"),
    (TokenIds(), {"input_ids": [1, 2], "labels": [1]}, "labels … 1 … 2 input_ids"),
    (TokenIds(), {"input_ids": [1, 2], "labels": 1}, "labels … a number … a list"),
    (TokenIds(), {"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "labels[0] … 2 … input_ids[0] … 1 … shifted"),
    (TokenIds(), {"input_ids": [1, 2, 3], "labels": [-100, 9, 3]}, "labels[1] … 9 … input_ids[1] … 2"),
    (TokenIds(), {"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask[1] … 2 … 0 or 1"),
    (TokenIds(), {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask … 0"),
    (TokenIds(), {"input_ids": [1, 2], "attention_mask": [1, 2]}, "attention_mask[1] … 2 … 0 or 1"),
]


@pytest.mark.parametrize(("parser", "record", "facts"), REFUSED, ids=lambda value: getattr(value, "fields", ""))
def test_what_cannot_be_read_is_refused_by_its_place(parser: Parser, record: dict[str, Any], facts: str) -> None:
    pattern = ".*".join(re.escape(fact) for fact in facts.split(" … "))
    with pytest.raises(DataError, match=rf"^rows\.jsonl:7: {pattern}") as caught:
        parser.parse(record, WHERE)
    assert len(str(caught.value)) < 400, "the error is one line, however long the value is"
    assert "\n" not in str(caught.value)


def test_a_kto_label_is_refused() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(DataError, match=r"^a\.jsonl:1: label .*--plugin kto"):
        Messages().parse({"messages": messages, "label": False}, Location("a.jsonl", 1))
    assert Messages().parse({"messages": messages, "label": "sports"}, Location("a.jsonl", 1))
