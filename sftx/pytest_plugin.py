"""Pytest fixtures for the tests of a plugin package, registered by the entry point `pytest11` of sftx.

pytest imports this module in every project of an environment that has sftx, so torch is imported only inside fixtures.
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
"""`plugin_run(*names, rows=(), **options)`"""


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Return the directory of a Llama of two layers (random weights, fp32, tied) and its tokenizer of 512 tokens."""
    from sftx.model import tiny

    return tiny.model_dir()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Return a new tokenizer of the tiny model: byte-level BPE with ChatML's control tokens."""
    from sftx.model import tiny

    return tiny.make_tokenizer()


@pytest.fixture
def plugin_run(tmp_path: Path) -> PluginRun:
    """Return a function: `plugin_run("mine", mine__size=3)` trains the tiny model for two steps with that plugin.

    Options are dotted names with `__` for the dot (`**{"my-own.size": 3}` for a name with a hyphen). A reward gets a
    rollout, and a rollout a reward, where none is named; `rows` are the records to train on. The function returns the
    run's Result (`output_dir`, `summary`) and raises SftxError as `sftx run` does. Each call has a directory of its own
    and its own plugin manager.
    """
    calls = 0

    def run(*names: str, rows: Sequence[Record] = (), **options: Any) -> Result:
        from sftx.testing.runs import run_tiny

        nonlocal calls
        calls += 1
        settings = {name.replace("__", "."): value for name, value in options.items()}
        return run_tiny(names, tmp_path / f"plugin-run-{calls}", rows=rows, settings=settings)

    return run
