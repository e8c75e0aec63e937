"""A contract is a suite of clauses; checking a plugin returns one finding for each clause."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, Literal, TypeVar

from sftx.errors import one_line
from sftx.testing.kit import Kit
from sftx.testing.process import random_states_kept

C = TypeVar("C")
MADE: Final = "made"
"""The first clause of every suite: the hook returns an object of the right type."""


class ClauseError(AssertionError):
    """Raised by a clause that is broken. The message says what was observed and how to fix it."""


class ExemptError(Exception):
    """Raised by a clause whose rule does not hold for a plugin of this kind, with the reason."""


class ContractError(AssertionError):
    """A plugin breaks the contract of its hook. `findings` holds those of every clause, passed ones included."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        failed = [finding for finding in findings if finding.status == "failed"]
        super().__init__("\n".join(f"{f.hook} / {f.clause}: {f.rule}\n    {f.message}" for f in failed))


@dataclass(frozen=True)
class Finding:
    """The result of one clause."""

    hook: str
    """`template`, `loss`, ...; `package` for the clauses about the distribution."""
    clause: str
    rule: str
    """The clause as a sentence."""
    status: Literal["ok", "failed", "skipped", "exempt"]
    """`skipped`: a clause that this one needs failed; `exempt`: the rule does not hold for what the plugin declares."""
    message: str = ""
    """Why the clause failed and how to fix it, or why it was not checked."""


@dataclass(frozen=True)
class Clause(Generic[C]):
    """One rule of a contract. `function` takes the case and raises ClauseError when the rule is broken."""

    name: str
    rule: str
    needs: tuple[str, ...]
    """Clauses that must pass before this one can be judged; it is skipped otherwise."""
    function: Callable[[C], None]


class Suite(Generic[C]):
    """The contract of one hook. `case` prepares a plugin for the clauses, which are checked in order."""

    def __init__(self, hook: str, case: Callable[[Kit], C], *, made: str | None = None) -> None:
        self.hook = hook
        self.made = made or f"The hook sftx_{hook} returns an object of the right type."
        self.clauses: list[Clause[C]] = []
        self._case = case

    def clause(self, rule: str, *, needs: Sequence[str] = ()) -> Callable[[Callable[[C], None]], Callable[[C], None]]:
        """Add the decorated function as a clause of the same name. `needs` names clauses that were added before."""
        assert {clause.name for clause in self.clauses} >= set(needs)

        def add(function: Callable[[C], None]) -> Callable[[C], None]:
            self.clauses.append(Clause(function.__name__.replace("_", "-"), rule, tuple(needs), function))
            return function

        return add

    def findings(
        self, plugin: object, *, model: Path | None = None, only: Collection[str] | None = None
    ) -> list[Finding]:
        """Check the plugin and return one finding per clause. The global random state is restored afterwards.

        `model` is a model directory to use instead of the tiny model. With `only`, just the named clauses and those
        that they need are checked.
        """
        clauses = self.clauses if only is None else self._with_needs(only)
        findings = []
        with random_states_kept():
            try:
                case = self._case(Kit(plugin, model))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # including SystemExit
                message = f"{type(error).__name__}: {one_line(error)}"
                findings.append(Finding(self.hook, MADE, self.made, "failed", message))
                return findings + [self._skipped(clause, MADE) for clause in clauses]
            findings.append(Finding(self.hook, MADE, self.made, "ok"))
            for clause in clauses:
                not_kept = (f for f in findings if f.clause in clause.needs and f.status in ("failed", "skipped"))
                broken = next((finding.clause for finding in not_kept), None)
                findings.append(self._check(clause, case) if broken is None else self._skipped(clause, broken))
        return findings

    def check(self, plugin: object, *, model: Path | None = None) -> None:
        """Raise ContractError when a clause is broken."""
        findings = self.findings(plugin, model=model)
        if any(finding.status == "failed" for finding in findings):
            raise ContractError(findings)

    def _with_needs(self, names: Collection[str]) -> list[Clause[C]]:
        """Return the clauses of these names and all that they need, directly or not."""
        selected = set(names)
        for clause in reversed(self.clauses):  # a clause comes after those that it needs
            if clause.name in selected:
                selected |= set(clause.needs)
        return [clause for clause in self.clauses if clause.name in selected]

    def _check(self, clause: Clause[C], case: C) -> Finding:
        try:
            clause.function(case)
        except ClauseError as error:
            return Finding(self.hook, clause.name, clause.rule, "failed", str(error))
        except ExemptError as reason:
            return Finding(self.hook, clause.name, clause.rule, "exempt", str(reason))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # including SystemExit
            message = f"raised {type(error).__name__}: {one_line(error)}; it must not"
            return Finding(self.hook, clause.name, clause.rule, "failed", message)
        return Finding(self.hook, clause.name, clause.rule, "ok")

    def _skipped(self, clause: Clause[C], broken: str) -> Finding:
        return Finding(self.hook, clause.name, clause.rule, "skipped", f"not checked, because {broken!r} did not pass")


@contextlib.contextmanager
def must_not_raise(action: str, advice: str) -> Iterator[None]:
    """Turn an exception of the block into a ClauseError: "`action` raised TypeError: ...; `advice`"."""
    try:
        yield
    except ClauseError:
        raise
    except Exception as error:
        raise ClauseError(f"{action} raised {type(error).__name__}: {one_line(error)}; {advice}") from error
