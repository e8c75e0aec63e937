"""`Verification` is the report of `sftx verify`: a finding for every check, whether it could be made or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

Status: TypeAlias = Literal["passed", "failed", "not checked"]

CHECKS: Final[Mapping[str, str]] = {
    "start": "the run starts: its options, rows, template, model and start checks are accepted",
    "masks": "what is trained is exactly the answers, or what the options say, and no label is outside of its row",
    "stop": "the token that ends an answer is trained",
    "rows": "every row is trained on or is in the ledger, truncated ones too",
    "held-out": "no held-out row is among the training rows",
    "accumulation": "rows in one micro-batch and in several give the same loss and gradient",
    "packing": "rows that are computed together give what each gives alone",
    "processes": "two processes give the same loss and gradient as one",
    "resume": "a run that is killed and resumed ends bit for bit like one that was not",
    "prompt": "chat, generate and the saved chat template prompt with the tokens that were trained",
    "memory": "a step needs the memory that sftx plan says",
}
"""What each check shows, in the order of the report."""


class NotCheckedError(Exception):
    """Raised by a check that does not apply to a run, or that this machine cannot make, with the reason."""


class FailedError(Exception):
    """Raised by a check whose promise is not kept, with what was seen."""

    def __init__(self, seen: str, **figures: Any) -> None:
        super().__init__(seen)
        self.figures = figures


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """A key of CHECKS."""
    status: Status
    seen: str
    """What was seen, with its figures; the reason, where nothing was checked."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The same as numbers, by name."""


@dataclass(frozen=True)
class Verification:
    """The result of all checks; `dataclasses.asdict` of it, with `passed`, is the output of `sftx verify --json`."""

    run: Mapping[str, Any]
    """Model, plugins, device, dtype and sizes of the run, as far as they are known."""
    versions: Mapping[str, str]
    changes: tuple[str, ...]
    """What the short runs do otherwise than the run itself."""
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    """What the run warns of before its first step."""
    speed: Mapping[str, float]
    """Seconds and tokens per second of a step, as information; empty where no run was made."""
    seconds: float

    @property
    def passed(self) -> bool:
        """Return whether no check failed."""
        return all(finding.status != "failed" for finding in self.findings)
