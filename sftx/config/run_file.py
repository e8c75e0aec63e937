"""Reads and writes run files: YAML 1.2 text on one side, plain JSON values and the line that set each on the other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final

import yaml

from sftx import atomic_files
from sftx.errors import ConfigError, kind_of, one_line


class Origins:
    """Records where each option was set, by its dotted name: `run.yaml:7`, or the option as the user typed it."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def set(self, name: str, place: str) -> None:
        self._places[name] = place

    def has(self, name: str) -> bool:
        """Return whether the option itself was set, and not only a section around it."""
        return name in self._places

    def of(self, name: str) -> str:
        """Return the place of `name`, or of the nearest section around it that has one; else the empty string.

        A section whose options stand under their dotted names alone is where the first of them is.
        """
        while name and name not in self._places:
            within = next((place for other, place in self._places.items() if other.startswith(f"{name}.")), None)
            if within is not None:
                return within
            name = name.rpartition(".")[0]
        return self._places.get(name, "")


def _int(text: str) -> int | str:
    """Return the integer; the text itself when it has more digits than Python converts, 4300 by default."""
    try:
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    except ValueError:
        return text


def _float(text: str) -> float | str:
    """Return the number; the text itself, as for `.inf`, when it is larger than a float can be."""
    value = float(text)
    return value if math.isfinite(value) else text


_TAG: Final = "tag:yaml.org,2002:"
_SCALARS: Final[dict[str, tuple[re.Pattern[str], Callable[[str], Any]]]] = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), lambda text: None),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), lambda text: text.lower() == "true"),
    "int": (re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), _int),
    "float": (re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)$"), _float),
}
"""The scalars of YAML 1.2's core schema that are not text, each with its conversion.

`.inf` and `.nan` are left out and so are text, as is `1e400`: JSON, in which runs are recorded, has no such numbers.
What expects a number then names the option, its line and the text.
"""


class _Loader(yaml.SafeLoader):
    """Resolves scalars as YAML 1.2 does: `1e-4` is a number, `yes` and `2024-01-01` are text, `<<` is a plain key."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or of YAML 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, None)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, None)  # the patterns of YAML 1.1 are inherited


def _represent_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    """Write 0.0001 as `0.0001` and 1e-05 as `1.0e-05`, for YAML 1.1 takes `1e-05` for text."""
    mantissa, e, exponent = repr(value).partition("e")
    return dumper.represent_scalar(
        _TAG + "float", f"{mantissa}.0e{exponent}" if e and "." not in mantissa else repr(value)
    )


_Dumper.add_representer(float, _represent_float)


class _BlockDumper(_Dumper):
    """Writes text of several lines as a block."""


def _represent_text(dumper: _BlockDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(_TAG + "str", value, style="|" if "\n" in value else None)


_BlockDumper.add_representer(str, _represent_text)


class _Builder:
    """Builds plain JSON values from YAML nodes, and notes the line of every option."""

    max_values: Final = 100_000
    """Aliases of aliases can stand for more values than fit into memory."""

    def __init__(self, place: str) -> None:
        self.origins = Origins()
        self._place = place
        self._num_values = 0

    def build(self, node: yaml.Node, name: str | None) -> Any:
        """Return the value of `node`, the option `name`; values within lists have no name. Raises MarkedYAMLError."""
        self._num_values += 1
        if self._num_values > self.max_values:
            raise _error(node, f"aliases expand to over {self.max_values:,} values; write the values out")
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            values: dict[str, Any] = {}
            for key, child in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
                    raise _error(key, "a key that is not text; put it in quotes")
                if key.value in values:
                    raise _error(key, f"duplicate key {key.value!r}")
                path = None if name is None else f"{name}.{key.value}".removeprefix(".")
                if path is not None:
                    self.origins.set(path, f"{self._place}:{key.start_mark.line + 1}")
                values[key.value] = self.build(child, path)
            return values
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(child, None) for child in node.value]
        if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "str":
            return node.value
        pattern, convert = _SCALARS.get(node.tag.removeprefix(_TAG), (None, str))
        if not isinstance(node, yaml.ScalarNode) or pattern is None or not pattern.match(node.value):
            raise _error(node, f"a value of the tag {node.tag}, which a run file cannot hold")
        return convert(node.value)


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def parse(text: str, place: str = "") -> tuple[Any, Origins]:
    """Return the JSON value of YAML text, and the line of each option. `place` begins the message of a ConfigError."""
    builder = _Builder(place)
    try:
        root = yaml.compose(text, Loader=_Loader)
        return (None if root is None else builder.build(root, "")), builder.origins
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = one_line(Exception(error.problem))
    except RecursionError:
        line, problem = "", "values are nested too deeply, or an alias contains itself"
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML forbids
        line, problem = "", one_line(error)
    raise ConfigError(f"{place}{line}: not valid YAML: {problem}")


def read(path: Path) -> tuple[dict[str, Any], Origins]:
    """Return the values of a run file, and the line of each. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8: {error.reason}; save it as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from None
    values, origins = parse(text, str(path))
    if values is None:
        return {}, origins
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got {kind_of(values)}, expected a mapping such as `model: ...`")
    return values, origins


def flow(value: Any) -> str:
    """Return the value as one line of YAML, as it may stand after the name of an option."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def dump(values: dict[str, Any]) -> str:
    """Return `values` as YAML in which text of several lines, such as a script, stands as it is."""
    return yaml.dump(values, Dumper=_BlockDumper, sort_keys=False, allow_unicode=True, width=10**6)


def write(values: dict[str, Any], path: Path) -> None:
    """Write `values` as YAML that `read` reads back unchanged. Raises OutputError."""
    atomic_files.write_text(path, yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
