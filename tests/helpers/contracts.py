"""Shows that a suite bites: a plugin that breaks one clause fails that one, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sftx.testing.clauses import MADE, Finding, Suite


def assert_fails_only(suite: Suite[Any], plugin: object, clause: str, message: str | re.Pattern[str]) -> None:
    """One clause fails and says `message`; exactly those that need it, or need such a one, say nothing."""
    findings = suite.findings(plugin)
    failed = {finding.clause: finding.message for finding in findings if finding.status == "failed"}
    assert list(failed) == [clause], failed
    said = failed[clause]
    assert message.search(said) if isinstance(message, re.Pattern) else message in said, said
    assert _of(findings, "skipped") == _silent(suite, clause)


def assert_every_clause_is_broken(suite: Suite[Any], clauses: Iterable[str]) -> None:
    """`clauses`: those that a table of bad plugins breaks."""
    assert set(clauses) == {MADE, *(clause.name for clause in suite.clauses)}


def _of(findings: Iterable[Finding], status: str) -> set[str]:
    return {finding.clause for finding in findings if finding.status == status}


def _silent(suite: Suite[Any], broken: str) -> set[str]:
    """What says nothing while `broken` fails; clauses stand behind those that they need."""
    silent = {broken}
    for clause in suite.clauses:
        if broken == MADE or silent & set(clause.needs):
            silent.add(clause.name)
    return silent - {broken}
