"""The contract of a plugin's package: metadata that says what it is, a class that is read before torch is imported."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from pydantic import TypeAdapter

import sftx
from sftx.assembly.discovery import PluginInfo, hooks_of, instance, load_class
from sftx.config.run_file import Origins
from sftx.errors import ConfigError, PluginError
from sftx.testing.clauses import ClauseError, Suite

_HEAVY: Final = ("torch", "transformers", "datasets", "triton")


@dataclass
class _Case:
    info: PluginInfo
    cls: type
    hooks: list[str]

    @property
    def metadata(self) -> dict[str, list[str]]:
        message = self.info.distribution.metadata
        return {key.lower(): [str(value) for value in message.get_all(key, [])] for key in set(message)}

    @property
    def is_sftx(self) -> bool:
        return canonicalize_name(self.info.package) == "sftx"

    @cached_property
    def root(self) -> Path:
        """The directory of the plugin's top-level package, or the file of its only module."""
        module = self.info.value.partition(":")[0]
        file = Path(str(sys.modules[module].__file__))
        depth = module.count(".") + (file.name == "__init__.py")
        return file.parents[depth - 1] if depth else file

    @property
    def options(self) -> dict[str, Any]:
        """The JSON schema of each option."""
        return cast("dict[str, Any]", TypeAdapter(self.cls).json_schema().get("properties", {}))


def _case(info: PluginInfo) -> _Case:
    cls = load_class(info)
    return _Case(info, cls, hooks_of(info, cls))


SUITE: Suite[_Case] = Suite(
    "package",
    lambda kit: _case(cast(PluginInfo, kit.plugin)),
    made="The entry point names a dataclass of options (eq=False) with at least one marked hook, and can be imported.",
)


@SUITE.clause("The distribution declares the range of sftx that it is made for, with an upper end.")
def declares_its_host(case: _Case) -> None:
    if case.is_sftx:
        return
    ranges = [r.specifier for r in _requirements(case.info) if canonicalize_name(r.name) == "sftx"]
    if not any(clause.operator in ("<", "<=", "==", "===", "~=") for specifier in ranges for clause in specifier):
        major, minor = sftx.__version__.split(".")[:2]
        wanted = f"sftx>={major}.{minor},<{major}.{int(minor) + 1}"
        raise ClauseError(
            f"its dependencies have {'no upper end for sftx' if ranges else 'no sftx'}; add {wanted!r}, so that "
            "another sftx refuses it by name instead of failing within it"
        )


def _requirements(info: PluginInfo) -> Iterator[Requirement]:
    """What is installed with it: not what an extra asks for."""
    for text in info.distribution.requires or ():
        with contextlib.suppress(InvalidRequirement):
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                yield requirement


@SUITE.clause("The distribution says under which license it comes.")
def has_a_license(case: _Case) -> None:
    known = case.metadata
    classified = any(value.startswith("License ::") for value in known.get("classifier", []))
    if not (known.get("license-expression") or known.get("license") or classified):
        raise ClauseError('no license in its metadata; set license = "Apache-2.0", or another SPDX expression')


@SUITE.clause("The distribution has a summary and a description, and the class a docstring.")
def is_described(case: _Case) -> None:
    known = case.metadata
    body = known.get("description", [""])[0] or case.info.distribution.metadata.get_payload()  # type: ignore[attr-defined]
    lacking = [
        what
        for what, there in (
            ("a summary (description = ...)", known.get("summary")),
            ('a description (readme = "README.md")', str(body or "").strip()),
            (f"a docstring of {case.cls.__name__}", (case.cls.__doc__ or "").strip() and not _generated(case.cls)),
        )
        if not there
    ]
    if lacking:
        raise ClauseError(f"it lacks {' and '.join(lacking)}; `sftx plugins info` and package indexes show them")


def _generated(cls: type) -> bool:
    """Whether the docstring is the one that @dataclass writes: the class's own signature."""
    return str(cls.__doc__).startswith(f"{cls.__name__}(")


@SUITE.clause("The package is typed: it carries a py.typed file, so that mypy reads its annotations.")
def is_typed(case: _Case) -> None:
    if case.root.is_file():
        raise ClauseError(f"{case.root.name} is a module alone, which cannot carry py.typed; make it a package")
    if not (case.root / "py.typed").is_file():
        raise ClauseError(f"no py.typed in {case.root.name}; add an empty one, and name it as package data")


@SUITE.clause("It imports the public names of sftx alone: of `sftx` and `sftx.testing`, what their `__all__` lists.")
def imports_public_names(case: _Case) -> None:
    files = sorted(case.root.rglob("*.py")) if case.root.is_dir() else [case.root]
    for file in files:
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a text template that is called .py
        for line, module, names in _imports(tree):
            if module.partition(".")[0] == "sftx_plugins" and not case.is_sftx:
                raise ClauseError(
                    f"{file.name}:{line} imports {module}, whose modules are not public; write your own, or ask for a "
                    "public name"
                )
            if module == "sftx" or module.startswith("sftx."):
                public = [*sys.modules[module].__all__, "testing", "*"] if module in ("sftx", "sftx.testing") else []
                private = [name for name in names if name not in public]
                if private or (not names and not public):
                    raise ClauseError(
                        f"{file.name}:{line} imports {', '.join(private) or module} of {module}, which may change "
                        "without notice; use a public name, or ask for one"
                    )


def _imports(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or "", [alias.name for alias in node.names]


@SUITE.clause("Importing it imports neither torch nor transformers: options are checked before these.")
def imports_lightly(case: _Case) -> None:
    module = case.info.value.partition(":")[0]
    code = f"import sys; sys.path[:] = {sys.path!r}; import {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"it exits with {done.returncode}"])[-1]
        raise ClauseError(f"importing {module} in a process of its own fails: {why}")
    heavy = [name for name in _HEAVY if name in done.stdout.split()]
    if heavy:
        raise ClauseError(
            f"importing {module} imports {', '.join(heavy)}, which takes seconds; import them inside the functions "
            "that need them, or in a module that the hook imports"
        )


@SUITE.clause("The dataclass is frozen: options do not change while a run goes on.")
def is_frozen(case: _Case) -> None:
    parameters = cast(Any, case.cls).__dataclass_params__
    if not parameters.frozen:
        raise ClauseError(f"{case.cls.__name__} can be changed; declare it as @dataclass(frozen=True, eq=False)")


@SUITE.clause("Every option has a type that JSON knows and a description.")
def describes_its_options(case: _Case) -> None:
    try:
        options = case.options
    except Exception as error:
        raise ClauseError(f"its options have no JSON schema: {error}; use plain types") from error
    lacking = [name for name in options if not options[name].get("description", "").strip()]
    unknown = [f.name for f in dataclasses.fields(case.cls) if f.init and f.name not in options]
    if lacking or unknown:
        raise ClauseError(
            f"without a description: {', '.join(lacking + unknown)}; write "
            'name: Annotated[int, Field(description="...")] = ..., which reaches `sftx plugins info` and the schema'
        )


@SUITE.clause("What its dataclass takes as defaults, the options take too: a run file can say them.")
def takes_its_defaults(case: _Case) -> None:
    if any(_required(field) for field in dataclasses.fields(case.cls)):
        return  # they are given with --set
    try:
        instance(case.info, case.cls, {}, Origins())
    except (ConfigError, PluginError) as error:
        raise ClauseError(f"its own defaults are refused: {error}") from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
