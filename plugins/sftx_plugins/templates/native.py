"""What the native templates share: a turn's segments, what a form has no place for, the same in Jinja.

A template file is then mostly its own form: the words around each turn, written as text. Where such words hold control
tokens, they are set apart here; what a row says is never searched for any.
"""

from __future__ import annotations

import copy
import json
import re
import string
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Final

from sftx import Conversation, DataError, Message, PluginError, Segment, Template, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK: Final = frozenset({"<think>", "</think>"})
"""Tags around a thought: control tokens where the tokenizer has them, plain text where it has not."""
HAVE_TOOLS: Final = "chatml, qwen2.5, qwen3, minimind, llama3 and mistral"


@dataclass(frozen=True)
class Turn:
    """Writes the segments of one turn: what the template says around it, and what the row says."""

    controls: frozenset[str]
    role: str
    trained: bool = False
    weight: float = 1.0

    def opening(self, words: str) -> Iterator[Segment]:
        """The template's own words, never trained."""
        return self._words(words, False)

    def words(self, words: str) -> Iterator[Segment]:
        """The template's own words, trained with the turn."""
        return self._words(words, self.trained)

    def _words(self, words: str, trained: bool) -> Iterator[Segment]:
        for text in _parted(words, self.controls):
            yield Segment(text, trained, text in self.controls, self.weight, self.role)

    def says(self, text: str) -> Iterator[Segment]:
        """What the row says: plain text whatever it spells, trained with the turn."""
        yield Segment(text, self.trained, False, self.weight, self.role)

    def given(self, text: str) -> Iterator[Segment]:
        """What the row gives for the model to read, such as the tools: plain text, never trained."""
        yield Segment(text, role=self.role)

    def thinks(self, reasoning: str) -> Iterator[Segment]:
        """A thought between tags, before what is said; nothing where there is none."""
        if reasoning:
            yield from self.words("<think>\n")
            yield from self.says(reasoning)
            yield from self.words("\n</think>\n\n")


@lru_cache(maxsize=1024)
def _parted(words: str, controls: frozenset[str]) -> tuple[str, ...]:
    """`words` in parts, each control token one by itself."""
    longest_first = sorted(controls, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
    return tuple(part for part in re.split(f"({pattern})", words) if part)


class Native:
    """A template whose form is written in Python, and once more in Jinja for whoever serves the model.

    The plugin itself is the template; for a tokenizer it makes a copy of itself that knows it.
    """

    controls: frozenset[str] = frozenset()
    optional: frozenset[str] = THINK
    """Control tokens where the tokenizer has them; plain text where it has not."""
    stop: tuple[str, ...] = ()
    roles: ClassVar[frozenset[str] | None] = frozenset({"system", "user", "assistant"})
    """Who can speak; None: anybody, by name."""
    has_tools: bool = False
    """Whether there is a form for what the tools are."""

    @hookimpl
    def sftx_template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        made = copy.copy(self)
        for name, value in self._known_of(tokenizer).items():
            object.__setattr__(made, name, value)  # frozen are the options
        return made

    def _known_of(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The attributes that depend on the tokenizer."""
        return {"controls": self.controls | (self.optional & tokenizer.get_added_vocab().keys())}

    @property
    def rewrites_history(self) -> bool:
        return False

    @property
    @abstractmethod
    def chat_template(self) -> str | None:
        """The same in Jinja."""

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        self._check(conversation)
        return tuple(self._turns(conversation))

    def generation_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        self._check(conversation)
        return (*self._turns(conversation), *self._opening(conversation))

    def _jinja(self, source: str, **values: str | bool | None) -> str:
        """`source` in one line, in which `$name` stands for the Jinja literal of that value.

        All that it writes stands in expressions, so that white space between them is nothing.
        """
        given = values | {
            "HAS_TOOLS": self.has_tools,
            "HAS_CALLS": self.roles is None or "tool" in self.roles,
            "ROLES": None if self.roles is None else sorted(self.roles),
        }
        literals = {name: "none" if value is None else as_json(value) for name, value in given.items()}
        line = "".join(line.strip() for line in (_BEGINNING + source).splitlines())
        return string.Template(line).substitute(literals)

    @abstractmethod
    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        """The whole conversation."""

    @abstractmethod
    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        """What the assistant's next turn begins with."""

    def _turn(self, message: Message) -> Turn:
        return Turn(self.controls, message.role, message.trained, message.weight)

    def _check(self, conversation: Conversation) -> None:
        """Raises DataError for what would vanish."""
        form = f"{type(self).__name__}'s form"
        if conversation.tools and not self.has_tools:
            raise DataError(f"{form} has no place for tools; write them into the system turn, or take {HAVE_TOOLS}")
        for message in conversation.messages:
            if self.roles is not None and message.role not in self.roles:
                hint = f"; {HAVE_TOOLS} have one" if message.role == "tool" else ""
                raise DataError(f"{form} has no turn of the role {message.role!r}{hint}")
            if message.tool_calls and self.roles is not None and "tool" not in self.roles:
                raise DataError(f"{form} has no place for calls of tools; {HAVE_TOOLS} have one")
            if (message.tool_calls or message.reasoning) and message.role != "assistant":
                raise DataError(f"a turn of the role {message.role!r} thinks or calls tools; only the assistant can")


class Bordered(Native):
    """A form in plain text, between the tokenizer's own beginning and end of text."""

    begin: str = ""
    end: str = ""

    def _known_of(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        begin, end = self._begins_with(tokenizer), end_of_text(tokenizer)
        controls = super()._known_of(tokenizer)["controls"] | ({begin, end} - {""})
        return {"controls": controls, "stop": (end,), "begin": begin, "end": end}

    def _begins_with(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return beginning(tokenizer)


def beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that this tokenizer puts before every text, with which its model was trained; else nothing."""
    starts = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if starts else ""


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's eos token. Raises PluginError where it has none."""
    if not isinstance(tokenizer.eos_token, str):
        raise PluginError(
            f"the tokenizer of {tokenizer.name_or_path} has no eos token, with which this template ends an answer; "
            "choose a template made for this model"
        )
    return tokenizer.eos_token


def rounds(conversation: Conversation, form: str) -> tuple[Message | None, tuple[Message, ...]]:
    """The system turn, which such forms write into a user's, and the turns of user and assistant by turns.

    Calls of tools and their results stand between the two. Raises DataError for turns in any other order.
    """
    messages = conversation.messages
    system = messages[0] if messages and messages[0].role == "system" else None
    turns = messages[1:] if system else messages
    spoken = [message for message in turns if message.role != "tool" and not message.tool_calls]
    wrong = next((i for i, m in enumerate(spoken) if m.role != ("user", "assistant")[i % 2]), None)
    if wrong is not None or (turns and turns[0].role != "user"):
        seen = ", ".join(message.role for message in messages[:8])
        raise DataError(f"{form}'s form has user and assistant by turns, after one system turn at most; got {seen}")
    if system and not turns:
        raise DataError(f"{form}'s form writes the system text into the first user's turn, and there is none")
    return system, turns


def only_calls(message: Message, form: str) -> None:
    """Raises DataError for a turn that both says something and calls tools, where the form has no place for both."""
    if message.tool_calls and message.content.strip():
        raise DataError(
            f"{form}'s form has no text in a turn that calls tools, and this one says {message.content[:40]!r}; "
            "leave it out, or take chatml, qwen2.5 or qwen3"
        )


def as_json(value: Any) -> str:
    """JSON as transformers' `tojson` writes it in a chat template."""
    return json.dumps(value, ensure_ascii=False)


_BEGINNING: Final = """
    {% macro thought(message) %}
        {% if message.reasoning_content %}
            {{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {% endif %}
    {% endmacro %}
    {% macro arguments(call) %}
        {{ call.arguments if call.arguments is string else call.arguments | tojson }}
    {% endmacro %}
    {% macro refuse(role) %}
        {{ raise_exception('this chat template has no place here for ' + role) }}
    {% endmacro %}
    {% if tools and not $HAS_TOOLS %}{{ refuse('tools') }}{% endif %}
    {% for message in messages %}
        {% if $ROLES is not none and message.role not in $ROLES %}{{ refuse('a turn of the role ' + message.role) }}
        {% elif message.tool_calls and not $HAS_CALLS %}{{ refuse('calls of tools') }}
        {% endif %}
    {% endfor %}
"""
"""What every form begins with in Jinja: what it has no place for is refused there as it is here."""
ROUNDS: Final = """
    {% set system = messages[0].content if messages and messages[0].role == 'system' else none %}
    {% set turns = messages if system is none else messages[1:] %}
    {% set spoken = namespace(num=0) %}
    {% if turns and turns[0].role != 'user' or not turns and system is not none %}{{ refuse('such turns') }}{% endif %}
    {% for message in turns if message.role != 'tool' and not message.tool_calls %}
        {% if message.role != ('user', 'assistant')[spoken.num % 2] %}{{ refuse('such turns') }}{% endif %}
        {% set spoken.num = spoken.num + 1 %}
    {% endfor %}
"""
"""What `rounds` does, in Jinja: `system` and `turns`."""
