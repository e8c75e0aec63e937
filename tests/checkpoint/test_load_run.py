"""`load_run` answers as the run did in its last evaluation, from whatever directory it is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from answering import MAX_NEW_TOKENS, QUESTIONS, answers_of
from sftx import Conversation, Message
from sftx.errors import ConfigError, ModelError, SftxError

LOGITS = {"rtol": 0, "atol": 1e-4}
"""Two implementations of the same products in fp32."""


def conversation(question: str) -> Conversation:
    return Conversation((Message("user", question),))


def answers(loaded: Any) -> list[str]:
    prompts = [loaded.prompt(conversation(question)) for question in QUESTIONS]
    ids = loaded.answer(prompts, max_new_tokens=MAX_NEW_TOKENS)
    return [loaded.tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]


def logits(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("place", [".", "model", "checkpoints/step-120"])
def test_a_full_model_answers_as_in_its_run_and_as_transformers_loads_it(full: Path, place: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from sftx.checkpoint.load_run import load_run

    loaded = load_run(full / place)
    assert answers(loaded) == answers_of(full)
    assert not loaded.lm.training
    assert not any(p.requires_grad for p in loaded.lm.parameters())
    ids = loaded.prompt(conversation("owl owl owl"))
    theirs = AutoModelForCausalLM.from_pretrained(loaded.directory)
    weights = theirs.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.lm.model.state_dict().items())
    torch.testing.assert_close(logits(loaded.lm.model, ids), logits(theirs, ids), **LOGITS)
    assert loaded.generation_config.to_dict() == GenerationConfig.from_pretrained(loaded.directory).to_dict()


@pytest.mark.parametrize("place", [".", "adapter", "checkpoints/step-90"])
def test_an_adapter_answers_as_in_its_run_and_as_peft_loads_it(
    full: Path, base: Path, adapted: Path, place: str
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from sftx.checkpoint.load_run import load_run

    loaded = load_run(adapted / place)
    assert answers(loaded) == answers_of(adapted) != answers_of(full)
    assert loaded.base_model == str(base)
    assert list(loaded.lm.adapters) == ["lora"]
    ids = loaded.prompt(conversation("owl owl owl"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(full / "model"), loaded.directory)
    torch.testing.assert_close(logits(loaded.lm.model, ids), logits(theirs, ids), **LOGITS)
    with loaded.lm.without_adapters():
        assert answers(loaded) == answers_of(full)


def test_an_earlier_checkpoint_answers_otherwise(full: Path) -> None:
    from sftx.checkpoint.load_run import load_run

    assert answers(load_run(full / "checkpoints" / "step-30")) != answers_of(full)


def test_without_a_run_file_the_tokenizers_own_template_asks_the_same(
    full: Path, adapted: Path, tmp_path: Path
) -> None:
    from sftx.checkpoint.load_run import load_run

    for source, run in ((full / "model", full), (adapted / "adapter", adapted)):
        copy = Path(shutil.copytree(source, tmp_path / source.name))
        loaded, own = load_run(copy), load_run(source)
        assert loaded.config is None
        assert own.config is not None
        for question in (*QUESTIONS, "<|im_start|> is only text here"):
            assert loaded.prompt(conversation(question)) == own.prompt(conversation(question))
        assert loaded.stop_ids == own.stop_ids
        assert answers(loaded) == answers_of(run)


def test_an_adapter_that_peft_saved_computes_what_peft_computes(full: Path, tmp_path: Path) -> None:
    """Without tokenizer files, which are the base's then; with another scale, and a module trained in full."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from sftx.checkpoint.load_run import load_run

    base = AutoModelForCausalLM.from_pretrained(full / "model")
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"])
    theirs = get_peft_model(base, config)
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    loaded = load_run(tmp_path)
    ids = loaded.prompt(conversation("owl owl owl"))
    torch.testing.assert_close(logits(loaded.lm.model, ids), logits(theirs, ids), **LOGITS)
    with theirs.disable_adapter():
        assert (logits(loaded.lm.model, ids) - logits(theirs, ids)).abs().max() > 0.1


def test_added_tokens_and_several_options_of_the_run_are_those_of_the_run(
    rows: Path, full: Path, tmp_path: Path
) -> None:
    """llama3's control tokens are added to the tokenizer, and the adapter trains their rows."""
    from sftx.checkpoint.load_run import load_run
    from sftx.config.loading import load
    from sftx.training import run

    values = {
        "model": str(full / "model"),
        "data.train": str(rows / "train.jsonl"),
        "data.eval": str(rows / "held.jsonl"),
        "data.max_overlap": 1,
        "output_dir": str(tmp_path / "out"),
        "add_tokens": True,
        "train.max_steps": 4,
        "train.bf16": True,
        "train.learning_rate": 1e-2,
        "generation.max_new_tokens": MAX_NEW_TOKENS,
        "generation.num_samples": 7,
    }
    assignments = [(name, value, f"--set {name}") for name, value in values.items()]
    out = run(load(None, add=["llama3", "lora", "exact-match"], assignments=assignments)).output_dir
    loaded = load_run(out)
    lines = [json.loads(line) for line in (out / "generated_predictions.jsonl").read_text().splitlines()]
    assert answers(loaded) == [line["predict"] for line in lines]
    prompts = [loaded.prompt(conversation(question)) for question in QUESTIONS]
    assert [loaded.tokenizer.decode(prompt) for prompt in prompts] == [line["prompt"] for line in lines]
    assert str(loaded.compute_dtype) == "torch.bfloat16"
    standalone = load_run(shutil.copytree(out / "adapter", tmp_path / "copy"), dtype=loaded.compute_dtype)
    assert answers(standalone) == answers(loaded)


def test_plugins_that_only_observed_need_not_be_installed(full: Path, tmp_path: Path) -> None:
    from sftx.checkpoint.load_run import load_run

    out = Path(shutil.copytree(full, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    run_file = out / "run.yaml"
    run_file.write_text(run_file.read_text().replace("  jsonl:", "  some-tracker:"))
    manifest = json.loads((out / "manifest.json").read_text())
    for line in manifest["plugins"]:
        line["plugin"] = line["plugin"].replace("jsonl", "some-tracker")
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert answers(load_run(out)) == answers_of(full)
    (out / "manifest.json").unlink()
    with pytest.raises(SftxError, match="some-tracker"):
        load_run(out)


def test_a_model_that_was_trained_on_plain_text_has_no_prompts(rows: Path, full: Path, tmp_path: Path) -> None:
    from sftx.checkpoint.load_run import load_run

    copy = Path(shutil.copytree(full / "model", tmp_path / "model"))
    (copy / "chat_template.jinja").unlink()
    loaded = load_run(copy)
    assert loaded.template is None
    assert loaded.stop_ids == (loaded.tokenizer.eos_token_id,)
    with pytest.raises(ConfigError, match="no chat template"):
        loaded.prompt(conversation("cat"))
    assert len(loaded.answer([loaded.encoder.plain("cat cat")], max_new_tokens=3)) == 1


def peft_config(**changes: Any) -> dict[str, Any]:
    values = {"peft_type": "LORA", "base_model_name_or_path": "BASE", "r": 4, "lora_alpha": 4}
    return values | {"target_modules": ["q_proj"]} | changes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"something_new": 1}, "something_new"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "/no/such/base"}, r"/no/such/base.*adapter_config\.json"),
        ({"r": "four"}, "r"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_refused(
    full: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    from sftx.checkpoint.load_run import load_run

    values = peft_config(**changes)
    if values["base_model_name_or_path"] == "BASE":
        values["base_model_name_or_path"] = str(full / "model")
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(SftxError, match=named) as raised:
        load_run(tmp_path)
    assert "\n" not in str(raised.value)


def test_what_is_no_run_and_no_model_is_refused_with_what_to_do(full: Path, tmp_path: Path) -> None:
    from sftx.checkpoint.load_run import load_run

    with pytest.raises(ModelError, match="no such directory"):
        load_run(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_run(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        load_run(tmp_path)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(full, unfinished, ignore=shutil.ignore_patterns("model"))
    with pytest.raises(ModelError, match=r"--resume.*step-120"):
        load_run(unfinished)
    assert answers(load_run(unfinished / "checkpoints" / "step-120")) == answers_of(full)


def test_an_adapter_whose_run_file_was_emptied_is_refused(adapted: Path, tmp_path: Path) -> None:
    from sftx.checkpoint.load_run import load_run

    copy = Path(shutil.copytree(adapted, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    (copy / "run.yaml").write_text("")
    with pytest.raises(ModelError, match=r"run\.yaml names no adapter plugin"):
        load_run(copy)


def test_weights_that_do_not_fit_are_refused(full: Path, adapted: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from sftx.checkpoint.load_run import load_run

    copy = Path(shutil.copytree(adapted, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    weights = copy / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.popitem()
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        load_run(copy)
    weights.unlink()
    with pytest.raises(SftxError, match=r"adapter_model\.safetensors"):
        load_run(copy)
