"""Run every check of `sftx doctor` on a run's options, and show the findings.

Of the weights only the rows of control tokens, and what they are compared with, are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.style import Style
from rich.text import Text

from sftx.errors import counted
from sftx.inspection.dataset_view import DatasetView
from sftx.inspection.diagnosis import model_checks, row_checks, start_checks
from sftx.inspection.diagnosis.check_inputs import Check, Finding, load_check_inputs
from sftx.inspection.token_report.terminal import print_labelled

CHECKS: Final[tuple[Check, ...]] = (*row_checks.CHECKS, *start_checks.CHECKS, *model_checks.CHECKS)
_COLOURS: Final = {"error": "red", "warning": "yellow", "note": "cyan"}
"""The severities, worst first."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of all checks; `dataclasses.asdict` of it is the output of `sftx doctor --json`."""

    model: str
    findings: tuple[Finding, ...]
    """Errors come first."""
    checks: tuple[str, ...]
    """The names of all checks that were made."""
    num_rows: int

    @property
    def failed(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


def diagnose(view: DatasetView) -> Diagnosis:
    """Make every check. Raises SftxError when the run's data or tokenizer cannot be read at all."""
    inputs = load_check_inputs(view)
    severities = tuple(_COLOURS)
    findings = [finding for check in CHECKS for finding in check(inputs)]
    findings.sort(key=lambda finding: severities.index(finding.severity))
    names = tuple(check.__name__.replace("_", "-") for check in CHECKS)
    return Diagnosis(view.config.model, tuple(findings), names, inputs.train.ledger.num_rows)


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    for finding in diagnosis.findings:
        style = Style(color=_COLOURS[finding.severity], bold=True)
        print_labelled(console, Text(finding.severity, style), finding.seen)
        print_labelled(console, Text("  fix", Style(dim=True)), finding.fix)
        console.print()
    counts = {kind: sum(f.severity == kind for f in diagnosis.findings) for kind in _COLOURS}
    words = ", ".join(counted(number, kind) for kind, number in counts.items())
    console.print(f"{len(diagnosis.checks)} checks on {counted(diagnosis.num_rows, 'row')}: {words}")
