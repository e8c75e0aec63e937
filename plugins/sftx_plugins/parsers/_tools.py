"""Reads tool definitions and tool calls from a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftx import DataError, Location, ToolCall
from sftx_plugins.parsers import _values


def tools(value: Any, name: str, where: Location) -> tuple[Mapping[str, Any], ...]:
    """Return tool definitions in OpenAI's format. Raises DataError.

    `value` is a list, or JSON text of one. Its items are `{"type": "function", "function": {...}}`, or the function
    alone. Keys with a null are left out, except in JSON text.
    """
    if value in (None, ""):
        return ()
    keep_null = isinstance(value, str)
    items = _values.list_of(_values.from_json(value, name, where) if keep_null else value, name, where)
    return tuple(_tool(item, f"{name}[{number}]", where, keep_null) for number, item in enumerate(items))


def _tool(item: Any, at: str, where: Location, keep_null: bool) -> Mapping[str, Any]:
    tool = _object(item, at, where, "an object with the name of a function", keep_null)
    wrapped = tool if "function" in tool else {"type": "function", "function": tool}
    _function(wrapped, at, where)
    return wrapped if wrapped.get("type") is not None else {"type": "function", **wrapped}


def calls(value: Any, name: str, where: Location) -> tuple[ToolCall, ...]:
    """Return tool calls. Raises DataError.

    `value` is a list of calls or a single one, or JSON text of either. A call is
    `{"id", "type": "function", "function": {"name", "arguments"}}`, or name and arguments alone. Arguments are an
    object, or JSON text of one.
    """
    if value in (None, ""):
        return ()
    keep_null = isinstance(value, str)
    parsed = _values.from_json(value, name, where) if keep_null else value
    if isinstance(parsed, dict):
        return (_call(parsed, name, where, keep_null),)
    items = _values.list_of(parsed, name, where)
    return tuple(_call(item, f"{name}[{number}]", where, keep_null) for number, item in enumerate(items))


def _call(item: Any, at: str, where: Location, keep_null: bool) -> ToolCall:
    call = _object(item, at, where, "an object with name and arguments", keep_null)
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


def _object(item: Any, at: str, where: Location, expected: str, keep_null: bool) -> dict[str, Any]:
    if isinstance(item, str):
        item, keep_null = _values.from_json(item, at, where), True
    if not isinstance(item, dict):
        raise DataError(f"{where}: {at} is {_values.kind(item)}, expected {expected}")
    checked: dict[str, Any] = _values.checked_json(item, at, where, drop_null=not keep_null)
    return checked


def _function(item: Mapping[str, Any], at: str, where: Location) -> Mapping[str, Any]:
    """Return the object under the key `function`, or `item` itself if there is none. It must have a name."""
    if "function" in item and item.get("type") not in (None, "function"):
        raise DataError(f"{where}: {at}.type is {_values.shown(item['type'])}, expected 'function'")
    function = item.get("function", item)
    if not isinstance(function, dict):
        raise DataError(f"{where}: {at}.function is {_values.kind(function)}, expected an object with a name")
    if not _values.text(function.get("name"), f"{at}: the function's name", where).strip():
        raise DataError(f"{where}: {at}: the function's name is empty")
    return function
