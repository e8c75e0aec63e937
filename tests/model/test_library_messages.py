"""What transformers says while it loads reaches the user once, in one line, and in `sftx doctor` too."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from sftx.model import library_messages
from sftx.model.library_messages import passed_on
from sftx.model.load import load_model, load_spec, load_tokenizer
from sftx.model.tiny import model_dir


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> Iterator[None]:
    said = set(library_messages._passed_on)
    library_messages._passed_on.clear()
    yield
    library_messages._passed_on.update(said)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    shutil.copytree(model_dir(), directory)
    return directory


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert {record.name for record in found} <= {"sftx.model.library_messages", "sftx.model.load"}
    lines = [record.getMessage() for record in found]
    assert not any("\n" in line for line in lines)
    return lines


def test_rope_scaling_that_does_not_fit_is_said_once(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(base / "config.json", rope_parameters={"rope_type": "linear", "factor": 0.5, "rope_theta": 10000.0})
    for _ in range(2):
        load_tokenizer(str(base))
        load_model(load_spec(str(base)), [], dtype=torch.float32, device=torch.device("cpu"))
    assert lines_of(caplog) == [f"model {base}: `rope_parameters`'s factor field must be a float or int >= 1, got 0.5"]


def test_the_wrong_pattern_of_a_mistral_tokenizer_is_said(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(base / "config.json", model_type="mistral", transformers_version="4.50.0")
    bpe = json.loads((base / "tokenizer.json").read_text())["model"]
    vocab = bpe["vocab"] | {f"more {number}": number for number in range(len(bpe["vocab"]), 100_001)}
    change(base / "tokenizer.json", model=bpe | {"vocab": vocab})  # the pattern is looked for in large ones alone
    load_tokenizer(str(base))
    (line,) = lines_of(caplog)
    assert line.startswith(f"model {base}: ")
    assert "incorrect regex pattern" in line


def test_a_model_that_is_in_order_says_nothing(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_tokenizer(str(base))
    load_model(load_spec(str(base)), [], dtype=torch.float32, device=torch.device("cpu"))
    assert lines_of(caplog) == []


def test_what_is_said_by_each_way_is_passed_on_and_noise_is_not(caplog: pytest.LogCaptureFixture) -> None:
    transformers = transformers_logging.get_logger("transformers.x")
    handlers = logging.getLogger("transformers").handlers
    with passed_on("model m"):
        transformers.warning("first\n  line")
        logging.getLogger("huggingface_hub.y").warning("second")
        warnings.warn("third", stacklevel=1)
        warnings.warn("third", stacklevel=1)
        warnings.warn("for authors", FutureWarning, stacklevel=1)
        transformers.info("not worth a line")
        transformers.warning("`torch_dtype` is deprecated! Use `dtype` instead!")
        transformers.warning("LlamaForCausalLM LOAD REPORT from: m\nKey | Status")
    assert lines_of(caplog) == ["model m: first line", "model m: second", "model m: third"]
    assert logging.getLogger("transformers").handlers is handlers


def test_an_error_comes_after_what_was_said(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> None:
        with passed_on("model m"):
            transformers_logging.get_logger("transformers.x").warning("the cause")
            raise ValueError("the error")

    with pytest.raises(ValueError, match="the error"):
        load()
    assert lines_of(caplog) == ["model m: the cause"]


def test_doctor_passes_it_on(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftx.config.loading import load
    from sftx.inspection.dataset_view import view_dataset
    from sftx.inspection.diagnosis.check_inputs import load_check_inputs

    change(base / "config.json", rope_parameters={"rope_type": "linear", "factor": 0.25, "rope_theta": 10000.0})
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "hello"}) + "\n")
    values = {"model": str(base), "data.train": str(rows)}
    loaded = load(None, add=[], assignments=[(name, value, name) for name, value in values.items()])
    load_check_inputs(view_dataset(loaded))
    assert [line for line in lines_of(caplog) if "rope_parameters" in line] == [
        f"model {base}: `rope_parameters`'s factor field must be a float or int >= 1, got 0.25"
    ]
