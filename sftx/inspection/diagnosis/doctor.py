"""A run's options become findings: what is wrong, or likely to be, and what to do about it. No weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.style import Style
from rich.text import Text

from sftx.inspection.dataset_view import Look
from sftx.inspection.diagnosis import data_checks, model_checks
from sftx.inspection.diagnosis.facts import Check, Finding, facts_of
from sftx.inspection.token_report.terminal import hang

CHECKS: Final[tuple[Check, ...]] = (*data_checks.CHECKS, *model_checks.CHECKS)


@dataclass(frozen=True)
class Diagnosis:
    """All that `sftx doctor` says; `dataclasses.asdict` of it is what `--json` writes."""

    model: str
    findings: tuple[Finding, ...]
    """Errors first."""
    checks: tuple[str, ...]
    """All that were made."""
    num_rows: int

    @property
    def failed(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


def diagnose(look: Look) -> Diagnosis:
    """Makes every check. Raises SftxError for what no look is possible at."""
    facts = facts_of(look)
    found = [finding for check in CHECKS for finding in check(facts)]
    order = ("error", "warning", "note")
    found.sort(key=lambda finding: order.index(finding.severity))
    names = tuple(check.__name__.replace("_", "-") for check in CHECKS)
    return Diagnosis(look.config.model, tuple(found), names, facts.data.ledger.num_rows)


_COLOURS: Final = {"error": "red", "warning": "yellow", "note": "cyan"}


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Prints one block a finding."""
    for finding in diagnosis.findings:
        hang(console, Text(finding.severity, Style(color=_COLOURS[finding.severity], bold=True)), finding.seen)
        hang(console, Text("  fix", Style(dim=True)), finding.fix)
        console.print()
    counts = {kind: sum(f.severity == kind for f in diagnosis.findings) for kind in _COLOURS}
    words = ", ".join(f"{number} {kind}{'s' * (number != 1)}" for kind, number in counts.items())
    console.print(f"{len(diagnosis.checks)} checks on {diagnosis.num_rows:,} rows: {words}")
