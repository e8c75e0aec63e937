"""Fixtures for the tests of a plugin package: pytest finds them by the entry point `pytest11` of sftx.

Nothing here imports torch before a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftx import Record
    from sftx.testing import Result

PluginRun: TypeAlias = "Callable[..., Result]"
"""`plugin_run(*names, rows=(), **options)`: see the fixture."""


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A directory with a Llama of two layers (random weights, fp32, tied) and its tokenizer of 512 tokens."""
    from sftx.model import tiny

    return tiny.model_dir()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer, made anew for each test: byte-level BPE with ChatML's control tokens."""
    from sftx.model import tiny

    return tiny.make_tokenizer()


@pytest.fixture
def plugin_run(tmp_path: Path) -> PluginRun:
    """`plugin_run("mine", mine__size=3)` trains the tiny model for two steps with that installed plugin.

    Options are dotted names with `__` for the dot; `rows` are the records to train on. Returns the run's Result
    (`output_dir`, `summary`); raises SftxError as `sftx run` does. Each call has its own plugin manager and directory.
    """
    calls = 0

    def run(*names: str, rows: Sequence[Record] = (), **options: Any) -> Result:
        from sftx.testing.runs import run_tiny

        nonlocal calls
        calls += 1
        settings = {name.replace("__", "."): value for name, value in options.items()}
        return run_tiny(names, tmp_path / f"plugin-run-{calls}", rows=rows, settings=settings)

    return run
