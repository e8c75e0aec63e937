"""JSON values become an instance of a dataclass of options, or one line that says which option is wrong and why.

The same function reads the sections of a run file and the options of a plugin. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sftx.config.run_file import Origins
from sftx.errors import ConfigError, did_you_mean

T = TypeVar("T")


@lru_cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    """pydantic's view of a dataclass of options, made once."""
    return TypeAdapter(cls)


def validate(cls: type[T], values: Mapping[str, Any], *, who: str = "", prefix: str = "", origins: Origins) -> T:
    """An instance of the dataclass `cls` from JSON values, strictly: no unknown key, no bool or text for a number.

    Raises ConfigError: one line that names `who` (a plugin), the option and where it was set, what was got, and what
    would do. `prefix` is the dotted name under which `origins` knows these options.
    """
    try:
        # JSON mode is the strict one that still takes a list for a tuple and an int for a float.
        built: T = adapter(cast(Any, cls)).validate_json(
            json.dumps(values, allow_nan=False), strict=True, extra="forbid"
        )
        return built
    except ValidationError as error:
        raise ConfigError(_explain(error.errors(), cls, who, prefix, origins)) from None
    except (TypeError, ValueError) as error:  # not JSON: a YAML tag's own type, a number out of range, a cycle
        raise ConfigError(f"{who or 'run file'}: {error}") from None


def _explain(errors: Sequence[ErrorDetails], cls: type, who: str, prefix: str, origins: Origins) -> str:
    """One line on the first wrong option; what a union would take is joined by 'or'."""
    schema = adapter(cls).json_schema()
    path = _option_path([str(part) for part in errors[0]["loc"]], schema)
    same = [e for e in errors if [str(part) for part in e["loc"]][: len(path)] == path]
    # Of a list, the item that is wrong; not also that the list is no text.
    same = [e for e in same if len(e["loc"]) == max(len(e["loc"]) for e in same)]
    name = ".".join(path)
    if not name:  # a dataclass's own check of its options together
        return ": ".join(part for part in (origins.of(prefix.rstrip(".")), who, _expectation(same[0])) if part)
    if same[0]["type"] == "value_error" and isinstance(same[0]["input"], dict):  # the same of a section
        return ": ".join(part for part in (origins.of(prefix + name), who, f"{name}: {_expectation(same[0])}") if part)
    start = ": ".join(part for part in (origins.of(prefix + name), who, f"option {name!r}") if part)
    if same[0]["type"] == "missing":
        given = f"; give it with --set {prefix.removeprefix('plugins.')}{name}=..." if prefix else ""
        return f"{start} is missing; it has no default{given}"
    if same[0]["type"] == "unexpected_keyword_argument":
        names = _names_at(path[:-1], schema)
        hint = did_you_mean(path[-1], names) or ("; known are " + ", ".join(names) if names else "; it takes none")
        return f"{start} does not exist{hint}"
    wanted = " or ".join(dict.fromkeys(_expectation(e) for e in same))
    return f"{start}: got {json.dumps(same[0]['input'], ensure_ascii=False)}, expected {wanted}"


def _expectation(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    message = message.replace("String should have ", "a string of ")
    message = message[:1].lower() + message[1:]
    return f"a number {message}" if message.startswith(("greater", "less")) else message


def _option_path(location: Sequence[str], schema: Mapping[str, Any]) -> list[str]:
    """The leading parts of pydantic's location that name options; the rest are union members and indices."""
    depth = 1
    while depth < len(location) and (location[depth].isdigit() or _names_at(location[:depth], schema)):
        depth += 1
    path = list(location[:depth])
    return path[:-1] if path and path[-1].isdigit() else path  # an item of a list is named where its own options are


def _names_at(path: Sequence[str], schema: Mapping[str, Any]) -> list[str]:
    nodes = [schema]
    for part in path:
        nodes = [child for node in nodes for child in _children(node, part, schema)]
    return [name for node in nodes for name in node.get("properties", {})]


def _children(node: Mapping[str, Any], part: str, schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a schema says of an option, or of an item of a list: each of the forms that it may take."""
    child = node.get("items") if part.isdigit() else node.get("properties", {}).get(part)
    found, open_ones = [], [child] if child is not None else []
    while open_ones:
        one = open_ones.pop()
        open_ones += one.get("anyOf", [])
        if "$ref" in one:
            open_ones.append(schema["$defs"][one["$ref"].rsplit("/", 1)[1]])
        found.append(one)
    return found
