"""What parsers and templates return, refused when its types are not those promised: it would be trained on wrongly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sftx.errors import PluginError
from sftx.types import Conversation, Message, Parsed, Parser, PlainText, Segment, Template, Tokens


def parsed(parser: Parser, found: Sequence[Parsed]) -> Sequence[Parsed]:
    """The same. Raises PluginError."""
    for one in found:
        if not _is_parsed(one):
            raise PluginError(f"{parser}: parse gave {one!r:.80}, expected Conversation, PlainText or Tokens of text")
    return found


def _is_parsed(one: Any) -> bool:
    match one:
        case Conversation(messages=messages):
            return all(map(_is_message, messages))
        case PlainText(text=text):
            return isinstance(text, str)
        case Tokens(token_ids=ids, loss_mask=mask):
            return all(type(i) is int for i in ids) and all(isinstance(trained, bool) for trained in mask)
    return False


def _is_message(message: object) -> bool:
    if not isinstance(message, Message):
        return False
    return _has(message, role=str, content=str, trainable=bool | None, weight=_NUMBER)


def template(made: Template) -> Template:
    """The same. Raises PluginError."""
    for name, kind in (("controls", frozenset), ("stop", tuple)):
        value: Any = getattr(made, name)
        if not (isinstance(value, kind) and all(isinstance(item, str) for item in value)):
            raise PluginError(f"{made}: {name} is {value!r:.60}, expected a {kind.__name__} of text")
    if not made.stop:
        raise PluginError(
            f"{made}: `stop` is empty, so a trained model would never end its answer; name the token that does"
        )
    rewrites: Any = made.rewrites_history
    if not isinstance(rewrites, bool):
        raise PluginError(f"{made}: rewrites_history is {rewrites!r:.60}, expected a bool")
    return made


def segments(made: Template | None, written: Iterable[Any]) -> list[Segment]:
    """The same, as a list. Raises PluginError."""
    found = list(written)
    for segment in found:
        if not (isinstance(segment, Segment) and _has(segment, text=str, trainable=bool, control=bool, weight=_NUMBER)):
            raise PluginError(f"{made}: wrote {segment!r:.90}, expected a Segment of text")
    return found


_NUMBER = int | float


def _has(thing: object, **promised: Any) -> bool:
    return all(isinstance(getattr(thing, name), kind) for name, kind in promised.items())
