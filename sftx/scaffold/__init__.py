"""A plugin's name and its hook become a package: one that installs, is typed, and passes its tests as it stands.

The text lies in `package/` (what all have in common) and `hooks/<hook>/` (the plugin and its test). The plugin's
docstring and options are written there once; the README and the metadata take them from it.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import keyword
import re
import string
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.version import Version

import sftx
from sftx.assembly.discovery import discover
from sftx.assembly.hookspecs import PROJECT, RETURNS, TEMPLATES
from sftx.errors import ConfigError, OutputError

HOOKS: Final = tuple(hook.removeprefix(f"{PROJECT}_") for hook in RETURNS)
_PREFIX: Final = f"{PROJECT}-"
_HERE: Final = Path(__file__).parent
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Names:
    """What a plugin of this name is called in each place."""

    name: str
    hook: str

    @property
    def distribution(self) -> str:
        return f"{PROJECT}-{self.name}"

    @property
    def module(self) -> str:
        return self.distribution.replace("-", "_")

    @property
    def class_name(self) -> str:
        return "".join(word.capitalize() for word in self.name.split("-"))

    @property
    def test(self) -> str:
        """Of the plugin's own name, so that the tests of several packages can be collected together."""
        return f"test_{self.name.replace('-', '_')}"


def write_package(name: str, hook: str, directory: Path) -> list[Path]:
    """Writes the package `sftx-NAME` into `directory`, whole or not at all; returns its files, itself first.

    `name` may have the prefix `sftx-` already; `hook` is one of HOOKS. Raises ConfigError for a name that cannot be,
    OutputError when the place is taken or cannot be written.
    """
    names = Names(name.removeprefix(_PREFIX), hook)
    _check_name(names)
    files = _files(names)
    target = directory / names.distribution
    try:
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise OutputError(f"{target} exists already; move it away, or choose another --directory")
        # Written beside and renamed: an interruption leaves no half of a package.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".") as beside:
            package = Path(beside) / names.distribution
            for path, text in files.items():
                (package / path).parent.mkdir(parents=True, exist_ok=True)
                (package / path).write_text(text, encoding="utf-8")
            package.rename(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
    return [target, *(target / path for path in files)]


def _check_name(names: Names) -> None:
    """Raises ConfigError for a name that is malformed, taken, or reserved."""
    from sftx.config.options import SECTIONS  # which other commands of the group need not wait for
    from sftx.config.run_file import parse_value

    name = names.name
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a plugin: lower case letters, digits and single dashes between them, "
            "with a letter first"
        )
    if name in SECTIONS:
        raise ConfigError(f"{name!r} is a section of the run file, which no plugin can be called; choose another name")
    if parse_value(name) != name:
        raise ConfigError(f"{name!r} is {parse_value(name)} in a run file, not a name; choose another name")
    taken = [str(info) for info in discover() if info.name == name]
    if taken:
        raise ConfigError(f"{name!r} is installed already, as {' and '.join(taken)}; choose another name")
    if importlib.util.find_spec(names.module) is not None:
        raise ConfigError(f"{name!r} would be the module {names.module}, which is installed already; choose another")
    files = _files(Names("_", names.hook))  # a name that nobody can give
    used = {word for path, text in files.items() if path.endswith(".py") for word in _identifiers(text)}
    if keyword.iskeyword(names.class_name) or names.class_name in used:
        raise ConfigError(
            f"{name!r} would be the class {names.class_name}, which means something else there; choose another name, "
            f"such as {name}-{names.hook}"
        )


def _identifiers(source: str) -> set[str]:
    """The names that a module uses or imports."""
    nodes = list(ast.walk(ast.parse(source)))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def _files(names: Names) -> dict[str, str]:
    """The package's files: path within it -> text."""
    common, hook = _HERE / "package", _HERE / "hooks" / names.hook
    values = {
        "name": names.name,
        "hook": names.hook,
        "distribution": names.distribution,
        "module": names.module,
        "class_name": names.class_name,
        "sftx_range": sftx_range(),
    }
    modules = {path.name.removesuffix(".in"): _fill(path, values) for path in sorted(hook.glob("*.py.in"))}
    test = modules.pop("test.py")
    cls = next(node for node in ast.parse(modules["__init__.py"]).body if isinstance(node, ast.ClassDef))
    options = list(_options(cls))
    values |= {
        "summary": (ast.get_docstring(cls) or "").partition("\n")[0],
        "run_file": _run_file(names, {option: value for option, _, value, _ in options}),
        "options": "\n".join(f"| `{option}` | {kind} | `{value}` | {text} |" for option, kind, value, text in options),
    }
    return {
        "pyproject.toml": _fill(common / "pyproject.toml.in", values),
        "README.md": _fill(common / "README.md.in", values),
        ".gitignore": _fill(common / "gitignore.in", values),
        **{f"{names.module}/{file}": text for file, text in modules.items()},
        f"{names.module}/py.typed": "",
        f"tests/{names.test}.py": test,
    }


def _fill(path: Path, values: Mapping[str, str]) -> str:
    return string.Template(path.read_text(encoding="utf-8")).substitute(values)


def sftx_range() -> str:
    """The versions that a package made today is for: those of the running sftx's minor version."""
    version = Version(sftx.__version__)
    # To PEP 440 a pre-release of 0.2 comes before 0.2.
    floor = f"{version.major}.{version.minor}{'.dev0' if version.is_prerelease else ''}"
    return f">={floor},<{version.major}.{version.minor + 1}"


def _options(cls: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default as JSON and help of each `name: Annotated[type, Field(description=help)] = default`."""
    for node in cls.body:
        match node:
            case ast.AnnAssign(
                target=ast.Name(id=name),
                annotation=ast.Subscript(
                    value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[kind, ast.Call(keywords=keywords)])
                ),
                value=ast.expr() as default,
            ):
                text = next(ast.literal_eval(word.value) for word in keywords if word.arg == "description")
                yield name, ast.unparse(kind), json.dumps(ast.literal_eval(default)), text


def _run_file(names: Names, options: Mapping[str, str]) -> str:
    """The plugins of a run file: this one with its options, and what else such a run needs."""
    own = ", ".join(f"{option}: {default}" for option, default in options.items())
    plugins = {TEMPLATES[0]: ""} if names.hook != "template" else {}
    if names.hook != "adapter":
        plugins["lora"] = ""
    return "\n".join(f"  {name}: {{{given}}}" for name, given in {**plugins, names.name: own}.items())
