"""Llama 3: `<|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>`, after one <|begin_of_text|>.

Tools are written as Llama 3.1's own template does: the functions before the first question, a call as one JSON object,
a result as a turn of `ipython`. White space around what is said is taken off, as Meta's templates do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from sftx import Conversation, DataError, Message, Segment
from sftx_plugins.templates.native import Native, Turn, as_json, only_calls

BEGIN, END = "<|begin_of_text|>", "<|eot_id|>"
_FUNCTIONS: Final = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
    'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}.Do not use variables.\n\n"
)
"""What Llama 3.1 says before its tools, word for word, the missing space too: it was trained with it."""
_JINJA: Final = """
    {% macro header(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% endmacro %}
    {{ '<|begin_of_text|>' }}
    {% set system = messages[0].content | trim if messages and messages[0].role == 'system' else none %}
    {% if tools or $dates %}
        {{ header('system') }}{% if tools %}{{ 'Environment: ipython\\n' }}{% endif %}
        {{ $date_lines + (system or '') + '<|eot_id|>' }}
    {% elif system is not none %}{{ header('system') + system + '<|eot_id|>' }}{% endif %}
    {% set first = 0 if system is none else 1 %}
    {% if tools and messages[first].role != 'user' %}{{ refuse('tools without a question') }}{% endif %}
    {% for message in messages[first:] %}
        {% if message.role == 'tool' %}{{ header('ipython') + message.content | tojson }}
        {% else %}
            {{ header(message.role) }}
            {% if tools and loop.first %}
                {{ $functions }}{% for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
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


@dataclass(frozen=True, eq=False)
class Llama3(Native):
    """Headers and <|eot_id|>; the assistant's text and <|eot_id|> are trained."""

    dates: Annotated[
        bool,
        Field(description="Begin with the lines on dates that Llama 3.1 and later have; with tools they are there."),
    ] = False
    today: Annotated[str, Field(description="Day in these lines; by default that of Meta's templates.")] = "26 Jul 2024"

    controls = frozenset({BEGIN, "<|start_header_id|>", "<|end_header_id|>", END})
    stop = (END,)
    roles = frozenset({"system", "user", "assistant", "tool"})
    has_tools = True

    @property
    def chat_template(self) -> str | None:
        return self._jinja(_JINJA, dates=self.dates, date_lines=self._dates(), functions=_FUNCTIONS)

    def _dates(self) -> str:
        return f"Cutting Knowledge Date: December 2023\nToday Date: {self.today}\n\n"

    def _check(self, conversation: Conversation) -> None:
        super()._check(conversation)
        for message in conversation.messages:
            only_calls(message, "Llama3")
            if len(message.tool_calls) > 1:
                raise DataError(
                    f"Llama3's form has one call of a tool in a turn, got {len(message.tool_calls)}; take chatml, "
                    "qwen2.5, qwen3 or mistral for several"
                )

    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        messages = conversation.messages
        system = messages[0] if messages and messages[0].role == "system" else None
        yield Segment(BEGIN, control=True)
        if system is not None or conversation.tools or self.dates:
            yield from self._system(system, conversation)
        turns = messages if system is None else messages[1:]
        if conversation.tools and (not turns or turns[0].role != "user"):
            raise DataError("Llama3's form writes the tools before the first question; begin with a user's turn")
        for number, message in enumerate(turns):
            yield from self._spoken(message, conversation if number == 0 else Conversation(()))

    def _system(self, system: Message | None, conversation: Conversation) -> Iterator[Segment]:
        turn = self._turn(system or Message("system", ""))
        yield from turn.opening(_header("system"))
        if conversation.tools:
            yield from turn.opening("Environment: ipython\n")
        if conversation.tools or self.dates:
            yield from turn.opening(self._dates())
        if system is not None:
            yield from turn.says(system.content.strip())
        yield from turn.words(END)

    def _spoken(self, message: Message, beginning: Conversation) -> Iterator[Segment]:
        """`beginning`: the conversation whose tools are written before this turn's text."""
        turn = self._turn(message)
        yield from turn.opening(_header("ipython" if message.role == "tool" else message.role))
        if beginning.tools:
            yield from turn.opening(_FUNCTIONS)
            tools = (json.dumps(tool, ensure_ascii=False, indent=4) for tool in beginning.tools)
            yield from turn.given("".join(f"{tool}\n\n" for tool in tools))
        yield from turn.thinks(message.reasoning)
        yield from turn.says(as_json(message.content) if message.role == "tool" else message.content.strip())
        for call in message.tool_calls:
            yield from turn.says(f'{{"name": {as_json(call.name)}, "parameters": {as_json(call.arguments)}}}')
        yield from turn.words(END)

    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        return Turn(self.controls, "assistant").opening(_header("assistant"))


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"
