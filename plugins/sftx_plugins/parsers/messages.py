"""`{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}`: the format of OpenAI and TRL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sftx import Conversation, Location, Parser, Record, hookimpl
from sftx_plugins.parsers import _turns


@dataclass(frozen=True, eq=False)
class Messages:
    """Conversations as a list of messages with the roles system, user, assistant and tool.

    `developer` also means system, `model` assistant, and `function`, `ipython` and `observation` tool. A content is
    text or a list of text parts. An assistant's message may have `tool_calls` in OpenAI's format and reasoning, as
    `reasoning_content`, `reasoning` or `thinking`, or in `<think>...</think>` before its text. `train: false` leaves a
    message untrained, `train: true` trains it whatever its role; `weight` is its weight in the loss. A null is the same
    as a missing key, except within the arguments of a tool call and the definition of a tool.
    """

    fields: ClassVar[str] = "messages (tools)"
    samples: ClassVar[Sequence[Record]] = (
        {"messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]},
        {
            "messages": [
                {"role": "system", "content": "Answer in one word."},
                {"role": "user", "content": "The capital of France?"},
                {"role": "assistant", "content": "Paris", "weight": 0},
                {"role": "user", "content": "And of Italy?"},
                {"role": "assistant", "content": "Rome", "weight": 0.5},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "北京今天天气怎么样？"},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "需要查询天气。",
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "北京"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": '{"sky": "晴"}'},
                {"role": "assistant", "content": "今天是晴天。"},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "get_weather",
                        "description": "The weather of today.",
                        "parameters": {
                            "type": "object",
                            "properties": {"city": {"type": "string"}},
                            "required": ["city"],
                        },
                    },
                }
            ],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Is 91 a prime number?"}]},
                {"role": "assistant", "content": "<think>\n91 = 7 * 13\n</think>\n\nNo.", "train": True},
            ]
        },
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        return "messages" in record

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        turns = _turns.messages(record.get("messages"), "messages", where)
        return (_turns.conversation(turns, record, where),)
