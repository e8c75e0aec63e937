"""A GGUF file is a model like any other: it is converted once, by transformers' reader."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

import gguf_files
from sftx import ModelError, OutputError
from sftx.model import gguf, names
from sftx.model.load import load_model, load_spec, load_tokenizer


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file in a directory of its own; the cache is empty."""
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "models" / "own.gguf"
    path.parent.mkdir()
    gguf_files.write(path)
    return path


def test_a_gguf_file_and_its_directory_are_the_model_that_transformers_reads(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (str(file), str(file.parent)):
        names.check(name, needs_weights=True)
        assert names.describe(name) == f"{file}, converted to fp32"
    directory = names.resolve(str(file))
    assert names.describe(directory) == names.describe(str(file))
    assert directory == names.resolve(str(file.parent))
    assert Path(directory).parent == file.parent.parent / "cache" / "gguf"
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
    )
    ours = load_model(load_spec(directory), [], dtype=torch.float32, device=torch.device("cpu"))
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    text = "Say hello. <|im_end|>"
    own = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert load_tokenizer(directory)(text)["input_ids"] == own(text)["input_ids"]

    def convert(*args: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf, "_convert", convert)
    assert names.resolve(str(file)) == directory
    os.utime(file, ns=(0, 0))
    with pytest.raises(AssertionError, match="converted again"):
        names.resolve(str(file))


def test_files_that_no_model_can_be_read_from_are_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = file.with_name("other.gguf")
    gguf_files.write(other, architecture="nonesuch")
    with pytest.raises(ModelError, match=r"models: holds 2 GGUF files; name one of them: other\.gguf, own\.gguf"):
        names.check(str(file.parent))
    with pytest.raises(ModelError, match=r"other\.gguf: transformers cannot read this GGUF file: .*nonesuch"):
        names.resolve(str(other))
    broken = file.with_name("broken.gguf")
    broken.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelError, match=r"broken\.gguf: transformers cannot read this GGUF file: "):
        names.resolve(str(broken))
    part = file.rename(file.with_name("own-00001-of-00003.gguf"))
    with pytest.raises(ModelError, match=r"is one of 3 parts; join them with llama-gguf-split --merge"):
        names.check(str(part))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="the package gguf is needed to read a GGUF file; pip install gguf"):
        names.check(str(other))
    assert not list((file.parent.parent / "cache").rglob("*.safetensors")), "nothing is half converted"


def test_a_directory_with_a_config_is_read_without_its_gguf(file: Path) -> None:
    (file.parent / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert gguf.find(file.parent) is None


def test_a_cache_that_cannot_be_written_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(file.parent.parent / "cache", ignore_errors=True)
    (file.parent.parent / "cache").write_text("a file")
    with pytest.raises(OutputError, match="; set SFTX_CACHE to a directory that can be written to"):
        names.resolve(str(file))
