"""DeepSeek-V3: `<｜begin▁of▁sentence｜>system<｜User｜>question<｜Assistant｜>answer<｜end▁of▁sentence｜>`.

Tool calls and tool results have control tokens of their own; tool definitions have no format. DeepSeek's own template
leaves some of these tokens out if there is a second round of calls or more than two calls; this one always writes
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import Field

from sftx import Conversation, DataError, Message, Segment
from sftx_plugins.templates.native import NativeTemplate, tojson

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CALL: Final = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
CALLS: Final = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
OUTPUT: Final = ("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")
OUTPUTS: Final = ("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>")


@dataclass(frozen=True, eq=False)
class DeepSeek3(NativeTemplate):
    """One control token for each speaker; the assistant's text, its calls and the end of sentence are trained."""

    earlier_reasoning: Annotated[
        Literal["keep", "drop"],
        Field(
            description="Reasoning before the last turn: keep it, or drop it as R1's template does, which rewrites "
            "earlier turns, so that each trained turn is an example of its own."
        ),
    ] = "keep"

    controls = frozenset({BEGIN, END, USER, ASSISTANT, *CALL, *CALLS, *OUTPUT, *OUTPUTS})
    stop = (END,)
    roles = frozenset({"system", "user", "assistant", "tool"})
    jinja = r"""
    {{ '<｜begin▁of▁sentence｜>' }}
    {% set system = messages[0].content if messages and messages[0].role == 'system' else none %}
    {{ system or '' }}
    {% set turns = messages if system is none else messages[1:] %}
    {% for message in turns %}
        {% if message.role == 'user' %}{{ '<｜User｜>' + message.content }}
        {% elif message.role == 'tool' %}
            {{ '<｜tool▁outputs▁begin｜>' if loop.first or turns[loop.index0 - 1].role != 'tool' else '\n' }}
            {{ '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
            {% if loop.last or turns[loop.index0 + 1].role != 'tool' %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}
        {% elif message.role == 'assistant' %}
            {{ '<｜Assistant｜>' if loop.first or turns[loop.index0 - 1].role != 'tool' else '' }}
            {% if $earlier_reasoning == 'keep' or loop.last %}{{ thought(message) }}{% endif %}
            {{ message.content or '' }}
            {% for tool_call in message.tool_calls or [] %}
                {% set call = tool_call.function or tool_call %}
                {{ '<｜tool▁calls▁begin｜>' if loop.first else '\n' }}
                {{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.name + '\n```json\n' }}{{ arguments(call) }}
                {{ '\n```<｜tool▁call▁end｜>' }}{{ '<｜tool▁calls▁end｜>' if loop.last else '' }}
            {% endfor %}
            {{ '<｜end▁of▁sentence｜>' }}
        {% else %}{{ refuse('a second system text') }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt and not (turns and turns[-1].role == 'tool') %}{{ '<｜Assistant｜>' }}{% endif %}
    """

    @property
    def rewrites_history(self) -> bool:
        return self.earlier_reasoning == "drop"

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        messages = conversation.messages
        yield Segment(BEGIN, control=True)
        if messages and messages[0].role == "system":
            yield from self._turn(messages[0]).content(messages[0].content)
            messages = messages[1:]
        for number, message in enumerate(messages):
            if message.role == "system":
                raise DataError("DeepSeek3 has a system text at the start alone, and this conversation has a later one")
            if message.role == "tool":
                yield from self._result(messages, number)
            elif message.role == "assistant":
                if number + 1 < len(messages) and self.earlier_reasoning == "drop":
                    message = dataclasses.replace(message, reasoning="")
                is_after_result = number > 0 and messages[number - 1].role == "tool"
                yield from self._answer(message, "" if is_after_result else ASSISTANT)
            else:
                turn = self._turn(message)
                yield from turn.markup(USER, trained=False)
                yield from turn.content(message.content)

    def _answer(self, message: Message, speaker: str) -> Iterator[Segment]:
        turn = self._turn(message)
        yield from turn.markup(speaker, trained=False)
        yield from turn.reasoning(message.reasoning)
        yield from turn.content(message.content)
        for number, call in enumerate(message.tool_calls):
            yield from turn.markup(("\n" if number else CALLS[0]) + f"{CALL[0]}function{CALL[1]}")
            yield from turn.content(call.name)
            yield from turn.markup("\n```json\n")
            yield from turn.content(tojson(call.arguments))
            yield from turn.markup(f"\n```{CALL[2]}")
        yield from turn.markup((CALLS[1] if message.tool_calls else "") + END)

    def _result(self, turns: Sequence[Message], number: int) -> Iterator[Segment]:
        turn = self._turn(turns[number])
        is_after_result = number > 0 and turns[number - 1].role == "tool"
        yield from turn.markup(("\n" if is_after_result else OUTPUTS[0]) + OUTPUT[0], trained=False)
        yield from turn.content(turns[number].content)
        yield from turn.markup(OUTPUT[1])
        if number + 1 == len(turns) or turns[number + 1].role != "tool":
            yield from turn.markup(OUTPUTS[1], trained=False)

    def _answer_prompt(self, conversation: Conversation) -> str:
        is_after_result = conversation.messages and conversation.messages[-1].role == "tool"
        return "" if is_after_result else ASSISTANT  # after tool results, the token that ends them asks for an answer
