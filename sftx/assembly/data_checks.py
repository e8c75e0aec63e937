"""What parsers and templates return, refused when its types are not those promised: it would be trained on wrongly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sftx.errors import PluginError
from sftx.types import Conversation, Message, Parsed, Parser, PlainText, Segment, Template, Tokens, ToolCall


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


def _is_message(message: Any) -> bool:
    if not (isinstance(message, Message) and _has(message, **_OF_A_MESSAGE)):
        return False
    calls: tuple[Any, ...] = message.tool_calls
    return all(isinstance(call, ToolCall) and _has(call, name=str, arguments=Mapping) for call in calls)


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
        if not _is_segment(segment):
            raise PluginError(f"{made}: wrote {segment!r:.90}, expected a Segment of text")
    return found


def _is_segment(segment: Any) -> bool:
    # Written out, for it is asked a dozen times a row.
    given: Any = segment
    return (
        isinstance(segment, Segment)
        and isinstance(given.text, str)
        and isinstance(given.trainable, bool)
        and isinstance(given.control, bool)
        and isinstance(given.weight, int | float)
        and isinstance(given.role, str)
    )


_NUMBER = int | float
_OF_A_MESSAGE: Final[dict[str, Any]] = {
    "role": str,
    "content": str,
    "trainable": bool | None,
    "weight": _NUMBER,
    "reasoning": str,
    "tool_calls": tuple,
    "name": str | None,
    "tool_call_id": str | None,
}


def _has(thing: object, **promised: Any) -> bool:
    return all(isinstance(getattr(thing, name), kind) for name, kind in promised.items())
