"""Nothing that a base model brings loses a run at its end: it is repaired, left out, or refused before step 1."""

from __future__ import annotations

import json
import logging
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sftx import ModelError, OutputError
from sftx.checkpoint import model_files
from sftx.checkpoint.load_run import load_run
from sftx.config import run_file
from sftx.config.loading import load
from sftx.model import saved_tokenizer
from sftx.model.generation import generation_defaults, load_generation_config
from sftx.model.language_model import CausalLM
from sftx.model.load import fingerprint, load_model, load_spec, load_tokenizer
from sftx.model.tiny import model_dir
from sftx.training import run

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    shutil.copytree(model_dir(), directory)
    return directory


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def train(base: Path, *plugins: str, template: str = "chatml", **options: Any) -> Path:
    """Train the model for a step with a checkpoint; return the run directory."""
    rows = base.parent / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n")
    values: dict[str, Any] = {"model": str(base), "data.train": str(rows), "output_dir": str(base.parent / "out")}
    values |= {"train.max_steps": 1, "train.save_steps": 1, "train.learning_rate": 1e-3, "train.use_cpu": True}
    values |= {name.replace("__", "."): value for name, value in options.items()}
    assignments = [(name, value, f"--set {name}") for name, value in values.items()]
    return run(load(None, add=[template, *plugins], assignments=assignments)).output_dir


def load_lm(base: Path) -> CausalLM:
    spec = load_spec(str(base))
    model = load_model(spec, [], dtype=torch.float32, device=torch.device("cpu"))
    return CausalLM(model, load_tokenizer(str(base)))


# --- generation_config.json -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature", "top_p"}),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, set()),
        ({"early_stopping": True, "length_penalty": 2.0}, {"early_stopping", "length_penalty"}),
        ({"early_stopping": True, "num_beams": 4}, set()),
        ({"early_stopping": "foo"}, {"early_stopping"}),
        ({"cache_implementation": "none of them", "top_k": 7, "do_sample": True}, {"cache_implementation"}),
        ({"num_return_sequences": 3}, {"num_return_sequences"}),
        ({"max_new_tokens": 0}, {"max_new_tokens"}),
        ({"pad_token_id": -1}, {"pad_token_id"}),
        ({"output_scores": True}, {"output_scores"}),
        ({"temperature": float("nan"), "do_sample": True}, {"temperature"}),
        ({"compile_config": {"mode": "x"}}, {"compile_config"}),
        ({"watermarking_config": {"bias": 2.0}}, set()),
        ({"suppress_tokens": [1], "forced_eos_token_id": 1}, {"forced_eos_token_id"}),
    ],
)
def test_settings_that_cannot_be_saved_are_left_out_and_the_others_kept(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], left_out: set[str]
) -> None:
    change(base / "generation_config.json", **settings)
    lm = load_lm(base)
    lm.model.generation_config = generation_defaults(lm, [2])
    model_files.save_without_weights(lm.model, tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {key for key in settings if saved.get(key) != settings[key]} - {"watermarking_config"} == left_out | (
        {"pad_token_id"} & left_out
    )
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [2, 0]
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == bool(left_out)
    assert all(key in lines[0] and "\n" not in lines[0] for key in left_out)


@pytest.mark.parametrize("text", ["{broken", "[]", "3"])
def test_settings_that_are_no_json_object_are_not_used(base: Path, text: str) -> None:
    (base / "generation_config.json").write_text(text)
    load_lm(base)
    (base / "generation_config.json").unlink()
    assert load_generation_config(str(base)) is None


def test_a_run_whose_base_has_settings_that_cannot_be_saved_is_saved(base: Path) -> None:
    change(base / "generation_config.json", temperature=0.6)
    out = train(base)
    for directory in (out / "model", out / "checkpoints" / "step-1"):
        AutoModelForCausalLM.from_pretrained(directory)
        assert "temperature" not in json.loads((directory / "generation_config.json").read_text())
    assert not (out / "check").exists()


# --- config.json ----------------------------------------------------------------------------------


def test_entries_of_a_configuration_that_are_no_json_are_left_out(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = load_lm(base)
    config: Any = lm.model.config
    config.odd, config.mixed, config.plain = {1, 2}, {1: "a", "b": 2}, {"a": [1]}
    (tmp_path / "saved").mkdir()
    model_files.check(lm, tmp_path / "saved", "base", trust_remote_code=False)
    assert "model base: the config.json of the result has no odd, mixed: no JSON" in caplog.text
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {"odd", "mixed", "plain"} & saved.keys() == {"plain"}
    assert config.odd == {1, 2}, "the model's own code may read it"


MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.config.layers_seen = {1, 2}
"""


def test_a_model_with_code_of_its_own_is_saved_with_it(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    (base / "modeling_own.py").write_text(MODELING)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change(base / "config.json", model_type="own_llama", auto_map=auto_map)
    out = train(base, trust_remote_code=True)
    assert "has no layers_seen: no JSON" in caplog.text
    for directory in (out / "model", out / "checkpoints" / "step-1"):
        model: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        assert (type(model).__name__, model.config.layers_seen) == ("OwnModel", {1, 2})


def test_a_model_that_cannot_be_saved_is_refused_before_the_first_step(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *args: Any, **options: Any) -> None:
        raise ValueError("this config\nis not for saving")

    monkeypatch.setattr("transformers.LlamaConfig.save_pretrained", refuse)
    with pytest.raises(ModelError, match=r"model .*base: its config\.json cannot be saved: this config is not for"):
        train(base)
    assert not (base.parent / "out").exists()


# --- the tokenizer --------------------------------------------------------------------------------


def refuse_to_save(self: Any, *args: Any, **options: Any) -> None:
    raise TypeError("save_vocabulary() got an unexpected keyword argument 'filename_prefix'")


@pytest.mark.parametrize("plugins", [(), ("lora",)])
def test_of_a_tokenizer_that_cannot_be_saved_the_files_are_copied(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, plugins: tuple[str, ...]
) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuse_to_save)
    out = train(base, *plugins)
    text = "its tokenizer cannot be saved (save_vocabulary() got an unexpected keyword argument 'filename_prefix'); the"
    assert caplog.text.count(text) == 1
    saved = AutoTokenizer.from_pretrained(out / ("adapter" if plugins else "model"))
    own = AutoTokenizer.from_pretrained(base)
    assert saved.get_vocab() == own.get_vocab()
    assert saved.chat_template != own.chat_template, "the template of the run"


def test_a_tokenizer_with_added_tokens_that_cannot_be_saved_is_refused_before_the_first_step(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuse_to_save)
    with pytest.raises(ModelError, match=r"its tokenizer cannot be saved: save_vocabulary\(\) got an unexpected"):
        train(base, "lora", template="llama3", add_tokens=True)
    assert not (base.parent / "out").exists()


def test_chat_templates_whose_names_are_no_files_are_copied(base: Path, tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "x"}, {"name": "tool/use", "template": "y"}]
    (base / "chat_template.jinja").unlink()
    change(base / "tokenizer_config.json", chat_template=templates)
    (tmp_path / "saved").mkdir()
    assert saved_tokenizer.save(load_tokenizer(str(base)), tmp_path / "saved", {}) is not None
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == {"default": "x", "tool/use": "y"}


# --- the name of the base -------------------------------------------------------------------------


def test_the_base_is_named_so_that_another_working_directory_finds_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("base")
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    out = train(base, "lora", model="../link")
    expected = str(base)
    for at in (out / "adapter", out / "checkpoints" / "step-1"):
        assert json.loads((at / "adapter_config.json").read_text())["base_model_name_or_path"] == expected
    assert run_file.read(out / "run.yaml")[0]["model"] == expected
    assert json.loads((out / "manifest.json").read_text())["model"] == {
        "name": "../link",
        "files": expected,
        "revision": None,
        "sha256": fingerprint(expected),
    }
    monkeypatch.chdir(tmp_path / "two")
    assert load_run(out, device="cpu").base_model == load_run(out / "adapter", device="cpu").base_model == expected
    (out / "summary.json").unlink()
    (tmp_path / "two" / "nearer").symlink_to(base)
    options = {"model": "nearer", "data.train": str(tmp_path / "rows.jsonl"), "output_dir": str(out)}
    options |= {"train.max_steps": 1, "train.save_steps": 1, "train.learning_rate": 1e-3, "train.use_cpu": True}
    assignments = [(name, value, f"--set {name}") for name, value in options.items()]
    assert run(load(None, add=["chatml", "lora"], assignments=assignments), resume=True).output_dir == out


# --- the disk -------------------------------------------------------------------------------------


def test_a_disk_without_room_for_the_result_is_found_before_the_first_step(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 50_000, 50_000))
    with pytest.raises(OutputError, match=r"out: the result takes 0 MB, 0 MB are free; make room"):
        train(base)
    assert not (base.parent / "out").exists()


# --- the dtype ------------------------------------------------------------------------------------


@pytest.fixture
def narrow(base: Path) -> Path:
    """The tiny model in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    return base


def dtypes(file: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(file).values()}


def test_a_full_result_has_the_dtype_of_the_base_and_a_checkpoint_that_of_training(
    narrow: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="sftx")
    out = train(narrow)
    assert "the result is saved in bfloat16 (option save_dtype)" in caplog.text
    result, exact = load_file(out / "model" / "model.safetensors"), out / "checkpoints" / "step-1"
    trained = load_file(exact / "model.safetensors")
    assert trained.keys() == result.keys(), "tied weights once"
    assert all(torch.equal(result[name], trained[name].to(torch.bfloat16)) for name in result)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert any(not torch.equal(result[name].float(), trained[name]) for name in result)
    assert [json.loads((at / "config.json").read_text())["dtype"] for at in (out / "model", exact)] == [
        "bfloat16",
        "float32",
    ]
    loaded = AutoModelForCausalLM.from_pretrained(out / "model")
    assert loaded.dtype == torch.bfloat16
    assert (out / "model" / "model.safetensors").stat().st_size < 0.6 * (exact / "model.safetensors").stat().st_size


def test_a_loaded_run_computes_with_the_saved_weights_as_its_evaluations_did(narrow: Path) -> None:
    out = train(narrow)
    loaded = load_run(out, device="cpu")
    saved = load_file(out / "model" / "model.safetensors")
    assert (loaded.lm.model.dtype, loaded.compute_dtype) == (torch.float32, torch.float32)
    assert all(torch.equal(p, saved[name].float()) for name, p in loaded.lm.model.named_parameters())


@pytest.mark.parametrize(
    ("option", "expected"), [("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_another_dtype_of_the_result(base: Path, option: str, expected: torch.dtype) -> None:
    out = train(base, train__save_dtype=option)
    assert dtypes(out / "model" / "model.safetensors") == {expected}


def test_without_a_dtype_in_its_configuration_the_base_s_tensors_tell(narrow: Path) -> None:
    values = json.loads((narrow / "config.json").read_text())
    del values["dtype"]
    (narrow / "config.json").write_text(json.dumps(values))
    assert dtypes(train(narrow) / "model" / "model.safetensors") == {torch.bfloat16}


def test_a_weight_that_is_too_large_for_the_dtype_keeps_the_model_exact(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_decoder().norm.weight[0] = 1e5
    model.save_pretrained(base)
    out = train(base, train__save_dtype="float16")
    assert dtypes(out / "model" / "model.safetensors") == {torch.float32}
    assert "a weight is too large for float16: the model is saved as it was trained" in caplog.text
