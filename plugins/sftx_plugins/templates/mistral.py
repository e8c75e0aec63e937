"""Mistral: `<s>[INST] question[/INST] answer</s>`; without the spaces where the tokenizer is of the kind of Nemo's.

[INST] is a control token where the tokenizer has it (v0.3, Nemo), plain text where it has not (v0.1, v0.2). Where there
are tokens for tools, these stand before a question, calls and results as JSON with ids of nine letters and digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field

from sftx import Conversation, DataError, Message, Segment
from sftx_plugins.templates.native import HAVE_TOOLS, ROUNDS, THINK, Native, as_json, only_calls, rounds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN, END = "<s>", "</s>"
TOOLS: Final = frozenset(
    {"[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"}
)
_ID: Final = re.compile(r"[A-Za-z0-9]{9}")
_JINJA: Final = (
    ROUNDS
    + """
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
                {% if loop.index0 == seen.place and system is not none %}{{ system + '\\n\\n' }}{% endif %}
                {{ message.content + '[/INST]' }}
            {% else %}{{ $space }}{{ thought(message) }}{{ message.content + '</s>' }}
            {% endif %}
        {% endif %}
    {% endfor %}
"""
)


@dataclass(frozen=True, eq=False)
class Mistral(Native):
    """Questions between [INST] and [/INST]; the answer and </s> are trained."""

    place: Annotated[
        Literal["first", "last"],
        Field(
            description="The user's turn that has system text and tools: the first; or the last, as Mistral's own "
            "templates do, which rewrites earlier turns, so that each trained turn is an example of its own."
        ),
    ] = "first"

    controls = frozenset({BEGIN, END})
    optional = THINK | TOOLS | {"[INST]", "[/INST]"}
    stop = (END,)
    space = " "

    @property
    def rewrites_history(self) -> bool:
        return self.place == "last"

    @property
    def chat_template(self) -> str | None:
        return self._jinja(_JINJA, place=self.place, space=self.space)

    def _known_of(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """SentencePiece sets a space before each piece of text, and Mistral's forms for it have one; Nemo's not."""
        known = super()._known_of(tokenizer)
        has_tools = known["controls"] >= TOOLS
        roles = {"system", "user", "assistant", *(["tool"] if has_tools else [])}
        space = "" if tokenizer.convert_tokens_to_ids("▁") in (None, tokenizer.unk_token_id) else " "
        return known | {"space": space, "has_tools": has_tools, "roles": frozenset(roles)}

    def _check(self, conversation: Conversation) -> None:
        if conversation.tools and not self.has_tools:
            raise DataError(
                f"this tokenizer has no {', '.join(sorted(TOOLS))}; of the templates {HAVE_TOOLS} have tools"
            )
        super()._check(conversation)
        for message in conversation.messages:
            only_calls(message, "Mistral")

    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        system, turns = rounds(conversation, "Mistral")
        asked = [number for number, message in enumerate(turns) if message.role == "user"]
        yield Segment(BEGIN, control=True)
        num_calls = num_results = 0
        for number, message in enumerate(turns):
            if message.role == "user":
                begins = number == asked[0 if self.place == "first" else -1]
                yield from self._question(message, system if begins else None, conversation if begins else None)
            elif message.role == "tool":
                yield from self._result(message, num_results)
                num_results += 1
            else:
                yield from self._answer(message, num_calls)
                num_calls += len(message.tool_calls)

    def _question(self, message: Message, system: Message | None, tools: Conversation | None) -> Iterator[Segment]:
        """`tools`: the conversation, where its tools stand before this question."""
        turn = self._turn(message)
        if tools is not None and tools.tools:
            yield from turn.opening(f"[AVAILABLE_TOOLS]{self.space}")
            yield from turn.given(as_json(tools.tools))
            yield from turn.opening("[/AVAILABLE_TOOLS]")
        yield from turn.opening(f"[INST]{self.space}")
        if system is not None:
            yield from self._turn(system).says(system.content)
            yield from turn.opening("\n\n")
        yield from turn.says(message.content)
        yield from turn.opening("[/INST]")

    def _answer(self, message: Message, num_calls: int) -> Iterator[Segment]:
        """`num_calls`: those before this turn."""
        turn = self._turn(message)
        yield from turn.words("" if message.tool_calls else self.space)
        yield from turn.thinks(message.reasoning)
        if message.tool_calls:
            calls = [
                {"name": call.name, "arguments": call.arguments, "id": _id(call.id, number)}
                for number, call in enumerate(message.tool_calls, num_calls)
            ]
            yield from turn.words(f"[TOOL_CALLS]{self.space}")
            yield from turn.says(as_json(calls))
        else:
            yield from turn.says(message.content)
        yield from turn.words(END)

    def _result(self, message: Message, number: int) -> Iterator[Segment]:
        turn = self._turn(message)
        yield from turn.opening(f"[TOOL_RESULTS]{self.space}" + '{"content": ')
        yield from turn.says(message.content)
        yield from turn.words(f', "call_id": "{_id(message.tool_call_id, number)}"}}[/TOOL_RESULTS]')

    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        yield from ()  # [/INST] and [/TOOL_RESULTS] are what an answer follows


def _id(given: str | None, number: int) -> str:
    """An id, by its number where the row has none. Raises DataError."""
    if given is not None and not _ID.fullmatch(given):
        raise DataError(
            f"the id of a call is {given!r}; Mistral's have nine letters or digits; leave it out, or mend it"
        )
    return given or f"call{number:05d}"
