"""Mistral: `<s>[INST] question[/INST] answer</s>`, without the spaces on tokenizers like that of Mistral Nemo.

[INST] is a control token where the tokenizer has it (v0.3, Nemo) and plain text elsewhere (v0.1, v0.2). On tokenizers
with tokens for tools, the definitions are written before a question, and calls and results as JSON with ids of nine
letters or digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field

from sftx import Conversation, DataError, Message, Segment
from sftx_plugins.templates.native import (
    JINJA_SYSTEM_AND_TURNS,
    THINK,
    NativeTemplate,
    refuse_text_beside_calls,
    split_system_and_turns,
    templates_with_tools,
    tojson,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN, END = "<s>", "</s>"
TOOLS: Final = frozenset(
    {"[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"}
)
_ID: Final = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True, eq=False)
class Mistral(NativeTemplate):
    """Questions between [INST] and [/INST]; the answer and </s> are trained."""

    place: Annotated[
        Literal["first", "last"],
        Field(
            description="The user turn that holds system text and tools: the first; or the last, as in Mistral's own "
            "templates, which rewrites earlier turns, so that each trained turn is an example of its own."
        ),
    ] = "first"

    controls = frozenset({BEGIN, END})
    optional_controls = THINK | TOOLS | {"[INST]", "[/INST]"}
    stop = (END,)
    has_tools = True
    """On tokenizers with the tokens in TOOLS; `_attributes_for` looks."""
    space = " "
    jinja = (
        JINJA_SYSTEM_AND_TURNS
        + r"""
    {{ '<s>' }}
    {% set seen = namespace(calls=0, results=0, place=0) %}
    {% if $place == 'last' %}
        {% for message in turns %}
            {% if message.role == 'user' %}{% set seen.place = loop.index0 %}{% endif %}
        {% endfor %}
    {% endif %}
    {% for message in turns %}
        {% if message.tool_calls %}
            {% if (message.content or '') | trim %}{{ refuse('text beside a call') }}{% endif %}
            {{ thought(message) }}{{ '[TOOL_CALLS]' + $space + '[' }}
            {% for tool_call in message.tool_calls %}
                {% set call = tool_call.function or tool_call %}
                {% if not loop.first %}{{ ', ' }}{% endif %}
                {{ '{"name": ' + call.name | tojson + ', "arguments": ' }}{{ arguments(call) }}
                {{ ', "id": ' + (tool_call.id or 'call%05d' | format(seen.calls)) | tojson + '}' }}
                {% set seen.calls = seen.calls + 1 %}
            {% endfor %}
            {{ ']</s>' }}
        {% elif message.role == 'tool' %}
            {{ '[TOOL_RESULTS]' + $space + '{"content": ' + message.content + ', "call_id": ' }}
            {{ (message.tool_call_id or 'call%05d' | format(seen.results)) | tojson + '}[/TOOL_RESULTS]' }}
            {% set seen.results = seen.results + 1 %}
        {% else %}
            {% if message.role == 'user' %}
                {% if tools and loop.index0 == seen.place %}
                    {{ '[AVAILABLE_TOOLS]' + $space + tools | list | tojson + '[/AVAILABLE_TOOLS]' }}
                {% endif %}
                {{ '[INST]' + $space }}
                {% if loop.index0 == seen.place and system is not none %}{{ system + '\n\n' }}{% endif %}
                {{ message.content + '[/INST]' }}
            {% else %}{{ $space }}{{ thought(message) }}{{ message.content + '</s>' }}
            {% endif %}
        {% endif %}
    {% endfor %}
    """
    )

    @property
    def rewrites_history(self) -> bool:
        return self.place == "last"

    def _attributes_for(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return also the space of Mistral's SentencePiece tokenizers, which put one before each piece of text."""
        attributes = super()._attributes_for(tokenizer)
        has_tools = attributes["controls"] >= TOOLS
        roles = {"system", "user", "assistant", *(["tool"] if has_tools else [])}
        space = "" if tokenizer.convert_tokens_to_ids("▁") in (None, tokenizer.unk_token_id) else " "
        return attributes | {"space": space, "has_tools": has_tools, "roles": frozenset(roles)}

    def _check(self, conversation: Conversation) -> None:
        if conversation.tools and not self.has_tools:
            raise DataError(
                f"this tokenizer has no {', '.join(sorted(TOOLS))}, which mistral needs for tools; "
                f"use one of {templates_with_tools()}"
            )
        super()._check(conversation)
        for message in conversation.messages:
            refuse_text_beside_calls(message, "Mistral")

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        system, turns = split_system_and_turns(conversation, "Mistral")
        questions = [number for number, message in enumerate(turns) if message.role == "user"]
        yield Segment(BEGIN, control=True)
        num_calls = num_results = 0
        for number, message in enumerate(turns):
            if message.role == "user":
                if number == questions[0 if self.place == "first" else -1]:
                    yield from self._question(message, system, conversation.tools)
                else:
                    yield from self._question(message, None, ())
            elif message.role == "tool":
                yield from self._result(message, num_results)
                num_results += 1
            else:
                yield from self._answer(message, num_calls)
                num_calls += len(message.tool_calls)

    def _question(
        self, message: Message, system: Message | None, tools: tuple[Mapping[str, Any], ...]
    ) -> Iterator[Segment]:
        turn = self._turn(message)
        if tools:
            yield from turn.markup(f"[AVAILABLE_TOOLS]{self.space}", trained=False)
            yield from turn.context(tojson(tools))
            yield from turn.markup("[/AVAILABLE_TOOLS]", trained=False)
        yield from turn.markup(f"[INST]{self.space}", trained=False)
        if system is not None:
            yield from self._turn(system).content(system.content)
            yield from turn.markup("\n\n", trained=False)
        yield from turn.content(message.content)
        yield from turn.markup("[/INST]", trained=False)

    def _answer(self, message: Message, num_calls: int) -> Iterator[Segment]:
        """Yield an answer, or tool calls numbered from `num_calls`."""
        turn = self._turn(message)
        yield from turn.markup("" if message.tool_calls else self.space)
        yield from turn.reasoning(message.reasoning)
        if message.tool_calls:
            calls = [
                {"name": call.name, "arguments": call.arguments, "id": _call_id(call.id, number)}
                for number, call in enumerate(message.tool_calls, num_calls)
            ]
            yield from turn.markup(f"[TOOL_CALLS]{self.space}")
            yield from turn.content(tojson(calls))
        else:
            yield from turn.content(message.content)
        yield from turn.markup(END)

    def _result(self, message: Message, number: int) -> Iterator[Segment]:
        turn = self._turn(message)
        yield from turn.markup(f"[TOOL_RESULTS]{self.space}" + '{"content": ', trained=False)
        yield from turn.content(message.content)
        yield from turn.markup(f', "call_id": "{_call_id(message.tool_call_id, number)}"}}[/TOOL_RESULTS]')


def _call_id(call_id: str | None, number: int) -> str:
    """Return the row's id of a call, or one made from its number. Raises DataError for an id that Mistral refuses."""
    if call_id is not None and not _ID.fullmatch(call_id):
        raise DataError(
            f"the id of a tool call is {call_id!r}; Mistral's have nine letters or digits; change it or leave it out"
        )
    return call_id or f"call{number:05d}"
