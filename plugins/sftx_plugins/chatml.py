"""ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n`, the form of SmolLM2, Qwen2.5 and many others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from sftx import Conversation, Segment, Template, hookimpl

START, END = "<|im_start|>", "<|im_end|>"
_JINJA = (
    "{% for message in messages %}"
    f"{{{{ '{START}' + message.role + '\\n' + message.content + '{END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\\n' }}}}{{% endif %}}"
)


@dataclass(frozen=True, eq=False)
class ChatML:
    """Turns between <|im_start|> and <|im_end|>; the assistant's text, <|im_end|> and newline are trained."""

    default_system: Annotated[
        str | None, Field(description="System text of conversations that begin without one; null adds none.")
    ] = None

    controls: ClassVar[frozenset[str]] = frozenset({START, END})
    stop: ClassVar[tuple[str, ...]] = (END,)
    rewrites_history: ClassVar[bool] = False

    @hookimpl
    def sftx_template(self) -> Template:
        return self

    @property
    def chat_template(self) -> str:
        system = ""
        if self.default_system is not None:
            turn = json.dumps(f"{START}system\n{self.default_system}{END}\n", ensure_ascii=False)
            system = f"{{% if not messages or messages[0].role != 'system' %}}{{{{ {turn} }}}}{{% endif %}}"
        return system + _JINJA

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        return tuple(self._turns(conversation))

    def generation_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        return (*self._turns(conversation), Segment(START, control=True), Segment("assistant\n"))

    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        messages = conversation.messages
        if self.default_system is not None and (not messages or messages[0].role != "system"):
            yield from _turn("system", self.default_system, False, 1.0)
        for message in messages:
            yield from _turn(message.role, message.content, message.trained, message.weight)


def _turn(role: str, content: str, trained: bool, weight: float) -> Iterator[Segment]:
    yield Segment(START, control=True)
    yield Segment(f"{role}\n")
    yield Segment(content, trained, weight=weight)
    yield Segment(END, trained, control=True, weight=weight)
    yield Segment("\n", trained, weight=weight)
