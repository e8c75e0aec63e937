"""`--add-tokens` from the command line on: tokens are added, trained, saved, and loaded by PEFT and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftx.cli import main
from sftx.model import tiny

CONTROLS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def train(tmp_path: Path, *plugins: str, add: bool = True) -> tuple[int, str]:
    rows = [{"prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in range(20)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["run", "--model", str(tiny.model_dir()), "--plugin", "llama3", "--data", str(data)]
    arguments += ["--max-steps", "3", "--learning-rate", "1e-2", "--output-dir", str(tmp_path / "out")]
    arguments += [part for plugin in plugins for part in ("--plugin", plugin)] + ["--add-tokens"] * add
    done = CliRunner().invoke(main, arguments)
    return done.exit_code, done.output


def test_a_template_whose_tokens_are_missing_says_how_they_are_added(tmp_path: Path) -> None:
    code, said = train(tmp_path, add=False)
    assert code == 1
    assert all(token in said for token in CONTROLS)
    assert "or add them with --add-tokens" in said


@pytest.mark.parametrize("collator", ["padded", "packed"])
def test_full_fine_tuning_saves_a_model_with_the_added_rows(tmp_path: Path, collator: str) -> None:
    code, said = train(tmp_path, collator)
    assert code == 0, said
    out = tmp_path / "out" / "model"
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer.convert_tokens_to_ids(CONTROLS)
    assert max(ids) < model.get_input_embeddings().weight.shape[0]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, return_dict=False
    )
    assert asked[0] == ids[0]
    assert model(torch.tensor([asked])).logits.isfinite().all()


def test_lora_trains_the_added_rows_and_peft_loads_them(tmp_path: Path) -> None:
    from peft import PeftModel

    code, said = train(tmp_path, "lora")
    assert code == 0, said
    out = tmp_path / "out" / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = sorted(tokenizer.convert_tokens_to_ids(CONTROLS))
    settings = json.loads((out / "adapter_config.json").read_text())
    (trained,) = (
        settings["trainable_token_indices"].values()
        if isinstance(settings["trainable_token_indices"], dict)
        else [settings["trainable_token_indices"]]
    )
    assert sorted(trained) == ids
    base = AutoModelForCausalLM.from_pretrained(tiny.model_dir())
    num_rows = base.get_input_embeddings().weight.shape[0]
    if max(ids) >= num_rows:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base.resize_token_embeddings(max(ids) + 1)
    before = base.get_input_embeddings().weight.detach().clone()
    model = PeftModel.from_pretrained(base, out)
    rows = model.get_input_embeddings()(torch.arange(len(before))).detach()
    moved = (rows != before).any(1).nonzero().flatten().tolist()
    assert moved == ids
