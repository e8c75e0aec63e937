"""Writes a conversation as plain text under headings. The only control token is the tokenizer's eos token.

### System
Answer with a call of a function, and nothing else.

### Request
turn off the lights in the kitchen

### Call
{"function": "set_light", "arguments": {"room": "kitchen", "state": "off"}}<eos>
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from sftx import Conversation, DataError, Message, PluginError, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEADINGS: Final[Mapping[str, str]] = {
    "system": "### System\n",
    "user": "### Request\n",
    "assistant": "### Call\n",
    "tool": "### Result\n",
}
_GAP: Final = "\n\n"


class HeadedText:
    """The template for one tokenizer. Raises PluginError if the tokenizer has no eos token."""

    rewrites_history: Final = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer.eos_token, str):
            raise PluginError(
                f"the tokenizer of {tokenizer.name_or_path} has no eos token, which has to end an answer; "
                "choose a template made for this model"
            )
        self._eos: str = tokenizer.eos_token
        # A model whose tokenizer puts a bos token before every text was trained with it.
        starts = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        self._bos: str | None = str(tokenizer.bos_token) if starts else None

    @property
    def controls(self) -> frozenset[str]:
        return frozenset({self._eos} if self._bos is None else {self._eos, self._bos})

    @property
    def stop(self) -> tuple[str, ...]:
        return (self._eos,)

    @property
    def chat_template(self) -> str:
        """The same format in Jinja, for `tokenizer.apply_chat_template`."""
        headings = ", ".join(f"'{role}': {heading!r}" for role, heading in _HEADINGS.items())
        return (
            f"{{% set headings = {{{headings}}} %}}"
            f"{'' if self._bos is None else '{{ bos_token }}'}"
            "{% for message in messages %}"
            "{% if message.role not in headings %}{{ raise_exception('no heading for ' + message.role) }}{% endif %}"
            f"{{% if not loop.first %}}{{{{ {_GAP!r} }}}}{{% endif %}}"
            "{{ headings[message.role] + message.content }}"
            "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{% if messages %}}{{{{ {_GAP!r} }}}}{{% endif %}}"
            "{{ headings['assistant'] }}{% endif %}"
        )

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the whole conversation. Raises DataError for tools, and for a role without a heading."""
        return tuple(self._segments(conversation))

    def generation_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the conversation and the heading of a call. Raises DataError as `render` does."""
        gap = _GAP if conversation.messages else ""
        return (*self._segments(conversation), Segment(gap + _HEADINGS["assistant"]))

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        if conversation.tools:
            raise DataError("this format has no place for tools; write the functions into the system text")
        if self._bos is not None:
            yield Segment(self._bos, control=True)
        for number, message in enumerate(conversation.messages):
            yield Segment((_GAP if number else "") + _heading(message))
            yield Segment(message.content, message.trained, weight=message.weight)
            if message.role == "assistant":
                yield Segment(self._eos, message.trained, control=True, weight=message.weight)


def _heading(message: Message) -> str:
    if message.role not in _HEADINGS:
        raise DataError(f"no heading for the role {message.role!r}; this format has {', '.join(_HEADINGS)}")
    return _HEADINGS[message.role]
