"""Fixtures for runs in several processes."""

from __future__ import annotations

import pytest

from ranked import Starter, write_rows


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Starter:
    starter = Starter(tmp_path_factory.mktemp("ranks"))
    write_rows(starter.root)
    return starter


@pytest.fixture(scope="session")
def common(starter: Starter) -> str:
    """Return the arguments of `sftx run` that all cases share: ten steps of 8 rows, the last of each epoch with 3."""
    from sftx.model.tiny import model_dir

    return (
        f"--model {model_dir()} --data {starter.root}/train.jsonl --eval-data {starter.root}/held.jsonl "
        "--plugin chatml --train-batch-size 8 --per-device-train-batch-size 2 --max-steps 10 "
        "--eval-steps 5 --per-device-eval-batch-size 2 --max-new-tokens 6 --learning-rate 1e-2 --weight-decay 0.1 "
    )
