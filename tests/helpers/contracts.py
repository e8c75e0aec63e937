"""Assertions that a contract is effective: a plugin that breaks one clause fails that clause and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sftx.testing.clauses import MADE, Suite

HELPERS = Path(__file__).parent
QUESTIONS = HELPERS / "questions.jsonl"
REQUIRED: dict[str, dict[str, Any]] = {
    "multiple-choice": {"path": str(QUESTIONS)},
    "reward-function": {"function": f"{HELPERS / 'reward_functions.py'}:overlap"},
    "reward-length": {"max_completion_len": 20, "soft_punish_cache": 10},
    "reward-regex": {"pattern": "[A-Z].*"},
}
"""Options without a default of built-in plugins, by the plugin."""


def whole_suite_cases(bad: Sequence[tuple[Any, str, Any]]) -> list[Any]:
    """Return parameters (plugin, clause) for `assert_fails_only`; all but the first run in the slow tests only."""
    return [
        pytest.param(plugin, clause, marks=[pytest.mark.slow] if number else [], id=f"{clause}-{number}")
        for number, (plugin, clause, _) in enumerate(bad)
    ]


def assert_passes(suite: Suite[Any], plugin: object) -> None:
    """Assert that the plugin keeps every clause of the suite."""
    assert [(f.clause, f.status, f.message) for f in suite.findings(plugin)] == [
        (clause, "ok", "") for clause in (MADE, *(clause.name for clause in suite.clauses))
    ]


def assert_fails(suite: Suite[Any], plugin: object, clause: str, message: str | re.Pattern[str]) -> None:
    """Assert that `clause` fails with `message`, while the clauses that it needs pass."""
    findings = suite.findings(plugin, only=() if clause == MADE else [clause])
    assert [f.clause for f in findings if f.status != "ok"] == [clause], findings
    text = next(f.message for f in findings if f.clause == clause)
    assert message.search(text) if isinstance(message, re.Pattern) else message in text, text


def assert_fails_only(suite: Suite[Any], plugin: object, clause: str) -> None:
    """Assert that, of the whole suite, only `clause` fails, and that just those clauses that need it are skipped."""
    skipped = {clause}
    for other in suite.clauses:  # a clause comes after those that it needs
        if clause == MADE or skipped & set(other.needs):
            skipped.add(other.name)
    skipped.discard(clause)
    findings = suite.findings(plugin)
    assert {f.clause for f in findings if f.status == "failed"} == {clause}, findings
    assert {f.clause for f in findings if f.status == "skipped"} == skipped


def assert_every_clause_is_broken(suite: Suite[Any], clauses: Iterable[str]) -> None:
    """Assert that `clauses`, those that a table of bad plugins breaks, are all clauses of the suite."""
    assert set(clauses) == {MADE, *(clause.name for clause in suite.clauses)}
