"""This package writes a new plugin package: one that installs, is typed, and passes its tests before anything changes.

The text is in `package/` (files that all plugins have) and `hooks/<hook>/` (the plugin and its test). A plugin's
docstring and options are written only there; README and metadata are generated from them. The package may import
`sftx.assembly`, `sftx.config` and the modules directly under `sftx`; only `sftx.cli` imports it.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import keyword
import os
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.version import Version

import sftx
from sftx.assembly.discovery import discover
from sftx.assembly.hookspecs import PROJECT, RETURNS
from sftx.atomic_files import atomic_directory
from sftx.config.default_plugins import TEMPLATES
from sftx.errors import ConfigError, OutputError

HOOKS: Final = tuple(hook.removeprefix(f"{PROJECT}_") for hook in RETURNS)
_HERE: Final = Path(__file__).parent


@dataclass(frozen=True)
class Names:
    """The names of a plugin and of everything in its package."""

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


def write_package(name: str, hook: str, directory: Path) -> list[Path]:
    """Write the package `sftx-NAME` into `directory`, atomically; return its path and those of its files.

    `name` may begin with `sftx-`; `hook` is one of HOOKS. Raises ConfigError for an invalid name, OutputError when the
    package exists already or cannot be written.
    """
    names = Names(name.removeprefix(f"{PROJECT}-"), hook)
    _check_name(names)
    files = _files(names)
    target = directory / names.distribution
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists already; move it away, or choose another --directory")
    with atomic_directory(target) as package:
        for path, text in files.items():
            (package / path).parent.mkdir(parents=True, exist_ok=True)
            (package / path).write_text(text, encoding="utf-8")
    return [target, *(target / path for path in files)]


def _check_name(names: Names) -> None:
    """Raise ConfigError for a name that is malformed, already used, or reserved."""
    from sftx.config import run_file
    from sftx.config.options import SECTIONS  # imported here because other commands of the group do not need it

    name = names.name
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(
            f"{name!r} is not a valid plugin name: use lower case letters, digits and single dashes between them, and "
            "begin with a letter"
        )
    if name in SECTIONS:
        raise ConfigError(f"{name!r} is a section of the run file, so no plugin can have this name; choose another")
    value, _ = run_file.parse(name)
    if value != name:
        raise ConfigError(f"{name!r} is {value} in a run file, not a name; choose another name")
    if installed := [str(info) for info in discover() if info.name == name]:
        raise ConfigError(f"{name!r} is installed already, as {' and '.join(installed)}; choose another name")
    if importlib.util.find_spec(names.module) is not None:
        raise ConfigError(f"{name!r} would be the module {names.module}, which is installed already; choose another")
    used = set()
    for path, text in _files(Names("_", names.hook)).items():  # "_" is not a valid name, so it clashes with nothing
        for node in ast.walk(ast.parse(text)) if path.endswith(".py") else ():
            if isinstance(node, ast.Name):
                used.add(node.id)
            elif isinstance(node, ast.ImportFrom):
                used |= {alias.asname or alias.name for alias in node.names}
    if keyword.iskeyword(names.class_name) or names.class_name in used:
        raise ConfigError(
            f"{name!r} would be the class {names.class_name}, a name that the package uses for something else; choose "
            f"another name, such as {name}-{names.hook}"
        )


def _files(names: Names) -> dict[str, str]:
    """Return the text of each file of the package, by its path in the package."""
    values = {
        "name": names.name,
        "hook": names.hook,
        "distribution": names.distribution,
        "module": names.module,
        "class_name": names.class_name,
        "sftx_range": sftx_range(),
    }

    def fill(path: Path) -> str:
        return string.Template(path.read_text(encoding="utf-8")).substitute(values)

    sources = sorted((_HERE / "hooks" / names.hook).glob("*.py.in"))
    modules = {path.name.removesuffix(".in"): fill(path) for path in sources}
    test = modules.pop("test.py")
    cls = next(node for node in ast.parse(modules["__init__.py"]).body if isinstance(node, ast.ClassDef))
    options = list(_options(cls))
    values["summary"] = (ast.get_docstring(cls) or "").partition("\n")[0]
    values["options"] = "\n".join(
        f"| `{name}` | {kind} | `{default}` | {text} |" for name, kind, default, text in options
    )
    # The plugins of a run file: a template and an adapter, unless the new plugin is one, and the new plugin.
    plugins = {TEMPLATES[0]: ""} if names.hook != "template" else {}
    if names.hook != "adapter":
        plugins["lora"] = ""
    plugins[names.name] = ", ".join(f"{name}: {default}" for name, _, default, _ in options)
    values["run_file"] = "\n".join(f"  {plugin}: {{{settings}}}" for plugin, settings in plugins.items())
    package = _HERE / "package"
    return {
        "pyproject.toml": fill(package / "pyproject.toml.in"),
        "README.md": fill(package / "README.md.in"),
        ".gitignore": fill(package / "gitignore.in"),
        **{f"{names.module}/{file}": text for file, text in modules.items()},
        f"{names.module}/py.typed": "",
        # The plugin's name is in the file name so that pytest can collect the tests of several packages together.
        f"tests/test_{names.name.replace('-', '_')}.py": test,
    }


def sftx_range() -> str:
    """Return the sftx versions that a new package supports: those with the minor version of the running sftx."""
    version = Version(sftx.__version__)
    # In the order of PEP 440, a pre-release of 0.2 is lower than 0.2.
    floor = f"{version.major}.{version.minor}{'.dev0' if version.is_prerelease else ''}"
    return f">={floor},<{version.major}.{version.minor + 1}"


def _options(cls: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default as JSON and help of each `name: Annotated[type, Field(description=help)] = default`."""
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
