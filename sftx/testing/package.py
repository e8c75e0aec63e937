"""The contract of a plugin's package: complete metadata, and a class that can be imported without torch."""

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
from sftx.assembly.discovery import hooks_of, instance, load_class, required_options
from sftx.assembly.entry_points import PluginInfo
from sftx.config.run_file import Origins
from sftx.errors import ConfigError, PluginError
from sftx.testing.clauses import ClauseError, Suite

_HEAVY: Final = ("torch", "transformers", "datasets", "triton")


@dataclass
class _Case:
    info: PluginInfo
    cls: type

    @property
    def metadata(self) -> dict[str, list[str]]:
        message = self.info.distribution.metadata
        return {key.lower(): [str(value) for value in message.get_all(key, [])] for key in set(message)}

    @property
    def is_sftx(self) -> bool:
        return canonicalize_name(self.info.package) == "sftx"

    @property
    def module(self) -> str:
        return self.info.value.partition(":")[0]

    @cached_property
    def root(self) -> Path:
        """The directory of the plugin's top-level package, or the file of a module that is in no package."""
        file = Path(str(sys.modules[self.module].__file__))
        depth = self.module.count(".") + (file.name == "__init__.py")
        return file.parents[depth - 1] if depth else file


def _case(info: PluginInfo) -> _Case:
    cls = load_class(info)
    hooks_of(info, cls)
    return _Case(info, cls)


SUITE: Suite[_Case] = Suite(
    "package",
    lambda kit: _case(cast(PluginInfo, kit.plugin)),
    made="The entry point names an importable dataclass of options (eq=False) with at least one marked hook.",
)


@SUITE.clause("The distribution declares the range of sftx versions that it supports, with an upper bound.")
def declares_its_host(case: _Case) -> None:
    if case.is_sftx:
        return
    specifiers = []
    for text in case.info.distribution.requires or ():
        with contextlib.suppress(InvalidRequirement):
            requirement = Requirement(text)
            in_an_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
            if canonicalize_name(requirement.name) == "sftx" and not in_an_extra:
                specifiers.append(requirement.specifier)
    if not any(part.operator in ("<", "<=", "==", "===", "~=") for specifier in specifiers for part in specifier):
        major, minor = sftx.__version__.split(".")[:2]
        problem = "no upper bound for sftx" if specifiers else "no sftx"
        raise ClauseError(
            f"its dependencies have {problem}; add 'sftx>={major}.{minor},<{major}.{int(minor) + 1}', so that another "
            "version of sftx refuses the plugin with a clear message"
        )


@SUITE.clause("The distribution declares its license.")
def has_a_license(case: _Case) -> None:
    metadata = case.metadata
    classified = any(value.startswith("License ::") for value in metadata.get("classifier", []))
    if not (metadata.get("license-expression") or metadata.get("license") or classified):
        raise ClauseError('no license in its metadata; set license = "Apache-2.0", or another SPDX expression')


@SUITE.clause("The distribution has a summary and a description, and the class has a docstring.")
def is_described(case: _Case) -> None:
    metadata, name, docstring = case.metadata, case.cls.__name__, (case.cls.__doc__ or "").strip()
    description = metadata.get("description", [""])[0] or case.info.distribution.metadata.get_payload()  # type: ignore[attr-defined]
    described = {
        "a summary (description = ...)": metadata.get("summary"),
        'a description (readme = "README.md")': str(description or "").strip(),
        f"a docstring of {name}": docstring and not docstring.startswith(f"{name}("),  # which @dataclass writes
    }
    if missing := [what for what, text in described.items() if not text]:
        raise ClauseError(f"it lacks {' and '.join(missing)}; `sftx plugins info` and package indexes show them")


@SUITE.clause("The package is typed: it has a py.typed file, so that mypy reads its annotations.")
def is_typed(case: _Case) -> None:
    if case.root.is_file():
        raise ClauseError(f"{case.root.name} is a module alone, which cannot have py.typed; make it a package")
    if not (case.root / "py.typed").is_file():
        raise ClauseError(f"no py.typed in {case.root.name}; add an empty one, and list it as package data")


@SUITE.clause("It imports only public names of sftx: those in `__all__` of `sftx` and `sftx.testing`.")
def imports_public_names(case: _Case) -> None:
    for file in sorted(case.root.rglob("*.py")) if case.root.is_dir() else [case.root]:
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # not Python, such as a text template with the suffix .py
        for line, module, names in _imports(tree):
            if module.partition(".")[0] == "sftx_plugins" and not case.is_sftx:
                raise ClauseError(
                    f"{file.name}:{line} imports {module}, whose modules are not public; write your own code, or ask "
                    "for a public name"
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


@SUITE.clause("Importing it imports neither torch nor transformers, because options are checked before these.")
def imports_lightly(case: _Case) -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}; import {case.module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ClauseError(f"importing {case.module} in a new process fails: {reason}")
    if heavy := [name for name in _HEAVY if name in done.stdout.split()]:
        raise ClauseError(
            f"importing {case.module} imports {', '.join(heavy)}, which takes seconds; import them inside the "
            "functions that need them, or in a module that the hook imports"
        )


@SUITE.clause("The dataclass is frozen, so that options do not change during a run.")
def is_frozen(case: _Case) -> None:
    if not cast(Any, case.cls).__dataclass_params__.frozen:
        raise ClauseError(f"{case.cls.__name__} can be changed; declare it as @dataclass(frozen=True, eq=False)")


@SUITE.clause("Every option has a type that JSON can hold, and a description.")
def describes_its_options(case: _Case) -> None:
    try:
        schema: dict[str, Any] = TypeAdapter(case.cls).json_schema().get("properties", {})
    except Exception as error:
        raise ClauseError(f"its options have no JSON schema: {error}; use plain types") from error
    names = [*schema, *(f.name for f in dataclasses.fields(case.cls) if f.init and f.name not in schema)]
    if undescribed := [name for name in names if not schema.get(name, {}).get("description", "").strip()]:
        raise ClauseError(
            f"without a description: {', '.join(undescribed)}; write "
            'name: Annotated[int, Field(description="...")] = ..., which `sftx plugins info` and the schema show'
        )


@SUITE.clause("The defaults of its options are valid values of them, so that a run file can hold them.")
def takes_its_defaults(case: _Case) -> None:
    if required_options(case.cls):
        return  # the user sets them
    try:
        instance(case.info, case.cls, {}, Origins())
    except (ConfigError, PluginError) as error:
        raise ClauseError(f"its own defaults are refused: {error}") from error
