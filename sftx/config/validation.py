"""Validates options: JSON values become an instance of an options dataclass, or an error of one line.

The sections of a run file and the options of plugins go through the same function. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar, cast, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sftx.config import run_file, unknown_options
from sftx.config.flatten import flatten
from sftx.config.options import adapter
from sftx.config.run_file import Origins
from sftx.config.unknown_options import UnknownOption, UnknownOptionsError
from sftx.errors import ConfigError
from sftx.secret import SECRET_TYPE

T = TypeVar("T")

_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def validate(cls: type[T], values: Mapping[str, Any], *, who: str = "", prefix: str = "", origins: Origins) -> T:
    """Return an instance of the dataclass `cls`, strictly: unknown keys and bools or text for numbers are errors.

    Raises ConfigError with one line that names the place where the option was set, `who` (a plugin), the option, the
    value and what is expected; UnknownOptionsError for all options that do not exist. Options of other tools that ask
    for nothing are left out with a note. `prefix` is the dotted name under which `origins` has these options.
    """
    for name, value in flatten(values).items():
        if (expected := _json_expects([name, value])) is not None:
            start = [part for part in (origins.of(prefix + name), who) if part]
            raise ConfigError(": ".join([*start, f"option {name!r}"]) + f": got {_shown(value)}, expected {expected}")
    try:
        # In JSON mode strict validation still takes a list for a tuple and an int for a float.
        built: T = adapter(cast(Any, cls)).validate_json(json.dumps(values), strict=True, extra="forbid")
        return built
    except ValidationError as error:
        errors = error.errors()
    unknown = _unknown(errors, cls, prefix, origins)
    if not unknown:
        raise ConfigError(_explain(errors, cls, who, prefix, origins))
    given = {f"{prefix}{name}": value for name, value in flatten(values).items()}
    within = [inner for option in unknown.values() for inner in unknown_options.expanded(option, origins)]
    found = unknown_options.answered(within, given)
    if not all(map(unknown_options.is_harmless, found)):
        raise UnknownOptionsError(found, who)
    unknown_options.note(found)
    for path in unknown:
        values = _without(values, path)
    return validate(cls, values, who=who, prefix=prefix, origins=origins)


def _unknown(
    errors: list[ErrorDetails], cls: type, prefix: str, origins: Origins
) -> dict[tuple[str, ...], UnknownOption]:
    """Return the options that do not exist, by their path in the values that were validated."""
    unknown = {}
    for error in errors:
        if error["type"] == "unexpected_keyword_argument":
            path, names = _option_path(cls, error)
            name = prefix + ".".join(path)
            unknown[tuple(path)] = UnknownOption(name, error["input"], origins.of(name), tuple(names))
    return unknown


def _without(values: Any, path: tuple[str, ...]) -> Any:
    """Return a copy of nested values without the one that the path leads to."""
    head, *rest = path
    if isinstance(values, list | tuple):
        return [_without(item, tuple(rest)) if str(index) == head else item for index, item in enumerate(values)]
    if not rest:
        return {name: value for name, value in values.items() if name != head}
    if head not in values:  # the index of the only source, which was given without a list around it
        return _without(values, tuple(rest))
    return {**values, head: _without(values[head], tuple(rest))}


def _json_expects(value: Any) -> str | None:
    """Return what JSON has instead of `value`, None if it has it. Integers are those that every reader can hold."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        # A byte of the command line that is not UTF-8 is half a surrogate pair in Python's text.
        return "text that is valid UTF-8" if _LONE_SURROGATE.search(value) else None
    if isinstance(value, int):
        return None if abs(value) < 2**63 else "a number of at most 18 digits"
    if isinstance(value, float):
        return None if math.isfinite(value) else "a finite number"
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return next(filter(None, map(_json_expects, value)), None)
    return "text, a number, true, false, null, a list or a mapping"


def _shown(value: Any) -> str:
    """Return the value as it stands in a run file, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-20:]}"


def _explain(errors: list[ErrorDetails], cls: type, who: str, prefix: str, origins: Origins) -> str:
    """Return one line on the first wrong option. A union reports one error a member, which are joined by "or"."""
    path, _ = _option_path(cls, errors[0])
    same_option = [error for error in errors if _option_path(cls, error)[0] == path]
    # A wrong item of a list is reported one level deeper than that the list is not, say, text: keep the deepest.
    depth = max(len(error["loc"]) for error in same_option)
    same_option = [error for error in same_option if len(error["loc"]) == depth]
    error = same_option[0]
    name = ".".join(path)
    where = [part for part in (origins.of((prefix + name).rstrip(".")), who) if part]
    if error["type"] == "value_error" and (not name or isinstance(error["input"], dict)):  # of __post_init__
        return ": ".join([*where, *([name] if name else []), _expected(error)])
    start = ": ".join([*where, f"option {name!r}"])
    if error["type"] == "missing":
        advice = f"; give it with --set {prefix.removeprefix('plugins.')}{name}=..." if prefix else ""
        return f"{start} is missing; it has no default{advice}"
    expected = " or ".join(dict.fromkeys(map(_expected, same_option)))
    is_typed = where[:1] != [] and where[0].startswith("--")
    advice = _advice(error["input"], {other["type"] for other in same_option}, in_shell=is_typed)
    if not advice and not prefix and unknown_options.asks_for_nothing(path[-1], error["input"]):
        advice = "; leave it out"
    got = "a value that is not shown" if error["type"] == SECRET_TYPE else _shown(error["input"])
    return f"{start}: got {got}, expected {expected}{advice}"


def _advice(value: Any, types: set[str], *, in_shell: bool) -> str:
    """Return what to write for a value of another type, or the empty string."""
    if value is None:
        return "; give it a value, or leave it out"
    if isinstance(value, bool | int | float):
        if types == {"string_type"}:
            quotes = ("'\"", "\"'") if in_shell else ('"', '"')
            return f"; put it in quotes: {json.dumps(value).join(quotes)}"
        return f"; write {int(value)}" if "int_type" in types and value == int(value) and value is not True else ""
    if isinstance(value, str) and types & {"int_type", "float_type"}:
        number, _ = run_file.parse(re.sub(r"(?<=\d)[_,](?=\d{3}(?!\d))", "", value.strip()))
        is_number = isinstance(number, int if "float_type" not in types else int | float) and number not in (
            True,
            False,
        )
        return f"; write {number}" if is_number else ""
    return ""


def _option_path(cls: type | None, error: ErrorDetails) -> tuple[list[str], list[str]]:
    """Return the names of the options that lead to an error, and all names beside the last one.

    pydantic's location also has the members of unions, which are left out, and the indices of lists, which stay where
    an option follows: `data.train.0.weight`.
    """
    path: list[str] = []
    names: list[str] = []
    index: list[str] = []
    is_unknown, is_mapping = error["type"] == "unexpected_keyword_argument", False
    for depth, part in enumerate(error["loc"], start=1):
        hints = get_type_hints(cls) if cls is not None else {}
        if isinstance(part, int):
            index = [str(part)]
        elif part in hints or (is_unknown and depth == len(error["loc"])):
            path += [*index, part]
            names, index = list(hints), []
            is_mapping = get_origin(hints.get(part)) is dict
            cls = _dataclass_in(hints.get(part))
        elif is_mapping:  # its keys are anything
            path, is_mapping = [*path, part], False
    return path, names


def _dataclass_in(hint: Any) -> type | None:
    """Return the first dataclass within a type hint such as `tuple[Source, ...]` or `Filters | None`."""
    if dataclasses.is_dataclass(hint):
        return cast(type, hint)
    return next(filter(None, map(_dataclass_in, get_args(hint))), None)


def _expected(error: ErrorDetails) -> str:
    if error["type"] == "bool_type":
        return "true or false"
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    message = message.replace("String should have ", "a string of ")
    message = message[:1].lower() + message[1:]
    message = {"an object": "a mapping of options", "a valid dictionary": "a mapping of options"}.get(message, message)
    return f"a number {message}" if message.startswith(("greater", "less")) else message
