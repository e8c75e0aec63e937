r"""ChatML: `<|im_start|>role\ncontent<|im_end|>\n`, the format of SmolLM2, Qwen and many others.

Tools are written as Hermes and Qwen write them: definitions in the system turn, calls between `<tool_call>` tags,
results between `<tool_response>` tags in a user turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final

from pydantic import Field

from sftx import Conversation, Message, Segment
from sftx_plugins.templates.native import THINK, NativeTemplate, Turn, tojson

START, END = "<|im_start|>", "<|im_end|>"
CALL: Final = frozenset({"<tool_call>", "</tool_call>"})
RESPONSE: Final = frozenset({"<tool_response>", "</tool_response>"})
ROLES: Final = frozenset({"system", "user", "assistant", "tool"})
_TOOLS: Final = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
)
"""The text before and after the tool definitions, word for word as Qwen's models were trained with it."""

# The parts of the Jinja template that Qwen3 shares.
JINJA_SYSTEM: Final = r"""
    {% set default = none if tools and not $default_with_tools else $default_system %}
    {% set system = messages[0].content if messages and messages[0].role == 'system' else default %}
    {% if tools %}
        {{ '<|im_start|>system\n' }}{% if system is not none %}{{ system + '\n\n' }}{% endif %}{{ $tools_before }}
        {% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ $tools_after + '<|im_end|>\n' }}
    {% elif system is not none %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{% endif %}
"""
JINJA_RESULT: Final = r"""
    {% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
    {{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
    {% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
"""
JINJA_CALLS: Final = r"""
    {% for tool_call in message.tool_calls or [] %}
        {% set call = tool_call.function or tool_call %}
        {% if content or not loop.first %}{{ '\n' }}{% endif %}
        {{ '<tool_call>\n{"name": ' + call.name | tojson + ', "arguments": ' }}{{ arguments(call) }}
        {{ '}\n</tool_call>' }}
    {% endfor %}
"""


@dataclass(frozen=True, eq=False)
class ChatML(NativeTemplate):
    """ChatML turns between <|im_start|> and <|im_end|>; the assistant's text, <|im_end|> and newline are trained."""

    default_system: Annotated[
        str | None, Field(description="System text of conversations that begin without one; null adds none.")
    ] = None

    controls = frozenset({START, END})
    optional_controls = THINK | CALL | RESPONSE
    stop = (END,)
    answer_prompt = f"{START}assistant\n"
    roles: ClassVar[frozenset[str] | None] = None
    has_tools = True
    tools_before, tools_after = _TOOLS
    default_with_tools = True
    """Says that the default system text is also written before tool definitions."""
    jinja = (
        JINJA_SYSTEM
        + r"""
    {% for message in messages %}
        {% set content = message.content or '' %}
        {% if message.role == 'tool' %}
    """
        + JINJA_RESULT
        + r"""
        {% elif not (loop.first and message.role == 'system') %}
            {{ '<|im_start|>' + message.role + '\n' }}{{ thought(message) }}{{ content }}
    """
        + JINJA_CALLS
        + r"""
            {{ '<|im_end|>\n' }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
    """
    )

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        turns, system = conversation.messages, None
        if turns and turns[0].role == "system":
            system, turns = turns[0], turns[1:]
        elif self.default_system is not None and (self.default_with_tools or not conversation.tools):
            system = Message("system", self.default_system)
        if system is not None or conversation.tools:
            yield from self._system(system, conversation)
        for number, message in enumerate(turns):
            if message.role == "tool":
                yield from self._result(turns, number)
            else:
                yield from self._message(turns, number)

    def _system(self, system: Message | None, conversation: Conversation) -> Iterator[Segment]:
        turn = self._turn(system or Message("system", ""))
        yield from turn.markup(f"{START}system\n", trained=False)
        if system is not None:
            yield from turn.content(system.content)
        if conversation.tools:
            yield from turn.markup(("\n\n" if system is not None else "") + self.tools_before, trained=False)
            yield from turn.context("".join(f"\n{tojson(tool)}" for tool in conversation.tools))
            yield from turn.markup(self.tools_after, trained=False)
        yield from turn.markup(f"{END}\n")

    def _message(self, turns: Sequence[Message], number: int) -> Iterator[Segment]:
        message = turns[number]
        turn = self._turn(message)
        yield from turn.markup(f"{START}{message.role}\n", trained=False)
        yield from turn.reasoning(message.reasoning)
        yield from turn.content(message.content)
        yield from self._calls(turn, message)
        yield from turn.markup(f"{END}\n")

    def _calls(self, turn: Turn, message: Message) -> Iterator[Segment]:
        for number, call in enumerate(message.tool_calls):
            yield from turn.markup("\n<tool_call>\n" if message.content or number else "<tool_call>\n")
            yield from turn.content(f'{{"name": {tojson(call.name)}, "arguments": {tojson(call.arguments)}}}')
            yield from turn.markup("\n</tool_call>")

    def _result(self, turns: Sequence[Message], number: int) -> Iterator[Segment]:
        """Yield one tool result. Consecutive results share one user turn."""
        turn = self._turn(turns[number])
        if number == 0 or turns[number - 1].role != "tool":
            yield from turn.markup(f"{START}user", trained=False)
        yield from turn.markup("\n<tool_response>\n", trained=False)
        yield from turn.content(turns[number].content)
        yield from turn.markup("\n</tool_response>")
        if number + 1 == len(turns) or turns[number + 1].role != "tool":
            yield from turn.markup(f"{END}\n")
