"""YAML 1.2 text becomes plain JSON values, and every value remembers where it was written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import yaml

from sftx import atomic_files
from sftx.errors import ConfigError, one_line

EMBEDDED: Final = Path(__file__).parents[1] / "demo" / "run.yaml"
"""The run file of `sftx run` when neither a run file nor data is given."""


class Origins:
    """Where each dotted name was set: `run.yaml:7`, or what was typed on the command line."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def set(self, name: str, place: str) -> None:
        self._places[name] = place

    def of(self, name: str) -> str:
        """The place of `name`, or of the nearest name above it; empty when nobody set it."""
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            place = self._places.get(".".join(parts[:end]))
            if place is not None:
                return place
        return ""


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: `1e-4` is a number, `yes` and `2024-01-01` are text, a key stands once.

    `.inf` and `.nan` are text here: JSON, in which runs are recorded, has no such numbers.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a key that is not text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
for _tag, _pattern in (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    ("float", _FLOAT),
):
    for _side in (_Loader, _Dumper):  # the dumper has YAML 1.1's already
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def parse_value(text: str) -> Any:
    """The JSON value that `text` stands for on a command line: `32`, `1e-4`, `[a, b]`, `'32'`, any other text itself.

    Text is not YAML: `Answer: yes` is no mapping there, and what follows ` #` is no comment.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text
    if text.lstrip().startswith(("[", "{", "'", '"')):
        return value
    return text if isinstance(value, str | list | dict) or "#" in text else value


def read(path: Path) -> tuple[dict[str, Any], Origins]:
    """The values of a run file, and the line of each. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader) if root is not None else {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {one_line(Exception(error.problem))}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got a {type(values).__name__}, expected a mapping such as `model: ...`")
    _check_size(values, path)
    origins = Origins()
    if root is not None:
        _note_lines(root, path, "", origins)
    return values, origins


_MOST_VALUES: Final = 100_000


def _check_size(values: Any, path: Path) -> None:
    """Raises ConfigError for aliases that stand for more values than anybody writes, or for themselves."""
    sizes: dict[int, int] = {}

    def size(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = _MOST_VALUES  # what is met again while it is counted stands within itself
            sizes[id(value)] = 1 + sum(map(size, value.values() if isinstance(value, dict) else value))
        return sizes[id(value)]

    if size(values) >= _MOST_VALUES:
        raise ConfigError(f"{path}: its aliases stand for over {_MOST_VALUES:,} values; write out what is meant")


def _note_lines(node: yaml.Node, path: Path, prefix: str, origins: Origins) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            origins.set(name, f"{path}:{key.start_mark.line + 1}")
            _note_lines(value, path, f"{name}.", origins)


def assign(values: dict[str, Any], path: Sequence[str], value: Any, typed: str) -> None:
    """Sets the name of that `path` in nested `values`; `typed` names the option in a ConfigError."""
    *sections, last = path
    node = values
    for depth, section in enumerate(sections):
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"{typed}: {'.'.join(sections[: depth + 1])} has no options of its own")
    node[last] = value


def write(values: dict[str, Any], path: Path) -> None:
    """Writes `values` as YAML that `read` reads back as they are. Raises OutputError."""
    atomic_files.write_text(path, yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    text = f"{mantissa}.0{e}{exponent}" if e and "." not in mantissa else text  # YAML 1.1 reads 1e-4 as text
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _float)
