"""Finds tokenizers, chat templates and demo data that `make assets` fetched, and takes functions from their source."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2] / ".assets"


def path(*parts: str) -> Path:
    """Returns the path of a fetched file or directory. Fails if it was not fetched."""
    found = ROOT.joinpath(*parts)
    assert found.exists(), f"{found} is missing: run `make assets`"
    return found


def function(file: Path, name: str, **names: Any) -> Callable[..., Any]:
    """Compiles one function of a module that cannot be imported; `names` are the globals that it uses."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    found.decorator_list = []
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, found], []), str(file), "exec"), names)
    result: Callable[..., Any] = names[name]
    return result
