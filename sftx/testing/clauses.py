"""A contract is a suite of clauses; checking a plugin gives one finding for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, Literal, TypeVar

from sftx.errors import one_line
from sftx.testing.kit import Kit
from sftx.testing.process import random_states_kept

C = TypeVar("C")
MADE: Final = "made"


class ClauseError(AssertionError):
    """Raised by a clause that does not hold: what was seen, and what mends it."""


class ContractError(AssertionError):
    """A plugin does not keep the contract of its hook. `findings` are those of every clause, kept ones too."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        failed = [finding for finding in findings if finding.status == "failed"]
        super().__init__("\n".join(f"{f.hook} / {f.clause}: {f.rule}\n    {f.message}" for f in failed))


@dataclass(frozen=True)
class Finding:
    """What came of one clause."""

    hook: str
    """`template`, `loss`, ...; `package` for what concerns the distribution."""
    clause: str
    rule: str
    """The clause, in a sentence."""
    status: Literal["ok", "failed", "skipped"]
    message: str = ""
    """Why it failed, and what mends it; or why it was skipped."""


@dataclass(frozen=True)
class Clause(Generic[C]):
    """One promise of a contract. `function` raises ClauseError when a case does not keep it."""

    name: str
    rule: str
    needs: tuple[str, ...]
    """Clauses without which this one says nothing: it is skipped when one of them failed."""
    function: Callable[[C], None]


class Suite(Generic[C]):
    """The contract of one hook: what `case` makes of a plugin is held against each clause, in order."""

    def __init__(self, hook: str, case: Callable[[Kit], C], *, made: str | None = None) -> None:
        self.hook = hook
        self.made = made or f"The hook sftx_{hook} returns what a run needs when it is called as a run calls it."
        self.clauses: list[Clause[C]] = []
        self._case = case

    def clause(self, rule: str, *, needs: Sequence[str] = ()) -> Callable[[Callable[[C], None]], Callable[[C], None]]:
        """Adds the function below as a clause of its name. `needs`: clauses that stand above it."""
        assert {clause.name for clause in self.clauses} >= set(needs)

        def add(function: Callable[[C], None]) -> Callable[[C], None]:
            self.clauses.append(Clause(function.__name__.replace("_", "-"), rule, tuple(needs), function))
            return function

        return add

    def findings(self, plugin: object, *, model: Path | None = None) -> list[Finding]:
        """One finding for each clause. `model`: a directory to check against instead of the tiny model.

        Whoever checks keeps their random numbers.
        """
        with random_states_kept():
            return self._findings(plugin, model)

    def _findings(self, plugin: object, model: Path | None) -> list[Finding]:
        try:
            case = self._case(Kit(plugin, model))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit too
            made = Finding(self.hook, MADE, self.made, "failed", f"{type(error).__name__}: {one_line(error)}")
            return [made, *(self._skipped(clause, MADE) for clause in self.clauses)]
        findings = [Finding(self.hook, MADE, self.made, "ok")]
        for clause in self.clauses:
            lacking = next((f.clause for f in findings if f.clause in clause.needs and f.status != "ok"), None)
            findings.append(self._finding(clause, case) if lacking is None else self._skipped(clause, lacking))
        return findings

    def check(self, plugin: object, *, model: Path | None = None) -> None:
        """Raises ContractError when a clause does not hold."""
        findings = self.findings(plugin, model=model)
        if any(finding.status == "failed" for finding in findings):
            raise ContractError(findings)

    def _finding(self, clause: Clause[C], case: C) -> Finding:
        try:
            clause.function(case)
        except ClauseError as broken:
            return Finding(self.hook, clause.name, clause.rule, "failed", str(broken))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            message = f"raised {type(error).__name__}: {one_line(error)}; it must not"
            return Finding(self.hook, clause.name, clause.rule, "failed", message)
        return Finding(self.hook, clause.name, clause.rule, "ok")

    def _skipped(self, clause: Clause[C], lacking: str) -> Finding:
        return Finding(self.hook, clause.name, clause.rule, "skipped", f"says nothing while {lacking!r} fails")
