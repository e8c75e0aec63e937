"""`{"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}`: the format of ShareGPT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from sftx import Conversation, Location, Parser, Record, hookimpl
from sftx_plugins.parsers import _turns, _values

Role = Literal["system", "user", "assistant", "tool", "function_call"]
TAGS: Final[Mapping[str, str]] = {
    "human": "user",
    "gpt": "assistant",
    **_turns.ROLES,
    "function_call": _turns.CALL,
    "tool_call": _turns.CALL,
    "function_response": "tool",
    "tool_response": "tool",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
"""The role for each word that data of this format use."""


@dataclass(frozen=True, eq=False)
class ShareGPT:
    """Conversations as turns `from` human, gpt, system, function_call and observation, each with a `value`.

    The value of a function_call is JSON text of one call or of a list of calls; that of an observation is the result.
    Turns with `role` and `content`, as in the format `messages`, are read too. `tools` are read from a field of the
    record or of the system turn.
    """

    role_key: Annotated[str | None, Field(description="Key of the role, if it is neither `from` nor `role`.")] = None
    content_key: Annotated[
        str | None, Field(description="Key of the content, if it is neither `value` nor `content`.")
    ] = None
    roles: Annotated[
        dict[str, Role], Field(description="Further words for roles, such as {bot: assistant}; they take precedence.")
    ] = field(default_factory=dict)

    fields: ClassVar[str] = "conversations (system, tools)"
    samples: ClassVar[Sequence[Record]] = (
        {"conversations": [{"from": "human", "value": "What is 2 + 3?"}, {"from": "gpt", "value": "5"}]},
        {
            "system": "Answer in one word.",
            "conversations": [
                {"from": "human", "value": "The capital of France?"},
                {"from": "gpt", "value": "Paris"},
                {"from": "human", "value": "And of Italy?"},
                {"from": "gpt", "value": "Rome"},
            ],
        },
        {
            "conversations": [
                {"from": "human", "value": "生成一个八位的密码。"},
                {"from": "function_call", "value": '{"name": "generate_password", "arguments": {"length": 8}}'},
                {"from": "observation", "value": '{"password": "k3v9xq2m"}'},
                {"from": "gpt", "value": "密码是 k3v9xq2m。"},
            ],
            "tools": '[{"name": "generate_password", "description": "生成随机密码", '
            '"parameters": {"type": "object", "properties": {"length": {"type": "integer"}}}}]',
        },
        {
            "conversations": [
                {"role": "user", "content": "Is 91 a prime number?"},
                {"role": "assistant", "content": "<think>\n91 = 7 * 13\n</think>\n\nNo."},
            ]
        },
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        # A record with chosen and rejected is a preference pair, whose conversation has no answer.
        return "conversations" in record and not {"chosen", "rejected"} & record.keys()

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        turns = record.get("conversations")
        messages = _turns.messages(
            turns,
            "conversations",
            where,
            tags={**TAGS, **self.roles},
            role_keys=(*filter(None, [self.role_key]), "from", "role"),
            content_keys=(*filter(None, [self.content_key]), "value", "content"),
        )
        system = _values.optional_text(record, "system", where)
        messages = _turns.with_system(system, messages, where)
        return (_turns.conversation(messages, record, where, turns=turns),)
