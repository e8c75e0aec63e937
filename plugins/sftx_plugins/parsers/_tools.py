"""Reads tool definitions and tool calls from a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftx import DataError, Location, ToolCall
from sftx_plugins.parsers import _values


def tools(value: Any, name: str, where: Location) -> tuple[Mapping[str, Any], ...]:
    """Return tool definitions in OpenAI's format. Raises DataError.

    `value` is a list, or JSON text of one. Its items are `{"type": "function", "function": {...}}`, or the function
    alone.
    """
    if value in (None, ""):
        return ()
    items = _values.list_of(_decoded(value, name, where), name, where)
    return tuple(_tool(item, f"{name}[{number}]", where) for number, item in enumerate(items))


def _tool(item: Any, at: str, where: Location) -> Mapping[str, Any]:
    tool = _object(item, at, where, "an object with the name of a function")
    # A null `type` or `function` is the same as none; the nulls of a schema mean something and are kept.
    wrapped = tool if tool.get("function") is not None else {"function": _without(tool, "function")}
    _function(wrapped, at, where)
    return wrapped if wrapped.get("type") is not None else {"type": "function"} | _without(wrapped, "type")


def calls(value: Any, name: str, where: Location) -> tuple[ToolCall, ...]:
    """Return tool calls. Raises DataError.

    `value` is a list of calls or a single one, or JSON text of either. A call is
    `{"id", "type": "function", "function": {"name", "arguments"}}`, or name and arguments alone. Arguments are an
    object, or JSON text of one.
    """
    if value in (None, ""):
        return ()
    parsed = _decoded(value, name, where)
    if isinstance(parsed, dict):
        return (_call(parsed, name, where),)
    items = _values.list_of(parsed, name, where)
    return tuple(_call(item, f"{name}[{number}]", where) for number, item in enumerate(items))


def _call(item: Any, at: str, where: Location) -> ToolCall:
    call = _object(item, at, where, "an object with name and arguments")
    function = _function(call, at, where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _values.from_json(arguments, f"{at}: arguments", where) if arguments.strip() else None
    if arguments is not None and not isinstance(arguments, dict):
        raise DataError(
            f"{where}: {at}: arguments are {_values.kind(arguments)}, expected an object or JSON text of one"
        )
    call_id = call.get("id")
    return ToolCall(
        function["name"],
        {} if arguments is None else arguments,
        None if call_id is None else _values.text(call_id, f"{at}.id", where),
    )


def _without(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: inner for name, inner in value.items() if name != key}


def _decoded(value: Any, name: str, where: Location) -> Any:
    return _values.from_json(value, name, where) if isinstance(value, str) else value


def _object(item: Any, at: str, where: Location, expected: str) -> dict[str, Any]:
    item = _decoded(item, at, where)
    if not isinstance(item, dict):
        raise DataError(f"{where}: {at} is {_values.kind(item)}, expected {expected}")
    checked: dict[str, Any] = _values.checked_json(item, at, where)
    return checked


def _function(item: Mapping[str, Any], at: str, where: Location) -> Mapping[str, Any]:
    """Return the object under the key `function`, or `item` itself if there is none. It must have a name."""
    function = item if item.get("function") is None else item["function"]
    if function is not item and item.get("type") not in (None, "function"):
        raise DataError(f"{where}: {at}.type is {_values.shown(item['type'])}, expected 'function'")
    if not isinstance(function, dict):
        raise DataError(f"{where}: {at}.function is {_values.kind(function)}, expected an object with a name")
    if not _values.text(function.get("name"), f"{at}: the function's name", where).strip():
        raise DataError(f"{where}: {at}: the function's name is empty")
    return function
