"""Qwen3: ChatML with thoughts between <think> and </think>, of which only those since the last question are kept.

What a turn looks like changes once another question follows it, so each trained turn is an example of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import Field

from sftx import Conversation, Message, Segment
from sftx_plugins.templates.chatml import (
    CALL,
    END,
    JINJA_CALLS,
    JINJA_SYSTEM,
    JINJA_TOOL,
    RESPONSE,
    ROLES,
    START,
    ChatML,
)
from sftx_plugins.templates.native import THINK, Turn

_EMPTY: Final = "<think>\n\n</think>\n\n"
_JINJA: Final = f"""
    {JINJA_SYSTEM}
    {{% set asked = namespace(index=messages | length - 1) %}}
    {{% for message in messages %}}
        {{% if message.role == 'user' and not
               (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}}
            {{% set asked.index = loop.index0 %}}
        {{% endif %}}
    {{% endfor %}}
    {{% for message in messages %}}
        {{% set content = message.content or '' %}}
        {{% if message.role == 'tool' %}}{JINJA_TOOL}
        {{% elif message.role == 'assistant' %}}
            {{{{ '<|im_start|>assistant\\n' }}}}
            {{% set thought = message.reasoning_content or '' if $thinking == 'keep' else '' %}}
            {{% if loop.index0 > asked.index and (loop.last or thought) %}}
                {{{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}}}
            {{% else %}}{{{{ content }}}}{{% endif %}}{JINJA_CALLS}
            {{{{ '<|im_end|>\\n' }}}}
        {{% elif message.role == 'user' or message.role == 'system' and not loop.first %}}
            {{{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}}}
        {{% endif %}}
    {{% endfor %}}
    {{% if add_generation_prompt %}}
        {{{{ '<|im_start|>assistant\\n' }}}}
        {{% if $thinking == 'strip' or enable_thinking is defined and enable_thinking is false %}}
            {{{{ '<think>\\n\\n</think>\\n\\n' }}}}
        {{% endif %}}
    {{% endif %}}
"""


@dataclass(frozen=True, eq=False)
class Qwen3(ChatML):
    """ChatML as Qwen3's own template writes it; one example for each trained turn."""

    thinking: Annotated[
        Literal["keep", "strip", "empty"],
        Field(
            description="Thoughts before an answer: keep them (an empty one where there is none), strip them (the "
            "empty one stands in the prompt, as with enable_thinking=False), or train the empty one in their place."
        ),
    ] = "keep"

    controls = frozenset({START, END}) | CALL | RESPONSE | THINK
    optional = frozenset[str]()
    roles = ROLES
    rewrites_history = True

    @property
    def chat_template(self) -> str | None:
        return self._jinja(_JINJA, **self._literals(), thinking=self.thinking)

    def _spoken(self, turns: Sequence[Message], number: int) -> Iterator[Segment]:
        message = turns[number]
        turn, content = self._turn(message), message.content
        yield from turn.opening(f"{START}{message.role}\n")
        reasoning = message.reasoning if self.thinking == "keep" else ""
        is_last = number + 1 == len(turns)
        if message.role == "assistant" and number > _last_question(turns) and (is_last or reasoning):
            content = content.lstrip("\n")
            if self.thinking == "strip":
                yield from turn.opening(_EMPTY)
            else:
                yield from turn.words("<think>\n")
                yield from turn.says(reasoning.strip("\n"))
                yield from turn.words("\n</think>\n\n")
        yield from turn.says(content)
        yield from self._calls(turn, message, follows=bool(message.content))
        yield from turn.words(f"{END}\n")

    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        turn = Turn(self.controls, "assistant")
        return turn.opening(f"{START}assistant\n" + (_EMPTY if self.thinking == "strip" else ""))


def _last_question(turns: Sequence[Message]) -> int:
    """Where the user spoke last; a result of a tool that was written as a user's turn is no question."""
    for number in reversed(range(len(turns))):
        content = turns[number].content
        is_result = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if turns[number].role == "user" and not is_result:
            return number
    return len(turns) - 1
