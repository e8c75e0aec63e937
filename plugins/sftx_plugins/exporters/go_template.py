"""A chat template as Ollama needs it, in Go's text/template: made from what the Jinja template writes around texts.

The Jinja template renders a few conversations of placeholders. What stands between two of them becomes the Go template,
where that is the same in each round; a template that writes rounds differently is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sftx import ConfigError, Conversation, DataError, Message, PluginError
from sftx_plugins.templates.jinja.placeholders import PLACEHOLDER, MessageFormat, with_placeholders
from sftx_plugins.templates.jinja.regions import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM: Final = Message("system", "S")
_ROUNDS: Final = (
    Message("user", "U1"), Message("assistant", "A1"), Message("user", "U2"), Message("assistant", "A2"),
    Message("user", "U3"),
)  # fmt: skip


@dataclass(frozen=True)
class Markup:
    """A Markup holds what a chat template writes around the texts of a conversation."""

    start: str
    """Before the first question, where there is no system text."""
    before_system: str | None
    """None where the template refuses a system text."""
    after_system: str
    before_answer: str
    after_answer: str
    """Before another question."""
    prompt: str
    """After the last question, before the answer that is to come."""

    @property
    def default_system(self) -> str:
        """The system text that the template writes where there is none; empty if it writes none."""
        before, after = self.before_system, self.after_system
        if before is None or not (self.start.startswith(before) and self.start.endswith(after)):
            return ""
        return self.start[len(before) : len(self.start) - len(after)]

    def to_go(self, *, bos: str) -> str:
        """Return the template for Ollama; `bos` is what llama.cpp puts before the prompt, left out here."""
        start = _escaped(self.start.removeprefix(bos))
        if self.before_system is not None:
            system = _escaped(self.before_system.removeprefix(bos)) + "{{ .System }}" + _escaped(self.after_system)
            start = "{{ if .System }}" + system + "{{ else }}" + start + "{{ end }}"
        question = "{{ .Content }}{{ if $last }}" + _escaped(self.prompt) + "{{ end }}"
        answer = _escaped(self.before_answer) + "{{ .Content }}"
        answer += "{{ if not $last }}" + _escaped(self.after_answer) + "{{ end }}"
        return (
            start
            + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + '{{ if eq .Role "user" }}'
            + question
            + '{{ else if eq .Role "assistant" }}'
            + answer
            + "{{ end }}{{ end }}"
        )


def markup_of(tokenizer: PreTrainedTokenizerBase) -> Markup:
    """Return the markup of the tokenizer's chat template. Raises ConfigError where Go cannot express it."""
    source = tokenizer.chat_template
    assert isinstance(source, str)
    template = ChatTemplate(source, tokenizer.special_tokens_map, None)
    plain = _gaps(template, _ROUNDS)
    if plain is None:
        raise _refused("it cannot write a plain conversation of three questions")
    try:
        with_system = _gaps(template, (_SYSTEM, *_ROUNDS))
    except ConfigError:
        raise _refused("it writes the system text elsewhere than before the first question") from None
    start, before_answer, after_answer, *again, prompt = plain
    if again != [before_answer, after_answer] or (with_system is not None and with_system[2:] != plain[1:]):
        raise _refused("it writes later rounds of a conversation in another way than the first")
    before_system, after_system = (None, "") if with_system is None else with_system[:2]
    return Markup(start, before_system, after_system, before_answer, after_answer, prompt)


def _gaps(template: ChatTemplate, messages: Sequence[Message]) -> list[str] | None:
    """Return the text before, between and after the messages' texts; None when the template refuses them.

    Raises ConfigError unless it writes each text once, in their order.
    """
    for message_format in (MessageFormat(), MessageFormat(content_as_parts=True)):
        data, _ = with_placeholders(Conversation(tuple(messages)), message_format)
        try:
            text = template.render(data, prompt=True)
        except DataError:
            continue
        except PluginError:
            raise _refused("it writes today's date") from None
        written = PLACEHOLDER.findall(text)
        expected = [PLACEHOLDER.findall(str(message["content"]))[0] for message in data.messages]
        if written == expected:
            return PLACEHOLDER.split(text)
        if set(written) == set(expected):
            raise _refused("it writes the texts of a conversation in another order, or more than once")
    return None


def _refused(reason: str) -> ConfigError:
    return ConfigError(
        f"the chat template cannot be written for Ollama: {reason}; export with --to gguf, whose file holds the "
        "template in Jinja, for programs that read it"
    )


def _escaped(text: str) -> str:
    """Return text as Go's templates write it: two braces would begin an action, three quotes end it in a Modelfile."""
    if '"""' in text:
        raise _refused('it writes """, which ends a text of a Modelfile')
    return text.replace("{{", '{{ "{{" }}')
