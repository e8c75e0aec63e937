"""The built-in parsers: real data sets, comparisons with other libraries, and the fields of a turn."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sftx import Conversation, DataError, Location, Message, Parser, PlainText, Tokens, ToolCall
from sftx.assembly.discovery import load_class
from sftx.assembly.entry_points import discover, find
from sftx.config.default_plugins import DEFAULT_PLUGINS
from sftx_plugins.parsers.alpaca import Alpaca
from sftx_plugins.parsers.hh_rlhf import HHRLHF
from sftx_plugins.parsers.messages import Messages
from sftx_plugins.parsers.prompt_completion import PromptCompletion
from sftx_plugins.parsers.sharegpt import ShareGPT
from sftx_plugins.parsers.tokens import TokenIds

ASSETS = Path(__file__).parents[2] / ".assets"
WHERE = Location("rows.jsonl", 7)
PARSERS: dict[str, Parser] = {name: load_class(find(name, discover()))() for name in DEFAULT_PLUGINS["sftx_parser"]}
USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def asset(name: str) -> str:
    path = ASSETS / name
    assert path.exists(), f"{path} is missing; run `make assets`"
    return path.read_text(encoding="utf-8")


def demo_set(name: str) -> list[dict[str, Any]]:
    text = asset(f"llamafactory/{name}")
    rows: list[dict[str, Any]] = (
        json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))
    )
    return rows


def format_of(record: dict[str, Any]) -> str:
    return next((name for name, parser in PARSERS.items() if parser.accepts(record)), "")


def one(parser: Parser, record: dict[str, Any]) -> Conversation:
    (found,) = parser.parse(record, WHERE)
    assert isinstance(found, Conversation)
    return found


def parse_set(name: str, format_: str) -> list[Conversation]:
    rows = demo_set(name)
    assert {format_of(row) for row in rows} == {format_}
    return [one(PARSERS[format_], row) for row in rows]


# --- which format takes a record -----------------------------------------------------------------

ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "messages": ({"messages": [USER]}, ("messages",)),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, ("prompt-completion",)),
    "alpaca": ({"instruction": "a", "input": "", "output": "b"}, ("alpaca",)),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}]}, ("sharegpt",)),
    "minimind": ({"conversations": [USER]}, ("sharegpt",)),
    "hh-rlhf": ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, ("hh-rlhf",)),
    "plain text": ({"text": "a", "url": "b", "timestamp": "c"}, ("text",)),
    "token ids": ({"input_ids": [1], "attention_mask": [1], "labels": [1]}, ("tokens",)),
    # The first one gets the record: the format with the most structure, and text before token ids.
    "alpaca with its rendered text": ({"instruction": "a", "output": "b", "text": "c"}, ("alpaca", "text")),
    "messages that were tokenised too": ({"messages": [USER], "input_ids": [1]}, ("messages", "tokens")),
    "ultrafeedback": ({"prompt": "a", "chosen": [USER], "rejected": [USER], "messages": [USER]}, ("messages",)),
    # Preference pairs need another plugin: without their answers they are not conversations to train on.
    "a pair of LLaMA-Factory's": ({"conversations": [], "chosen": {}, "rejected": {}}, ()),
    "a pair of TRL's": ({"prompt": "a", "chosen": "b", "rejected": "c"}, ()),
    "something else": ({"question": "a", "answer": "b"}, ()),
}


@pytest.mark.parametrize(("record", "takers"), ROWS.values(), ids=ROWS)
def test_the_parsers_that_accept_a_record(record: dict[str, Any], takers: tuple[str, ...]) -> None:
    assert tuple(name for name, parser in PARSERS.items() if parser.accepts(record)) == takers


def test_each_sample_is_taken_by_its_own_format() -> None:
    for name, parser in PARSERS.items():
        assert {format_of(dict(sample)) for sample in parser.samples} == {name}


# --- LLaMA-Factory's demo sets, unedited ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows"), [("alpaca_en_demo.json", 999), ("alpaca_zh_demo.json", 1000), ("identity.json", 91)]
)
def test_alpaca_demo_sets(name: str, rows: int) -> None:
    found = parse_set(name, "alpaca")
    assert len(found) == rows
    for row, conversation in zip(demo_set(name), found, strict=True):
        question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        assert conversation.messages == (Message("user", question), Message("assistant", row["output"]))
    placeholders = sum("{{name}}" in m.content for conversation in found for m in conversation.messages)
    assert (placeholders > 0) == (name == "identity.json")


@pytest.mark.parametrize(
    ("name", "turns", "calls", "tools"),
    [
        ("glaive_toolcall_en_demo.json", {"user": 746, "assistant": 746 + 211, "tool": 211}, 211, 219),
        ("glaive_toolcall_zh_demo.json", {"user": 722, "assistant": 724 + 216, "tool": 218}, 216, 239),
    ],
)
def test_tool_call_demo_sets(name: str, turns: dict[str, int], calls: int, tools: int) -> None:
    found = parse_set(name, "sharegpt")
    assert len(found) == 300
    assert Counter(m.role for conversation in found for m in conversation.messages) == turns
    made = [call for conversation in found for m in conversation.messages for call in m.tool_calls]
    written = [
        json.loads(t["value"]) for r in demo_set(name) for t in r["conversations"] if t["from"] == "function_call"
    ]
    assert len(made) == calls
    assert [{"name": call.name, "arguments": call.arguments} for call in made] == written
    declared = [json.loads(row["tools"]) for row in demo_set(name)]
    assert [[tool["function"] for tool in conversation.tools] for conversation in found] == declared
    assert sum(map(len, declared)) == tools


def test_the_demo_set_of_reasoning_and_tools() -> None:
    rows = demo_set("reason_tool_use_demo_50.jsonl")
    # Two rows have their reasoning in a part of its own, and a stray </think> in the text after it.
    stray = [row for row in rows if any("</think>" in str(turn["content"]) for turn in row["messages"])]
    for row in stray:
        with pytest.raises(
            DataError, match=r"a part of messages\[.\].content and messages\[.\].content have different"
        ):
            PARSERS["messages"].parse(row, WHERE)
    rows = [row for row in rows if row not in stray]
    assert len(rows) == 48
    assert {format_of(row) for row in rows} == {"messages"}
    found = [one(PARSERS["messages"], row) for row in rows]
    turns = [m for conversation in found for m in conversation.messages]
    assert Counter(m.role for m in turns) == {"assistant": 109, "user": 68, "system": 48, "tool": 41}
    assert sum(bool(m.reasoning) for m in turns) == 109
    assert Counter(len(m.tool_calls) for m in turns if m.role == "assistant") == {0: 57, 1: 41, 2: 8, 3: 3}
    assert sum(bool(m.content) for m in turns if m.role == "assistant") == 57
    assert [list(conversation.tools) for conversation in found] == [json.loads(row["tools"]) for row in rows]


def test_the_demo_set_of_parts_and_loss_weights() -> None:
    turns = [m for conversation in parse_set("v1_sft_demo.jsonl", "messages") for m in conversation.messages]
    assert Counter((m.role, m.trainable, m.weight) for m in turns) == {
        ("user", False, 1.0): 500,
        ("assistant", True, 1.0): 500,
    }
    assert all(isinstance(m.content, str) and m.content for m in turns)


def test_the_demo_set_of_plain_text() -> None:
    rows = demo_set("c4_demo.jsonl")
    assert [PARSERS[format_of(row)].parse(row, WHERE) for row in rows] == [(PlainText(row["text"]),) for row in rows]
    assert len(rows) == 300


@pytest.mark.parametrize("name", ["mllm_demo.json", "mllm_audio_demo.json", "mllm_video_demo.json"])
def test_rows_with_images_or_audio_are_refused_with_the_field(name: str) -> None:
    for row in demo_set(name):
        with pytest.raises(DataError, match=r"^rows.jsonl:7: (images|audios|videos) cannot be trained on, only text"):
            PARSERS[format_of(row)].parse(row, WHERE)


# --- oracles -----------------------------------------------------------------------------------------


def test_from_and_value_are_read_as_trl_reads_them() -> None:
    from trl.data_utils import maybe_convert_to_chatml

    rows = [row for name in ("glaive_toolcall_en_demo.json", "glaive_toolcall_zh_demo.json") for row in demo_set(name)]
    plain = [row for row in rows if all(turn["from"] in ("human", "gpt") for turn in row["conversations"])]
    assert len(plain) > 200
    roles = {"human": "user", "gpt": "assistant"}
    for row in plain:
        converted = maybe_convert_to_chatml(copy.deepcopy(row))
        expected = [(roles[m["role"]], m["content"]) for m in converted["messages"]]
        assert [(m.role, m.content) for m in one(ShareGPT(), row).messages] == expected


# --- messages ------------------------------------------------------------------------------------------


def message(**keys: Any) -> Message:
    return one(Messages(), {"messages": [keys]}).messages[0]


@pytest.mark.parametrize(
    ("written", "role"),
    [
        ("developer", "system"),
        ("model", "assistant"),
        ("function", "tool"),
        ("ipython", "tool"),
        ("observation", "tool"),
    ],
)
def test_other_words_for_roles(written: str, role: str) -> None:
    assert message(role=written, content="x").role == role


CALL = {"name": "f", "arguments": {"city": "北京", "days": 3}}


@pytest.mark.parametrize(
    "calls",
    [
        [{"id": "1", "type": "function", "function": CALL}],
        [{"id": "1", "type": "function", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}],
        [{"id": "1", "type": None, "function": CALL, "index": None}],
        [{"id": "1", **CALL}],
        json.dumps([{"id": "1", "function": CALL}]),
        json.dumps({"id": "1", **CALL}, ensure_ascii=False),
        [json.dumps({"id": "1", **CALL})],
    ],
)
def test_tool_calls_in_every_usual_form(calls: Any) -> None:
    expected = (ToolCall("f", {"city": "北京", "days": 3}, "1"),)
    for content in (None, "", "Let me see."):
        said = message(role="assistant", content=content, tool_calls=calls)
        assert (said.content, said.tool_calls) == (content or "", expected)
    assert message(role="assistant", tool_calls=calls).tool_calls == expected


def test_openais_former_function_call_and_its_result() -> None:
    call = {"name": "f", "arguments": "{}"}
    turns = [
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "f", "content": "7"},
    ]
    assert one(Messages(), {"messages": turns}).messages == (
        Message("assistant", "", tool_calls=(ToolCall("f", {}),)),
        Message("tool", "7", name="f"),
    )


@pytest.mark.parametrize("parser", [Messages(), ShareGPT()], ids=["messages", "sharegpt"])
def test_a_null_is_the_same_as_a_missing_key(parser: Parser) -> None:
    turn = {"role": "assistant", "content": "x"}
    nulls = dict.fromkeys(("tool_calls", "function_call", "reasoning_content", "reasoning", "name", "weight", "train"))
    name = "messages" if isinstance(parser, Messages) else "conversations"
    assert one(parser, {name: [turn | nulls], "tools": None}) == one(parser, {name: [turn]})
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    calling: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call | extra]}
        for extra in ({}, {"id": None, "type": None})
    ]
    assert one(parser, {name: calling[1:]}) == one(parser, {name: calling[:1]})


VALUES: dict[str, Any] = {
    "null": None,
    "nulls": [None, {"deep": None}, [None]],
    "enum": ["a", None],
    "type": ["integer", "null"],
    "whole": 1,
    "float": 1.0,
    "tiny": 1e-7,
    "big": 10**40,
    "minus zero": -0.0,
    "true": True,
    "z comes first": 0,
    "a comes last": 0,
    "": "empty key",
    "é 世界 🙂": 'é 世界 🙂 \u2028 " \\ / \x00',
    "lone surrogate": "\ud83d",
}


def test_tools_and_arguments_are_the_same_as_objects_and_as_json_text() -> None:
    """Nulls, kinds of numbers and the order of keys are kept; of two equal keys, JSON keeps the last."""
    parameters = {"type": "object", "properties": {"n": VALUES | {"default": None}}}
    tool = {
        "type": "function",
        "function": {"name": "f", "description": None, "strict": None, "parameters": parameters},
    }
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": VALUES}]}]
    line = json.dumps({"messages": turns, "tools": [tool]}).replace('"float":', '"float": 2, "float":')
    as_objects = json.loads(line)
    as_text = copy.deepcopy(as_objects)
    as_text["tools"] = json.dumps(as_objects["tools"])
    call = as_text["messages"][1]["tool_calls"][0]
    as_text["messages"][1]["tool_calls"] = json.dumps([call])
    nested = copy.deepcopy(as_objects)
    nested["tools"] = [json.dumps(tool) for tool in nested["tools"]]
    nested["messages"][1]["tool_calls"][0]["arguments"] = json.dumps(call["arguments"])
    for row in (as_objects, as_text, nested):
        found = one(Messages(), row)
        assert json.dumps(found.tools) == json.dumps([tool])
        assert json.dumps(found.messages[1].tool_calls[0].arguments) == json.dumps(VALUES)
        function = {"from": "function_call", "value": row["messages"][1]["tool_calls"]}
        shared = one(ShareGPT(), {"conversations": [function], "tools": row["tools"]})
        assert json.dumps(shared.tools) == json.dumps([tool])
        assert json.dumps(shared.messages[0].tool_calls[0].arguments) == json.dumps(VALUES)


def test_the_result_of_a_tool_keeps_its_text() -> None:
    for text in ('{"a": null, "b": 1.0, "a": 2}', "null", '["\\u4e16"]'):
        assert message(role="tool", content=text).content == text


def test_parts_are_joined() -> None:
    parts = [
        {"type": "thinking", "thinking": "Hm. "},
        {"type": "text", "text": "a", "image_url": None},
        {"type": "text", "value": "b"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'},
    ]
    said = message(role="assistant", content=parts)
    assert (said.content, said.reasoning, said.tool_calls) == ("ab", "Hm. ", (ToolCall("f", {}),))


@pytest.mark.parametrize(
    ("keys", "trainable", "weight"),
    [
        ({}, None, 1.0),
        ({"train": False}, False, 1.0),
        ({"train": True}, True, 1.0),
        ({"trainable": False, "weight": 0.5}, False, 0.5),
        ({"training": True, "weight": 2}, True, 2.0),
        ({"weight": 0}, False, 1.0),
        ({"weight": 0.5}, None, 0.5),
        ({"train": False, "weight": 0}, False, 1.0),
        ({"loss_weight": 0.0}, False, 1.0),
        ({"loss_weight": 0.5}, True, 0.5),
        ({"weight": None, "train": None}, None, 1.0),
    ],
)
def test_the_training_fields_of_a_message(keys: dict[str, Any], trainable: bool | None, weight: float) -> None:
    said = message(role="assistant", content="x", **keys)
    assert (said.trainable, said.weight) == (trainable, weight)


def test_tools_bare_or_wrapped_as_a_list_or_as_json_text() -> None:
    bare = TOOL["function"]
    for tools in ([TOOL], [bare], json.dumps([TOOL]), json.dumps([bare]), [json.dumps(bare)], [TOOL | {"type": None}]):
        assert one(Messages(), {"messages": [USER], "tools": tools}).tools == (TOOL,)
    for tools in (None, "", "[]", []):
        assert one(Messages(), {"messages": [USER], "tools": tools}).tools == ()


# --- the other formats -----------------------------------------------------------------------------------


def test_prompt_and_completion() -> None:
    record = {
        "prompt": [USER, {"role": "assistant", "content": "a"}, USER],
        "completion": "<think>\nb\n</think>\n\nc",
        "tools": [TOOL],
    }
    found = one(PromptCompletion(), record)
    assert [m.trained for m in found.messages] == [False, False, False, True]
    assert found.messages[-1] == Message("assistant", "c", reasoning="b")
    assert found.tools == (TOOL,)


def test_alpaca_with_all_its_fields() -> None:
    record = {
        "system": "s",
        "history": [["q", "<think>t</think>a"]],
        "instruction": "",
        "input": "only an input",
        "output": "o",
        "tools": json.dumps([TOOL]),
    }
    assert one(Alpaca(), record) == Conversation(
        (
            Message("system", "s"),
            Message("user", "q"),
            Message("assistant", "a", reasoning="t"),
            Message("user", "only an input"),
            Message("assistant", "o"),
        ),
        tools=(TOOL,),
    )


def test_sharegpt_takes_both_styles_of_keys_in_one_row() -> None:
    turns = [
        {"from": "human", "value": "a", "role": None},
        {"role": "assistant", "content": "b", "from": None, "value": None},
        {"from": "bing", "value": "c"},
        {"from": "user", "content": "d"},
    ]
    found = one(ShareGPT(), {"conversations": turns}).messages
    assert [(m.role, m.content) for m in found] == [
        ("user", "a"),
        ("assistant", "b"),
        ("assistant", "c"),
        ("user", "d"),
    ]


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_minimind_has_its_tools_in_the_system_turn(key: str, tools: Any) -> None:
    turns = [{"role": "system", "content": "s", key: tools, "tool_calls": "", "reasoning_content": ""}, USER]
    assert one(ShareGPT(), {"conversations": turns}) == Conversation(
        (Message("system", "s"), Message("user", "x")), tools=(TOOL,)
    )


def test_sharegpt_calls_alone_in_a_list_and_after_reasoning() -> None:
    call = '{"name": "f", "arguments": {"a": 1}}'
    for value, reasoning, number in (
        (call, "", 1),
        (f"[{call}, {call}]", "", 2),
        (f"<think>\nt\n</think>\n\n{call}", "t", 1),
        (json.loads(call), "", 1),
    ):
        (found,) = one(ShareGPT(), {"conversations": [{"from": "function_call", "value": value}]}).messages
        assert found == Message("assistant", "", reasoning=reasoning, tool_calls=(ToolCall("f", {"a": 1}),) * number)


def test_sharegpt_with_other_keys_and_words() -> None:
    parser = ShareGPT(role_key="speaker", content_key="said", roles={"顾客": "user", "bot": "assistant"})
    turns = [{"speaker": "顾客", "said": "a"}, {"speaker": "bot", "said": "b"}, {"from": "human", "value": "c"}]
    found = one(parser, {"conversations": turns}).messages
    assert [(m.role, m.content) for m in found] == [("user", "a"), ("assistant", "b"), ("user", "c")]


def test_a_system_text_equal_to_that_of_the_first_turn_is_kept_once() -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]
    assert len(one(ShareGPT(), {"conversations": turns, "system": "s"}).messages) == 2


def test_hh_rlhf_transcripts() -> None:
    chosen = "\n\nHuman: Name two.\n\nThree?\n\nAssistant: Human: and dog.\n\nHuman: Ok\n\nHuman: Go on\n\nAssistant:"
    assert one(HHRLHF(), {"chosen": chosen, "rejected": 7}).messages == (
        Message("user", "Name two.\n\nThree?"),
        Message("assistant", "Human: and dog."),
        Message("user", "Ok"),
        Message("user", "Go on"),
        Message("assistant", ""),
    )


def test_token_ids() -> None:
    def parsed(**record: Any) -> Tokens:
        (found,) = TokenIds().parse(record, WHERE)
        assert isinstance(found, Tokens)
        return found

    ids = [5, 6, 7]
    assert parsed(input_ids=ids) == Tokens((5, 6, 7), (True,) * 3)
    assert parsed(input_ids=ids, labels=[-100, 6, 7]) == Tokens((5, 6, 7), (False, True, True))
    for name in ("loss_mask", "completion_mask", "assistant_masks"):
        for mask in ([0, 1, 1], [False, True, True]):
            assert parsed(input_ids=ids, **{name: mask}) == Tokens((5, 6, 7), (False, True, True))
    both = parsed(input_ids=ids, labels=[-100, 6, 7], completion_mask=[1, 1, 0])
    assert both == Tokens((5, 6, 7), (False, True, False))
    for padded in (
        {"input_ids": [*ids, 0, 0], "labels": [-100, 6, 7, 3, -100], "attention_mask": [1, 1, 1, 0, 0]},
        {"input_ids": [0, 0, *ids], "loss_mask": [1, 1, 0, 1, 1], "attention_mask": [0, 0, 1, 1, 1]},
    ):
        assert parsed(**padded) == Tokens((5, 6, 7), (False, True, True))
    assert parsed(input_ids=[0, 0], attention_mask=[0, 0]) == Tokens((), ())
