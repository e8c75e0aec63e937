"""Base classes of the templates that are written in Python.

A template module then holds little but its own format: the markup around each turn. `Turn` splits the control tokens
out of the markup; text that comes from a row is never searched for control tokens.
"""

from __future__ import annotations

import copy
import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Final

from sftx import Conversation, DataError, Message, PluginError, Segment, Template, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK: Final = frozenset({"<think>", "</think>"})
"""Tags around the reasoning: control tokens where the tokenizer has them, plain text elsewhere."""


@dataclass(frozen=True)
class Turn:
    """Yields the segments of one turn: the template's markup, and text from the row."""

    controls: frozenset[str]
    role: str
    trained: bool = False
    weight: float = 1.0

    def markup(self, text: str, *, trained: bool = True) -> Iterable[Segment]:
        """Return the template's own text, each control token as a segment of its own.

        `trained=False` marks text that the model is given, such as the role; other markup is trained if the turn is.
        """
        return _markup(text, self.controls, trained and self.trained, self.weight, self.role)

    def content(self, text: str) -> Iterator[Segment]:
        """Yield text of the row, trained if the turn is. It stays plain text even if it spells a control token."""
        yield Segment(text, self.trained, False, self.weight, self.role)

    def context(self, text: str) -> Iterator[Segment]:
        """Yield text of the row that the model only reads, such as tool definitions. It is never trained."""
        yield Segment(text, role=self.role)

    def reasoning(self, text: str) -> Iterator[Segment]:
        """Yield the reasoning between tags, as it is written before an answer; nothing if it is empty."""
        if text:
            yield from self.markup("<think>\n")
            yield from self.content(text)
            yield from self.markup("\n</think>\n\n")


@lru_cache(maxsize=1024)  # the same few segments stand around every turn
def _markup(text: str, controls: frozenset[str], trained: bool, weight: float, role: str) -> tuple[Segment, ...]:
    longest_first = sorted(controls, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
    return tuple(
        Segment(part, trained, part in controls, weight, role) for part in re.split(f"({pattern})", text) if part
    )


class NativeTemplate:
    """A template whose format is written twice: in Python for training, and in Jinja for serving the model.

    The plugin itself is the template. `sftx_template` returns a copy that holds what depends on the tokenizer.
    """

    controls: frozenset[str] = frozenset()
    optional_controls: frozenset[str] = THINK
    """These are control tokens if the tokenizer has them, and plain text otherwise."""
    stop: tuple[str, ...] = ()
    roles: ClassVar[frozenset[str] | None] = frozenset({"system", "user", "assistant"})
    """The roles that the format can write; None allows any role."""
    has_tools: bool = False
    """Says that the format can write tool definitions."""
    answer_prompt: str = ""
    """The markup that asks for the assistant's next turn; empty if an answer follows the conversation directly."""
    jinja: ClassVar[str]
    """The format in Jinja. `$name` stands for the Jinja literal of the attribute `name`."""

    @hookimpl
    def sftx_template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        template = copy.copy(self)
        for name, value in self._attributes_for(tokenizer).items():
            object.__setattr__(template, name, value)  # the dataclass of options is frozen
        return template

    def _attributes_for(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the values of the attributes that depend on the tokenizer."""
        return {"controls": self.controls | (self.optional_controls & tokenizer.get_added_vocab().keys())}

    @property
    def rewrites_history(self) -> bool:
        return False

    @property
    def has_calls(self) -> bool:
        """True when the format can write tool calls and their results."""
        return self.roles is None or "tool" in self.roles

    @property
    def chat_template(self) -> str | None:
        # All output is written in expressions, so white space and line breaks between tags can be dropped.
        line = "".join(line.strip() for line in (_JINJA_START + self.jinja).splitlines())
        return re.sub(r"\$(\w+)", lambda match: _jinja_literal(getattr(self, match[1])), line)

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        self._check(conversation)
        return tuple(self._segments(conversation))

    def generation_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        self._check(conversation)
        answer_prompt = Turn(self.controls, "assistant").markup(self._answer_prompt(conversation))
        return (*self._segments(conversation), *answer_prompt)

    @abstractmethod
    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        """Yield the segments of the whole conversation."""

    def _answer_prompt(self, conversation: Conversation) -> str:
        return self.answer_prompt

    def _turn(self, message: Message) -> Turn:
        return Turn(self.controls, message.role, message.trained, message.weight)

    def _check(self, conversation: Conversation) -> None:
        """Raise DataError for anything in the conversation that the format cannot write."""
        name = type(self).__name__
        if conversation.tools and not self.has_tools:
            raise DataError(
                f"{name} has no place for tools; write them into the system turn, "
                f"or use one of {templates_with_tools()}"
            )
        for message in conversation.messages:
            if self.roles is not None and message.role not in self.roles:
                hint = f"; use one of {templates_with_tools()}" if message.role == "tool" else ""
                raise DataError(f"{name} has no turn for the role {message.role!r}{hint}")
            if message.tool_calls and not self.has_calls:
                raise DataError(f"{name} has no place for tool calls; use one of {templates_with_tools()}")
            if (message.tool_calls or message.reasoning) and message.role != "assistant":
                raise DataError(
                    f"a turn of the role {message.role!r} has reasoning or tool calls; only the assistant's can"
                )


class BosEosTemplate(NativeTemplate):
    """A format in plain text, between the tokenizer's own bos and eos tokens."""

    bos: str = ""
    eos: str = ""

    def _attributes_for(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        bos, eos = self._bos(tokenizer), require_eos(tokenizer)
        controls = super()._attributes_for(tokenizer)["controls"] | ({bos, eos} - {""})
        return {"controls": controls, "stop": (eos,), "bos": bos, "eos": eos}

    def _bos(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the bos token if this tokenizer puts it before every text, as in the model's training; else ""."""
        is_added = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return str(tokenizer.bos_token) if is_added else ""


def require_eos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's eos token. Raises PluginError if it has none."""
    if not isinstance(tokenizer.eos_token, str):
        raise PluginError(
            f"the tokenizer of {tokenizer.name_or_path} has no eos token, which this template needs to end an answer; "
            "choose a template made for this model"
        )
    return tokenizer.eos_token


def split_system_and_turns(conversation: Conversation, name: str) -> tuple[Message | None, tuple[Message, ...]]:
    """Return the system turn, if there is one, and the other turns, for formats that write both into one user turn.

    Raises DataError, with the template's `name`, unless user and assistant alternate. Tool calls and their results may
    stand between the two.
    """
    messages = conversation.messages
    system = messages[0] if messages and messages[0].role == "system" else None
    turns = messages[1:] if system else messages
    alternating = [message for message in turns if message.role != "tool" and not message.tool_calls]
    is_alternating = all(m.role == ("user", "assistant")[i % 2] for i, m in enumerate(alternating))
    if not is_alternating or (turns and turns[0].role != "user"):
        roles = ", ".join(message.role for message in messages[:8])
        raise DataError(
            f"{name} needs alternating turns of user and assistant after at most one system turn; got {roles}"
        )
    if system and not turns:
        raise DataError(f"{name} writes the system text into the first user turn, and there is none")
    return system, turns


def refuse_text_beside_calls(message: Message, name: str) -> None:
    """Raise DataError for a turn with both text and tool calls, for formats that can write only one of them."""
    if message.tool_calls and message.content.strip():
        raise DataError(
            f"{name} cannot write text in a turn with tool calls, and this turn has {message.content[:40]!r}; "
            "leave the text out, or use chatml, qwen2.5 or qwen3"
        )


def tojson(value: Any) -> str:
    """Return JSON as the filter `tojson` of transformers writes it in a chat template."""
    return json.dumps(value, ensure_ascii=False)


@lru_cache(maxsize=1)
def templates_with_tools() -> str:
    """Return the names of the built-in templates that can write tools, for error messages."""
    names = []
    for entry_point in entry_points(group="sftx.plugins"):
        if entry_point.value.startswith(__package__ + "."):
            cls = entry_point.load()
            if issubclass(cls, NativeTemplate) and cls.has_tools:
                names.append(entry_point.name)
    return ", ".join(sorted(set(names)))


# --- Jinja --------------------------------------------------------------------------------------------


def _jinja_literal(value: Any) -> str:
    return "none" if value is None else tojson(sorted(value) if isinstance(value, frozenset) else value)


_JINJA_START: Final = r"""
    {% macro thought(message) %}
        {% if message.reasoning_content %}
            {{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
        {% endif %}
    {% endmacro %}
    {% macro arguments(call) %}
        {{ call.arguments if call.arguments is string else call.arguments | tojson }}
    {% endmacro %}
    {% macro refuse(role) %}
        {{ raise_exception('this chat template has no place here for ' + role) }}
    {% endmacro %}
    {% if tools and not $has_tools %}{{ refuse('tools') }}{% endif %}
    {% for message in messages %}
        {% if $roles is not none and message.role not in $roles %}{{ refuse('a turn of the role ' + message.role) }}
        {% elif message.tool_calls and not $has_calls %}{{ refuse('calls of tools') }}
        {% endif %}
    {% endfor %}
"""
"""The start of every chat template. It refuses what `NativeTemplate._check` refuses."""
JINJA_SYSTEM_AND_TURNS: Final = r"""
    {% set system = messages[0].content if messages and messages[0].role == 'system' else none %}
    {% set turns = messages if system is none else messages[1:] %}
    {% set spoken = namespace(num=0) %}
    {% if turns and turns[0].role != 'user' or not turns and system is not none %}{{ refuse('such turns') }}{% endif %}
    {% for message in turns if message.role != 'tool' and not message.tool_calls %}
        {% if message.role != ('user', 'assistant')[spoken.num % 2] %}{{ refuse('such turns') }}{% endif %}
        {% set spoken.num = spoken.num + 1 %}
    {% endfor %}
"""
"""`split_system_and_turns` in Jinja: it sets `system` and `turns`."""
