"""Imports point one way: no module imports a later layer, and no modules import one another in a circle.

Every import statement counts, also within functions and for annotations alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import sftx

ROOT = Path(sftx.__file__).parents[1]
ROOTS = {"sftx": ROOT, "sftx_kernels": ROOT / "kernels", "sftx_plugins": ROOT / "plugins"}
LAYERS = (
    ("background", "collector", "errors", "events", "paths", "phases"),
    ("types", "atomic_files", "hub_lookup", "display", "demo", "secret"),
    ("stores",),
    ("config",),
    ("distributed",),
    ("assembly",),
    ("model",),
    ("data",),
    ("checkpoint",),
    ("trainer",),
    ("inspection",),
    ("migration",),
    ("training",),
    ("api",),
    ("serving",),
    ("testing", "scaffold", "launchers", "verify"),
    ("cli", "pytest_plugin"),
    ("__main__",),
)
"""What lies in `sftx/`, the lowest first: an import goes down, or stays within the package."""


def modules() -> dict[str, Path]:
    found = {}
    for package, root in ROOTS.items():
        for file in sorted((root / package).rglob("*.py")):
            name = ".".join(file.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(module: str) -> Iterator[str]:
    """The modules of ours that a module imports; a package's own `__init__` is only its public face."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if "." in name and name != module:
                yield name


def test_no_modules_import_one_another_in_a_circle() -> None:
    try:
        order = list(TopologicalSorter({module: set(imports(module)) for module in MODULES}).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
    assert len(order) > 200


def test_imports_within_sftx_go_down_the_layers() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    parts = {module: module.split(".")[1] for module in MODULES if module.startswith("sftx.")}
    assert set(parts.values()) == set(level)
    wrong = [
        f"{module} imports {other}"
        for module, part in parts.items()
        for other in imports(module)
        if other.startswith("sftx.") and parts[other] != part and level[parts[other]] >= level[part]
    ]
    assert wrong == []


def test_every_package_says_what_it_is_and_may_import() -> None:
    for file in MODULES.values():
        if file.name == "__init__.py" and len(file.relative_to(ROOT).parts) > 2 and "scaffold" not in file.parts:
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            assert text is not None, file
            assert "import" in text, f"{file}: the docstring does not say what the package may import"


def test_no_two_modules_of_the_core_have_one_name_for_different_things() -> None:
    """A command in `cli` may be called as what it runs."""
    names: dict[str, list[str]] = {}
    for module in MODULES:
        last = module.rpartition(".")[2]
        if module.startswith("sftx.") and not module.startswith(("sftx.cli.", "sftx.testing.")):
            names.setdefault(last, []).append(module)
    same_thing = {"trainer", "checkpoint"}  # the package, and its main module
    assert {name: found for name, found in names.items() if len(found) > 1 and name not in same_thing} == {}
