"""Runs to be interrupted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from killing import Case, Runs
from resuming import Sftx


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    from sftx.model.tiny import model_dir

    return Runs(tmp_path_factory.mktemp("runs"), model_dir())


@pytest.fixture
def sftx(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sftx]:
    """The command in this process: `sftx(case, directory, more arguments)`."""
    from sftx.cli import main

    # As a terminal has them, whatever started the tests ignores.
    handlers = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}

    def run(wanted: Case, directory: Path, *more: str) -> Result:
        monkeypatch.chdir(directory)
        return CliRunner().invoke(main, wanted.command(runs.root, runs.model, *more), catch_exceptions=False)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
