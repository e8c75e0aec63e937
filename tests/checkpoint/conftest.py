"""Runs whose answers are worth comparing: a full model, and an adapter of it that learns other answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import answering


@pytest.fixture(scope="package")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rows")
    answering.write_rows(directory)
    return directory


@pytest.fixture(scope="package")
def full(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that trained the full tiny model."""
    from sftx.model.tiny import model_dir

    return answering.train(rows, tmp_path_factory.mktemp("full") / "run", model=str(model_dir()))


@pytest.fixture(scope="package")
def base(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that `full` made, as a base model comes: its settings stop at another token than its answers do."""
    directory = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(full / "model", directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    (directory / "chat_template.jinja").unlink()
    return directory


@pytest.fixture(scope="package")
def adapted(rows: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that trained an adapter of `base`."""
    options = {
        "plugins__lora__lora_dropout": 0.05,
        "train__save_total_limit": 1,
        "data__train": str(rows / "other.jsonl"),
    }
    out = tmp_path_factory.mktemp("adapted") / "run"
    return answering.train(rows, out, "lora", model=str(base), **options)
