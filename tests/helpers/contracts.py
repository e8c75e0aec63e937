"""Assertions on contract suites: a plugin that breaks one clause fails exactly that clause."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sftx.testing.clauses import MADE, Suite


def assert_fails_only(suite: Suite[Any], plugin: object, clause: str, message: str | re.Pattern[str]) -> None:
    """Assert that `clause` fails with `message`, and that exactly the clauses that depend on it are skipped."""
    findings = suite.findings(plugin)
    failed = {finding.clause: finding.message for finding in findings if finding.status == "failed"}
    assert list(failed) == [clause], failed
    text = failed[clause]
    assert message.search(text) if isinstance(message, re.Pattern) else message in text, text
    assert {finding.clause for finding in findings if finding.status == "skipped"} == _dependents(suite, clause)


def assert_every_clause_is_broken(suite: Suite[Any], clauses: Iterable[str]) -> None:
    """Assert that a table of bad plugins, which break `clauses`, breaks every clause of the suite."""
    assert set(clauses) == {MADE, *(clause.name for clause in suite.clauses)}


def _dependents(suite: Suite[Any], broken: str) -> set[str]:
    """Return the clauses that need `broken`, directly or through others; a clause comes after those that it needs."""
    dependents = {broken}
    for clause in suite.clauses:
        if broken == MADE or dependents & set(clause.needs):
            dependents.add(clause.name)
    return dependents - {broken}
