"""What vLLM serves beside its base stays an adapter, which PEFT reads; everything else becomes a merged model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sftx.cli import main
from sftx.testing.runs import run_tiny
from sftx_plugins.exporters.vllm import refusals

LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none", "use_dora": False}
TENSORS = ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",)


@pytest.mark.parametrize(
    ("changes", "tensors", "reason"),
    [
        ({}, TENSORS, None),
        ({"use_rslora": True, "r": 512, "target_modules": "all-linear"}, TENSORS, None),
        ({"peft_type": "VERA"}, TENSORS, "its kind is VERA"),
        ({"peft_type": None}, TENSORS, "its kind is none of PEFT"),
        ({"use_dora": True}, TENSORS, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, TENSORS, "trained in full (lm_head)"),
        ({"bias": "all"}, TENSORS, "biases"),
        ({"lora_bias": True}, TENSORS, "biases"),
        ({"r": 513}, TENSORS, "its rank is 513"),
        ({"rank_pattern": {"q_proj": 8}}, TENSORS, "scales all by r and lora_alpha"),
        ({"alpha_pattern": {"q_proj": 8}}, TENSORS, "scales all by r and lora_alpha"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, TENSORS, "rows of single tokens"),
        ({"target_parameters": ["experts.gate_up_proj"]}, TENSORS, "stacked experts"),
        ({}, ("base_model.model.model.embed_tokens.lora_embedding_A",), "the embedding or the output head"),
        ({}, ("base_model.model.lm_head.lora_A.weight",), "the embedding or the output head"),
        ({}, ("base_model.model.model.norm.weight",), "no A or B of a linear layer"),
    ],
)
def test_vllms_rules_have_a_reason_each(
    changes: Mapping[str, Any], tensors: tuple[str, ...], reason: str | None
) -> None:
    found = refusals({**LORA, **changes}, tensors)
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]


def export(run: Path, into: Path, *settings: str) -> tuple[int, str]:
    options = [part for setting in settings for part in ("--set", setting)]
    done = CliRunner().invoke(main, ["export", str(run), "--to", "vllm", "--into", str(into), *options])
    return done.exit_code, done.output


def test_an_adapter_that_fits_is_served_beside_its_base(tmp_path: Path) -> None:
    run = run_tiny(["lora"], tmp_path, settings={"train.learning_rate": 0.05, "lora.r": 12}).output_dir
    code, said = export(run, tmp_path / "served")
    assert code == 0, said
    assert "read by peft " in said
    served = tmp_path / "served"
    assert said.splitlines()[-1] == (
        f"vllm serve {tmp_path / 'model'} --enable-lora --max-lora-rank 16 --lora-modules trained={served} "
        f"--tokenizer {served} --generation-config {served}"
    )
    assert json.loads((served / "adapter_config.json").read_text())["r"] == 12
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {f.name for f in served.iterdir()}
    assert not (served / "config.json").exists()
    code, said = export(run, tmp_path / "merged", "vllm.adapter=false")
    assert code == 0, said
    assert said.splitlines()[-1] == f"vllm serve {tmp_path / 'merged'}"
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_an_adapter_that_does_not_fit_is_merged_and_said_so(tmp_path: Path) -> None:
    run = run_tiny(["lora"], tmp_path, settings={"train.learning_rate": 0.05, "lora.use_dora": True}).output_dir
    code, said = export(run, tmp_path / "served")
    assert code == 0, said
    assert "a merged model is written, since vLLM would not serve the adapter: it is DoRA" in said
    assert said.splitlines()[-1] == f"vllm serve {tmp_path / 'served'}"
    assert "adapter_config.json" not in {file.name for file in (tmp_path / "served").iterdir()}
    shutil.rmtree(tmp_path / "served")
    code, said = export(run, tmp_path / "served", "vllm.adapter=true")
    assert (code, "vLLM would not serve the adapter: it is DoRA" in said) == (1, True), said
    assert not (tmp_path / "served").exists()
