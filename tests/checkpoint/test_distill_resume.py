"""A run that learns from a teacher and is interrupted and resumed ends like one that was not: bit for bit."""

from __future__ import annotations

import pytest

from distilling import teacher_of
from killing import Case, Runs
from resuming import SHORT, Sftx, interrupted, only_shared


@pytest.fixture(scope="module")
def distill(runs: Runs) -> Case:
    teacher = teacher_of(runs.model, runs.root / "teacher")
    return Case("distill", (*SHORT.arguments, "--plugin", "distill", "--set", f"distill.teacher={teacher}"))


def test_a_run_with_a_teacher_goes_on_where_it_was(runs: Runs, sftx: Sftx, distill: Case) -> None:
    """The teacher is loaded again, in the middle of a run, and dropout draws what it would have drawn."""
    directory, whole = interrupted(runs, sftx, distill, step=4)
    result = sftx(distill, directory, "--resume")
    assert result.exit_code == 0, result.output
    assert not only_shared(whole, directory / "out")
