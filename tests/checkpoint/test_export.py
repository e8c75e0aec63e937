"""Tests of `sftx export`: what is written computes in transformers what the run's model computes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftx import Conversation, Message, load_run
from sftx.checkpoint.load_run import LoadedRun
from sftx.cli import main
from sftx.testing.runs import run_tiny

PROMPTS = ["What is 2 + 3?", "Name the largest planet.", "Hello!"]
EXPORTER = """
from dataclasses import dataclass
import sftx

@dataclass(frozen=True, eq=False)
class Plugin:
    @sftx.hookimpl
    def sftx_exporter(self):
        return self

    def check(self, config):
        {check}

    def export(self, source, directory):
        (directory / "half").write_text("half")
        {export}

    def usage(self, directory):
        return "load it"
"""


def export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def trained(directory: Path, names: Sequence[str] = ("lora",), **settings: Any) -> Path:
    """Train until the adapter changes the logits by far more than rounding does."""
    options = {"train.learning_rate": 0.05, "train.warmup_steps": 0, **settings}
    return run_tiny(names, directory, settings=options).output_dir


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("lora"))


def prompts(run: LoadedRun) -> list[list[int]]:
    return [run.prompt(Conversation((Message("user", text),))) for text in PROMPTS]


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    result: Tensor = model(input_ids=torch.tensor([ids])).logits
    return result


def assert_same_model(run_directory: Path, directory: Path) -> None:
    """The exported model has the run's logits and greedy answers, in transformers alone."""
    run = load_run(run_directory, device="cpu", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for text, ids in zip(PROMPTS, prompts(run), strict=True):
        asked = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert tokenizer(rendered, add_special_tokens=False).input_ids == ids
        torch.testing.assert_close(logits(model, ids), logits(run.lm.model, ids), atol=1e-5, rtol=1e-5)
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        (answer,) = run.answer([ids], max_new_tokens=12)
        assert [token for token in out if token not in run.stop_ids] == answer
    assert set(run.stop_ids) <= set(model.generation_config.eos_token_id)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"lora.modules_to_save": ["lm_head", "embed_tokens"]}, marks=pytest.mark.slow),
        pytest.param({"lora.use_dora": True}, marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
    ids=["lora", "head", "dora", "full"],
)
def test_the_exported_model_is_that_of_the_run(settings: dict[str, Any] | None, tmp_path: Path) -> None:
    run = trained(tmp_path, ()) if settings is None else trained(tmp_path, **settings)
    done = export(run, "--to", "safetensors")
    assert done.exit_code == 0, done.output
    directory = run / "export" / "safetensors"
    assert done.stdout.startswith(f"wrote {directory}: 7 files, 0.")
    assert "verified: read by transformers" in done.stdout
    assert f'AutoModelForCausalLM.from_pretrained("{directory}"' in done.stdout
    assert_same_model(run, directory)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = prompts(load_run(run, device="cpu"))[0]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert (logits(model, ids) - logits(base, ids)).abs().max() > 0.05


def test_it_is_written_in_the_dtype_of_the_base_in_shards(lora_run: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    model = AutoModelForCausalLM.from_pretrained(lora_run.parent / "model", dtype=torch.bfloat16)
    model.save_pretrained(narrow)
    AutoTokenizer.from_pretrained(lora_run.parent / "model").save_pretrained(narrow)
    run = trained(tmp_path / "run", **{"model": str(narrow)})
    shards = ("--set", "safetensors.max_shard_size=20KB")
    assert export(run, "--to", "safetensors", "--into", tmp_path / "base", *shards).exit_code == 0
    wide = export(run, "--to", "safetensors", "--into", tmp_path / "wide", "--set", "safetensors.dtype=float32")
    assert wide.exit_code == 0
    assert json.loads((tmp_path / "base" / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto").state_dict()
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto").state_dict()
    assert {value.dtype for value in exact.values()} == {torch.float32}
    for name, value in exact.items():  # merged in fp32, and rounded once
        assert torch.equal(rounded[name], value.to(torch.bfloat16)), name
    assert_same_model(run, tmp_path / "wide")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--to", "lora"], f"plugin 'lora' (sftx {version('sftx')}) is no exporter; exporters are gguf, mlx, "),
        (["RUN", "--to", "gguff"], "no plugin of this name is installed; did you mean 'gguf'?"),
        (["RUN", "--to", "other"], "no plugin of this name is installed; exporters are gguf, mlx, ollama, safetensors"),
        (["RUN", "--to", "safetensors", "--set", "lora.r=3"], "lora.r=3: is not an option of the exporter"),
        (["RUN", "--to", "safetensors", "--set", "safetensors.dtype=int8"], "option 'dtype': got \"int8\", expected"),
        (["RUN", "--to", "safetensors", "--into", "RUN"], "exists already; move it away, or choose another place"),
        (["RUN/adapter", "--to", "safetensors"], "is no run directory; say with --into where"),
        (["RUN/missing", "--to", "safetensors"], "missing: no such directory; name a run"),
        (["RUN/checkpoints", "--to", "safetensors", "--into", "RUN/x"], "checkpoints: has no config.json"),
        (["RUN", "--to", "safetensors", "--into", "RUN/run.yaml/x"], "run.yaml is no directory; choose another place"),
        (["RUN", "--to", "safetensors", "--base", "./gone"], "--base: model ./gone: no such directory"),
        (["RUN", "--to", "safetensors", "--set", "safetensors.max_shard_size=0GB"], "expected a size such as 500MB"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    lora_run: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it before torch is imported, which takes seconds."""
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "sftx.checkpoint.exporting", None)
        done = export(*(argument.replace("RUN", str(lora_run)) for argument in arguments))
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (lora_run / "export").exists()


def test_an_adapter_directory_is_exported_too(lora_run: Path, tmp_path: Path) -> None:
    done = export(lora_run / "adapter", "--to", "safetensors", "--into", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert_same_model(lora_run, tmp_path / "out")


def test_a_model_that_the_exporter_does_not_know_is_refused_before_weights_are_read(
    lora_run: Path, install_plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = "raise sftx.ConfigError(f'{config.architectures[0]} is unknown; known are none')"
    install_plugin("acme", EXPORTER.format(check=check, export="pass"), {"other": "Plugin"})
    monkeypatch.setattr("sftx.checkpoint.load_run.build_model", None)  # which reads the weights
    done = export(lora_run, "--to", "other")
    assert done.stderr.endswith("plugin 'other' (acme 1.0): LlamaForCausalLM is unknown; known are none\n")
    assert not (lora_run / "export").exists()


def test_an_export_that_fails_leaves_nothing_behind(lora_run: Path, install_plugin: Any) -> None:
    install_plugin("acme", EXPORTER.format(check="pass", export="raise ValueError('no')"), {"other": "Plugin"})
    done = export(lora_run, "--to", "other")
    assert done.exit_code == 1
    assert "plugin 'other' (acme 1.0): export failed: ValueError: no" in done.stderr
    assert [path for path in lora_run.rglob("*") if path.name == "half"] == []
    nothing = EXPORTER.replace('(directory / "half").write_text("half")', "").format(check="pass", export="pass")
    install_plugin("zeta", nothing, {"empty": "Plugin"})
    assert "export wrote no file" in export(lora_run, "--to", "empty").stderr
    assert not (lora_run / "export" / "empty").exists()
