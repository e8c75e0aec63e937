"""mlx-lm converts a merged model and loads it back: dense as the run computes it, quantised near it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import LlamaConfig, PretrainedConfig

from sftx import ConfigError
from sftx.cli import main
from sftx.model import tiny
from sftx.testing.kit import Kit
from sftx.testing.runs import run_tiny
from sftx_plugins.exporters.mlx import Mlx

needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is an extra")


@pytest.fixture(scope="module", params=[{}, {"rope_type": "linear", "factor": 2.0}], ids=["plain", "scaled"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose adapter has clearly changed a model, whose rotary embeddings are not those of the default."""
    model = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny.model_dir(), model)
    Kit(None).tokenizer.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0, **request.param}
    (model / "config.json").write_text(json.dumps(config))
    settings = {"train.learning_rate": 0.05, "train.max_steps": 4}
    return run_tiny(["lora"], tmp_path_factory.mktemp("run"), model=model, settings=settings).output_dir


@needs_mlx
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"q_bits": 8}, {"q_bits": 4, "q_group_size": 32}])
def test_an_export_answers_as_its_run(run_dir: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    settings = [part for name, value in options.items() for part in ("--set", f"mlx.{name}={value}")]
    done = CliRunner().invoke(main, ["export", str(run_dir), "--to", "mlx", "--into", str(tmp_path / "mlx"), *settings])
    assert done.exit_code == 0, done.output
    assert "read by mlx-lm " in done.output
    assert f"mlx_lm.chat --model {tmp_path / 'mlx'}" in done.output.splitlines()
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config.get("quantization", {}).get("bits") == options.get("q_bits")
    assert not [path.name for path in (tmp_path / "mlx").iterdir() if path.is_dir()]


@needs_mlx
def test_a_template_that_is_not_the_runs_is_found(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = Mlx.export

    def changed(self: Mlx, source: Any, directory: Path) -> None:
        export(self, source, directory)
        template = directory / "chat_template.jinja"
        template.write_text(template.read_text().replace("assistant", "bot"))

    monkeypatch.setattr(Mlx, "export", changed)
    done = CliRunner().invoke(main, ["export", str(run_dir), "--to", "mlx", "--into", str(tmp_path / "mlx")])
    assert done.exit_code == 1
    assert "prompt" in done.output
    assert not (tmp_path / "mlx").exists()


@needs_mlx
def test_a_model_that_mlx_lm_does_not_have_is_refused_with_those_that_it_has() -> None:
    Mlx().check(LlamaConfig(architectures=["LlamaForCausalLM"]))
    with pytest.raises(ConfigError, match=r"has no UnknownForCausalLM; it has .*LlamaForCausalLM"):
        Mlx().check(PretrainedConfig(architectures=["UnknownForCausalLM"]))


def test_without_mlx_lm_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sftx\[mlx\]'"):
        Mlx().check(LlamaConfig(architectures=["LlamaForCausalLM"]))
