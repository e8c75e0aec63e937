"""This package writes a new plugin package: one that installs, is typed, and passes its tests before anything changes.

The text is in `package/` (files that all plugins have) and `hooks/<hook>/` (the plugin and its test). A plugin's
docstring and options are written only there; README and metadata are generated from them. A plugin that implements
several hooks inherits from one class for each, in a module of its own. The package may import
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from packaging.version import Version

import sftx
from sftx.assembly.entry_points import COMMANDS, PLUGINS, discover
from sftx.assembly.hookspecs import PROJECT, RETURNS
from sftx.atomic_files import atomic_directory
from sftx.config.default_plugins import RESERVED_SCHEMES, SCHEME, TEMPLATES
from sftx.errors import ConfigError, OutputError

HOOKS: Final = tuple(hook.removeprefix(f"{PROJECT}_") for hook in RETURNS)
COMMAND: Final = "command"
"""What a package has instead of a plugin that adds a command to `sftx`."""
Definition: TypeAlias = ast.ClassDef | ast.FunctionDef
_HERE: Final = Path(__file__).parent
_LINE_LENGTH: Final = 120  # as in pyproject.toml of a package


@dataclass(frozen=True)
class Names:
    """The names of a plugin and of everything in its package."""

    name: str
    hooks: tuple[str, ...]

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
    def classes(self) -> dict[str, str]:
        """The class that implements each hook: the plugin's own, or one of those that it inherits from."""
        if len(self.hooks) == 1:
            return {self.hooks[0]: self.class_name}
        return {hook: f"{self.class_name}{hook.capitalize()}" for hook in self.hooks}


def write_package(name: str, hooks: Sequence[str], directory: Path) -> list[Path]:
    """Write the package `sftx-NAME` into `directory`, atomically; return its path and those of its files.

    `name` may begin with `sftx-`; `hooks` are some of HOOKS, all of which its one plugin implements, or
    COMMAND alone. Raises ConfigError
    for an invalid name, and for hooks that one class cannot implement; OutputError when the package exists already or
    cannot be written.
    """
    names = Names(name.removeprefix(f"{PROJECT}-"), tuple(hook for hook in (*HOOKS, COMMAND) if hook in hooks))
    if COMMAND in names.hooks and len(names.hooks) > 1:
        raise ConfigError(f"--hook {COMMAND} makes a package of its own; leave --hook {names.hooks[0]} out")
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
    if "source" in names.hooks and (name in RESERVED_SCHEMES or not SCHEME.fullmatch(name)):
        raise ConfigError(f"{name!r} cannot be the scheme of a source; choose another name, such as {name}-rows")
    value, _ = run_file.parse(name)
    if value != name:
        raise ConfigError(f"{name!r} is {value} in a run file, not a name; choose another name")
    if installed := [str(info) for info in discover(PLUGINS, COMMANDS) if info.name == name]:
        raise ConfigError(f"{name!r} is installed already, as {' and '.join(installed)}; choose another name")
    if importlib.util.find_spec(names.module) is not None:
        raise ConfigError(f"{name!r} would be the module {names.module}, which is installed already; choose another")
    used = set()
    for path, text in _files(Names("_", names.hooks)).items():  # "_" is not a valid name, so it clashes with nothing
        for node in ast.walk(ast.parse(text)) if path.endswith(".py") else ():
            if isinstance(node, ast.Name):
                used.add(node.id)
            elif isinstance(node, ast.ImportFrom):
                used |= {alias.asname or alias.name for alias in node.names}
    taken = [cls for cls in (names.class_name, *names.classes.values()) if keyword.iskeyword(cls) or cls in used]
    if taken:
        raise ConfigError(
            f"{name!r} would be the class {taken[0]}, a name that the package uses for something else; choose "
            f"another name, such as {name}-{names.hooks[-1]}"
        )


def _files(names: Names) -> dict[str, str]:
    """Return the text of each file of the package, by its path in the package.

    Raises ConfigError for hooks that one class cannot implement.
    """
    values = {
        "name": names.name,
        "hooks": ("the hook " if len(names.hooks) == 1 else "the hooks ")
        + _enumerated([f"`{PROJECT}_{hook}`" for hook in names.hooks]),
        "distribution": names.distribution,
        "module": names.module,
        "class_name": names.class_name,
        "group": COMMANDS if COMMAND in names.hooks else PLUGINS,
        "object": COMMAND if COMMAND in names.hooks else names.class_name,
        "sftx_range": sftx_range(),
    }

    def fill(path: Path) -> str:
        return string.Template(path.read_text(encoding="utf-8")).substitute(values)

    # The plugin's name is in the names of tests so that pytest can collect those of several packages together.
    stem = f"tests/test_{names.name.replace('-', '_')}"
    modules: dict[str, str] = {}
    tests: dict[str, str] = {}
    classes: dict[str, Definition] = {}
    for hook, values["class_name"] in names.classes.items():
        sources = sorted((_HERE / "hooks" / hook).glob("*.py.in"))
        own = {path.name.removesuffix(".in"): fill(path) for path in sources}
        is_only = len(names.hooks) == 1
        tests[f"{stem}.py" if is_only else f"{stem}_{hook}.py"] = own.pop("test.py")
        classes[hook] = _definition(own["__init__.py"])
        if not is_only:
            own[f"{hook}.py"] = own.pop("__init__.py")
        modules |= own
    values["class_name"] = names.class_name
    _check_combination(classes)
    if len(names.hooks) > 1:
        modules["__init__.py"] = _combined(names)
    options = [option for cls in classes.values() for option in _options(cls)]
    values["summary"] = (ast.get_docstring(_definition(modules["__init__.py"])) or "").partition("\n")[0]
    values["options"] = "\n".join(
        f"| `{name}` | {kind} | `{default}` | {text} |" for name, kind, default, text in options
    )
    # The plugins of a run file: a template, what says what trains, and what asks for rewards, unless the new plugin
    # does, and the new plugin.
    plugins = {TEMPLATES[0]: ""} if "template" not in names.hooks else {}
    if not {"adapter", "trainable"} & {*names.hooks}:
        plugins["lora"] = ""
    if "reward" in names.hooks and "rollout" not in names.hooks:
        plugins["grpo"] = ""
    if "rollout" in names.hooks and "reward" not in names.hooks:
        plugins["reward-exact-match"] = ""
    plugins[names.name] = ", ".join(f"{name}: {default}" for name, _, default, _ in options)
    values["run_file"] = "\n".join(f"  {plugin}: {{{settings}}}" for plugin, settings in plugins.items())
    package = _HERE / "package"
    own_readme = _HERE / "hooks" / names.hooks[0] / "README.md.in"
    has_own_readme = len(names.hooks) == 1 and own_readme.exists()
    return {
        "pyproject.toml": fill(package / "pyproject.toml.in"),
        "README.md": fill(own_readme if has_own_readme else package / "README.md.in"),
        ".gitignore": fill(package / "gitignore.in"),
        **{f"{names.module}/{file}": text for file, text in modules.items()},
        f"{names.module}/py.typed": "",
        **tests,
    }


def _check_combination(classes: Mapping[str, Definition]) -> None:
    """Raise ConfigError when the classes of two hooks define the same name, so that one class cannot be both."""
    owners: dict[str, str] = {}
    for hook, cls in classes.items():
        for node in cls.body:
            name = getattr(node, "name", None) or getattr(getattr(node, "target", None), "id", None)
            if name is not None and (other := owners.setdefault(name, hook)) != hook:
                raise ConfigError(
                    f"--hook {other} --hook {hook}: the classes for both define {name}, so one plugin cannot inherit "
                    f"from both; write it with --hook {other}, and add a method {PROJECT}_{hook} that returns an "
                    "object of another class"
                )


def _combined(names: Names) -> str:
    """Return the module of a plugin that implements several hooks, each by a class that it inherits from."""
    parts = names.classes
    summary = f"Is {_enumerated([f'{_article(hook)} {hook}' for hook in parts])} of a run."
    if len(summary) > _LINE_LENGTH - len('    """"""'):
        summary = f"Is {len(parts)} stages of a run."
    bases = ", ".join(parts.values())
    first = f"class {names.class_name}({bases}):"
    if len(first) > _LINE_LENGTH:
        first = "\n".join([f"class {names.class_name}(", *(f"    {cls}," for cls in parts.values()), "):"])
    return "\n".join(
        [
            f'"""The plugin `{names.name}`, which implements several hooks: each is a class in a module of its own."""',
            "",
            "from __future__ import annotations",
            "",
            "from dataclasses import dataclass",
            "",
            *(f"from {names.module}.{hook} import {parts[hook]}" for hook in sorted(parts)),
            "",
            "__all__ = [",
            *(f'    "{cls}",' for cls in sorted([names.class_name, *parts.values()])),
            "]",
            "",
            "",
            "@dataclass(frozen=True, eq=False)",
            first,
            f'    """{summary}"""',
            "",
        ]
    )


def _definition(module: str) -> Definition:
    """Return what a module is about: its first decorated class or function, a plugin or a command."""
    nodes = ast.parse(module).body
    return next(node for node in nodes if isinstance(node, Definition) and node.decorator_list)


def _enumerated(names: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def sftx_range() -> str:
    """Return the sftx versions that a new package supports: those with the minor version of the running sftx."""
    version = Version(sftx.__version__)
    # In the order of PEP 440, a pre-release of 0.2 is lower than 0.2.
    floor = f"{version.major}.{version.minor}{'.dev0' if version.is_prerelease else ''}"
    return f">={floor},<{version.major}.{version.minor + 1}"


def _options(cls: Definition) -> Iterator[tuple[str, str, str, str]]:
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
