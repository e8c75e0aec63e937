"""Tests of the package contract: a good package, and bad ones that break one clause each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sftx.assembly.entry_points import discover, find
from sftx.testing.package import SUITE

GOOD = '''"""A metric."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import Metric, hookimpl


@dataclass(frozen=True, eq=False)
class Plugin:
    """Scores an answer."""

    strict: Annotated[bool, Field(description="Whether case counts.")] = True

    @hookimpl
    def sftx_metric(self) -> Metric:
        return self

    def __call__(self, prediction: str, reference: str) -> float:
        return float(prediction == reference)
'''
METADATA = [
    "Summary: A metric.",
    "License-Expression: MIT",
    "Description-Content-Type: text/markdown",
    "",
    "# A metric",
]
REQUIRES = ["sftx>=0.2,<0.3"]


def states(
    install_plugin: Any,
    code: str = GOOD,
    metadata: Sequence[str] = METADATA,
    requires: Sequence[str] = REQUIRES,
    files: Sequence[str] = ("py.typed",),
) -> tuple[dict[str, str], str]:
    """Return the status of each clause, and all messages."""
    install_plugin("acme", code, {"acme": "Plugin"}, metadata=metadata, requires=requires, files=files)
    findings = SUITE.findings(find("acme", discover()))
    return {f.clause: f.status for f in findings}, "\n".join(f.message for f in findings)


def test_a_good_package_keeps_every_clause(install_plugin: Any) -> None:
    found, messages = states(install_plugin)
    assert set(found.values()) == {"ok"}, messages


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("made", {"code": GOOD.replace("@hookimpl", "")}, "is not marked as a hook; put @sftx.hookimpl"),
    ("made", {"requires": ["sftx>=7"]}, "requires sftx >=7"),
    ("declares-its-host", {"requires": ["sftx>=0.1"]}, "no upper bound for sftx; add 'sftx>=0.2,<0.3'"),
    ("declares-its-host", {"requires": []}, "its dependencies have no sftx"),
    ("has-a-license", {"metadata": [m for m in METADATA if "License" not in m]}, "set license = "),
    ("is-described", {"metadata": METADATA[1:]}, "lacks a summary"),
    ("is-described", {"metadata": METADATA[:3]}, "lacks a description (readme"),
    ("is-described", {"code": GOOD.replace('"""Scores an answer."""', "")}, "lacks a docstring of Plugin"),
    ("is-typed", {"files": ()}, "is a module alone"),
    ("is-typed", {"files": ["data.txt"]}, "no py.typed in acme; add an empty one"),
    ("imports-public-names", {"code": GOOD + "\n\nfrom sftx.types import Row\n"}, "imports Row of sftx.types"),
    ("imports-public-names", {"code": GOOD + "\n\nfrom sftx import config\n"}, "imports config of sftx"),
    (
        "imports-public-names",
        {"code": GOOD + "\n\nfrom sftx_plugins.collators import padded\n"},
        "imports sftx_plugins.collators, whose modules are not public",
    ),
    (
        "imports-public-names",
        {"code": GOOD + "\n\nimport sftx.config.options\n"},
        "imports sftx.config.options of sftx.config",
    ),
    ("imports-lightly", {"code": GOOD.replace("from sftx", "import torch\nfrom sftx", 1)}, "imports torch"),
    ("is-frozen", {"code": GOOD.replace("frozen=True, ", "")}, "declare it as @dataclass(frozen=True, eq=False)"),
    (
        "describes-its-options",
        {"code": GOOD.replace('Annotated[bool, Field(description="Whether case counts.")]', "bool")},
        "without a description: strict",
    ),
    ("takes-its-defaults", {"code": GOOD.replace("] = True", "] = 3  # type: ignore")}, "its own defaults are refused"),
]


@pytest.mark.parametrize(("clause", "change", "message"), BAD, ids=[f"{b[0]}-{n}" for n, b in enumerate(BAD)])
def test_a_package_that_breaks_one_clause_fails_that_one(
    install_plugin: Any, clause: str, change: dict[str, Any], message: str
) -> None:
    found, messages = states(install_plugin, **change)
    assert {name for name, status in found.items() if status == "failed"} == {clause}, messages
    assert message in messages
    if clause != "made":
        assert "skipped" not in found.values()


def test_every_clause_has_a_package_that_breaks_it() -> None:
    assert {clause for clause, _, _ in BAD} == {"made", *(clause.name for clause in SUITE.clauses)}
