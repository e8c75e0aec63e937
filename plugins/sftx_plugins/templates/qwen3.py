"""Qwen3: ChatML with reasoning between <think> and </think>; only that since the last question is kept.

A turn renders differently once another question follows it, so each trained turn is an example of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import Field

from sftx import Conversation, DataError, Message, Segment
from sftx_plugins.templates.chatml import (
    CALL,
    END,
    JINJA_CALLS,
    JINJA_RESULT,
    JINJA_SYSTEM,
    RESPONSE,
    ROLES,
    START,
    ChatML,
)
from sftx_plugins.templates.native import THINK

_EMPTY_REASONING: Final = "<think>\n\n</think>\n\n"


@dataclass(frozen=True, eq=False)
class Qwen3(ChatML):
    """ChatML as Qwen3's own template writes it; one example for each trained turn."""

    thinking: Annotated[
        Literal["keep", "strip", "empty"],
        Field(
            description="Reasoning before an answer. keep: train it (an empty one if there is none); strip: drop it "
            "(the prompt has an empty one, as with enable_thinking=False); empty: train an empty one in its place."
        ),
    ] = "keep"

    controls = frozenset({START, END}) | CALL | RESPONSE | THINK
    optional_controls = frozenset[str]()
    roles = ROLES
    rewrites_history = True
    jinja = (
        JINJA_SYSTEM
        + r"""
    {% set asked = namespace(index=messages | length - 1) %}
    {% for message in messages %}
        {% if message.role == 'user' and not
               (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
            {% set asked.index = loop.index0 %}
        {% endif %}
    {% endfor %}
    {% for message in messages %}
        {% set content = message.content or '' %}
        {% if message.role == 'tool' %}
    """
        + JINJA_RESULT
        + r"""
        {% elif message.role == 'assistant' %}
            {{ '<|im_start|>assistant\n' }}
            {% set thought = message.reasoning_content or '' if $thinking == 'keep' else '' %}
            {% if loop.index0 > asked.index and (loop.last or thought) %}
                {{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {% else %}{{ content }}{% endif %}
    """
        + JINJA_CALLS
        + r"""
            {{ '<|im_end|>\n' }}
        {% elif message.role == 'user' or message.role == 'system' and not loop.first %}
            {{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}
        {{ '<|im_start|>assistant\n' }}
        {% if $thinking == 'strip' or enable_thinking is defined and enable_thinking is false %}
            {{ '<think>\n\n</think>\n\n' }}
        {% endif %}
    {% endif %}
    """
    )

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        question = _last_question(conversation.messages)
        messages = tuple(
            dataclasses.replace(message, reasoning="") if message.reasoning and number <= question else message
            for number, message in enumerate(conversation.messages)
        )
        yield from super()._segments(dataclasses.replace(conversation, messages=messages))

    def _message(self, turns: Sequence[Message], number: int) -> Iterator[Segment]:
        message = turns[number]
        turn, content = self._turn(message), message.content
        yield from turn.markup(f"{START}{message.role}\n", trained=False)
        reasoning = message.reasoning if self.thinking == "keep" else ""
        if message.trained and message.reasoning and not (reasoning or content.strip() or message.tool_calls):
            raise DataError(
                f"a trained turn has reasoning and no answer, so thinking={self.thinking} leaves nothing to train"
            )
        is_last = number + 1 == len(turns)
        if message.role == "assistant" and (reasoning or (is_last and number > _last_question(turns))):
            content = content.lstrip("\n")
            if self.thinking == "strip":
                yield from turn.markup(_EMPTY_REASONING, trained=False)
            else:
                yield from turn.markup("<think>\n")
                yield from turn.content(reasoning.strip("\n"))
                yield from turn.markup("\n</think>\n\n")
        yield from turn.content(content)
        yield from self._calls(turn, message)
        yield from turn.markup(f"{END}\n")

    def _answer_prompt(self, conversation: Conversation) -> str:
        return self.answer_prompt + (_EMPTY_REASONING if self.thinking == "strip" else "")


def _last_question(turns: Sequence[Message]) -> int:
    """Return the index of the last user turn, leaving out tool results that were written as user turns."""
    for number in reversed(range(len(turns))):
        content = turns[number].content
        is_result = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if turns[number].role == "user" and not is_result:
            return number
    return len(turns) - 1
