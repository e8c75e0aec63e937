"""Reads the functions that may be called, and the calls of them, out of a record; shared by the parsers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftx import DataError, Location, ToolCall
from sftx_plugins.parsers import _values


def tools(value: Any, name: str, where: Location) -> tuple[Mapping[str, Any], ...]:
    """Functions in OpenAI's form. Raises DataError.

    `value` is a list, or JSON text of one; what it lists is `{"type": "function", "function": {...}}`, or the function
    alone. A key that is null is left out, unless it stands in JSON text.
    """
    if value in (None, ""):
        return ()
    listed = _values.from_json(value, name, where) if isinstance(value, str) else value
    items = _values.list_of(listed, name, where)
    keep_null = isinstance(value, str)
    return tuple(_tool(item, f"{name}[{number}]", where, keep_null) for number, item in enumerate(items))


def _tool(item: Any, at: str, where: Location, keep_null: bool) -> Mapping[str, Any]:
    tool = _object(item, at, where, "an object with the name of a function", keep_null)
    wrapped = tool if "function" in tool else {"type": "function", "function": tool}
    _function(wrapped, at, where)
    return wrapped if wrapped.get("type") is not None else {"type": "function", **wrapped}


def calls(value: Any, name: str, where: Location) -> tuple[ToolCall, ...]:
    """Calls of functions: a list or one alone, or JSON text of it. Raises DataError.

    A call is `{"id", "type": "function", "function": {"name", "arguments"}}`, or name and arguments alone. Arguments
    are an object, or JSON text of one.
    """
    if value in (None, ""):
        return ()
    keep_null = isinstance(value, str)
    found = _values.from_json(value, name, where) if isinstance(value, str) else value
    if isinstance(found, dict):
        return (_call(found, name, where, keep_null),)
    items = _values.list_of(found, name, where)
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
    known_by = call.get("id")
    return ToolCall(
        function["name"],
        {} if arguments is None else arguments,
        None if known_by is None else _values.text(known_by, f"{at}.id", where),
    )


def _object(item: Any, at: str, where: Location, expected: str, keep_null: bool) -> dict[str, Any]:
    if isinstance(item, str):
        item, keep_null = _values.from_json(item, at, where), True
    if not isinstance(item, dict):
        raise DataError(f"{where}: {at} is {_values.kind(item)}, expected {expected}")
    checked: dict[str, Any] = _values.checked_json(item, at, where, drop_null=not keep_null)
    return checked


def _function(item: Mapping[str, Any], at: str, where: Location) -> Mapping[str, Any]:
    """The function that an object of OpenAI's form is about, or that it is itself. It has a name."""
    if "function" in item and item.get("type") not in (None, "function"):
        raise DataError(f"{where}: {at}.type is {_values.shown(item['type'])}, expected 'function'")
    function = item.get("function", item)
    if not isinstance(function, dict):
        raise DataError(f"{where}: {at}.function is {_values.kind(function)}, expected an object with a name")
    if not _values.text(function.get("name"), f"{at}: the function's name", where).strip():
        raise DataError(f"{where}: {at}: the function's name is empty")
    return function
