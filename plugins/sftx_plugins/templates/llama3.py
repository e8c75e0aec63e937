r"""Llama 3: `<|start_header_id|>role<|end_header_id|>\n\ncontent<|eot_id|>`, after one <|begin_of_text|>.

Tools are written as Llama 3.1's own template writes them: the functions before the first question, a call as one JSON
object, a result as a turn of `ipython`. White space around a turn's text is stripped, as Meta's templates do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from sftx import Conversation, DataError, Message, Segment
from sftx_plugins.templates.native import NativeTemplate, refuse_text_beside_calls, tojson

BEGIN, END = "<|begin_of_text|>", "<|eot_id|>"
_FUNCTIONS: Final = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
    'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}.Do not use variables.\n\n"
)
"""The text before the tool definitions, word for word as Llama 3.1 was trained with it, including the missing space."""


@dataclass(frozen=True, eq=False)
class Llama3(NativeTemplate):
    """Headers and <|eot_id|>; the assistant's text and <|eot_id|> are trained."""

    dates: Annotated[
        bool,
        Field(description="Begin with the date lines of Llama 3.1 and later; with tools they are always written."),
    ] = False
    today: Annotated[str, Field(description="Day in the date lines; the default is that of Meta's templates.")] = (
        "26 Jul 2024"
    )

    controls = frozenset({BEGIN, "<|start_header_id|>", "<|end_header_id|>", END})
    stop = (END,)
    answer_prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    roles = frozenset({"system", "user", "assistant", "tool"})
    has_tools = True
    functions = _FUNCTIONS
    jinja = r"""
    {% macro header(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}
    {{ '<|begin_of_text|>' }}
    {% set system = messages[0].content | trim if messages and messages[0].role == 'system' else none %}
    {% if tools or $dates %}
        {{ header('system') }}{% if tools %}{{ 'Environment: ipython\n' }}{% endif %}
        {{ $date_lines + (system or '') + '<|eot_id|>' }}
    {% elif system is not none %}{{ header('system') + system + '<|eot_id|>' }}{% endif %}
    {% set first = 0 if system is none else 1 %}
    {% if tools and messages[first].role != 'user' %}{{ refuse('tools without a question') }}{% endif %}
    {% for message in messages[first:] %}
        {% if message.role == 'tool' %}{{ header('ipython') + message.content | tojson }}
        {% else %}
            {{ header(message.role) }}
            {% if tools and loop.first %}
                {{ $functions }}{% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}
            {% endif %}
            {{ thought(message) }}{{ (message.content or '') | trim }}
            {% if message.tool_calls %}
                {% if message.tool_calls | length > 1 or (message.content or '') | trim %}
                    {{ refuse('several calls in a turn, or text beside one') }}
                {% endif %}
                {% set call = message.tool_calls[0].function or message.tool_calls[0] %}
                {{ '{"name": ' + call.name | tojson + ', "parameters": ' }}{{ arguments(call) }}{{ '}' }}
            {% endif %}
        {% endif %}
        {{ '<|eot_id|>' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ header('assistant') }}{% endif %}
    """

    @property
    def date_lines(self) -> str:
        return f"Cutting Knowledge Date: December 2023\nToday Date: {self.today}\n\n"

    def _check(self, conversation: Conversation) -> None:
        super()._check(conversation)
        for message in conversation.messages:
            refuse_text_beside_calls(message, "Llama3")
            if len(message.tool_calls) > 1:
                raise DataError(
                    f"Llama3 can write one tool call in a turn, got {len(message.tool_calls)}; use chatml, qwen2.5, "
                    "qwen3 or mistral for several"
                )

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        turns, system = conversation.messages, None
        if turns and turns[0].role == "system":
            system, turns = turns[0], turns[1:]
        yield Segment(BEGIN, control=True)
        if system is not None or conversation.tools or self.dates:
            yield from self._system(system, conversation)
        if conversation.tools and (not turns or turns[0].role != "user"):
            raise DataError("Llama3 writes the tools before the first question; begin with a user turn")
        for number, message in enumerate(turns):
            turn = self._turn(message)
            yield from turn.markup(_header("ipython" if message.role == "tool" else message.role), trained=False)
            if conversation.tools and number == 0:
                yield from turn.markup(self.functions, trained=False)
                tools = (json.dumps(tool, ensure_ascii=False, indent=4) for tool in conversation.tools)
                yield from turn.context("".join(f"{tool}\n\n" for tool in tools))
            yield from turn.reasoning(message.reasoning)
            yield from turn.content(tojson(message.content) if message.role == "tool" else message.content.strip())
            for call in message.tool_calls:
                yield from turn.content(f'{{"name": {tojson(call.name)}, "parameters": {tojson(call.arguments)}}}')
            yield from turn.markup(END)

    def _system(self, system: Message | None, conversation: Conversation) -> Iterator[Segment]:
        turn = self._turn(system or Message("system", ""))
        yield from turn.markup(_header("system"), trained=False)
        if conversation.tools:
            yield from turn.markup("Environment: ipython\n", trained=False)
        if conversation.tools or self.dates:
            yield from turn.markup(self.date_lines, trained=False)
        if system is not None:
            yield from turn.content(system.content.strip())
        yield from turn.markup(END)


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"
