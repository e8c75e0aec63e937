"""Tests of `sftx merge`: the base that it merges into, what is asked, and the card of what is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sftx import ConfigError, DataError, PluginError, load_run
from sftx.assembly.stages.exporter_stages import ExportedStage
from sftx.checkpoint.exporting import LoadedSource
from sftx.checkpoint.questions import find_questions
from sftx.checkpoint.verification import MAX_NEW_TOKENS, Verification, ask, verify
from sftx.cli import main
from sftx.data.encoder import Encoder
from sftx.model import tiny
from sftx.testing.kit import Kit
from sftx.testing.runs import run_tiny
from sftx_plugins.exporters.transformers_reader import TransformersReader

PLANTED = """
from dataclasses import dataclass
import sftx
from sftx_plugins.exporters.safetensors import Safetensors

@dataclass(frozen=True, eq=False)
class Plugin(Safetensors):
    @sftx.hookimpl
    def sftx_exporter(self):
        return self

    def export(self, source, directory):
        source.tokenizer.chat_template = "{{ messages[-1].content }}"
        super().export(source, directory)
"""


def sftx(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def trained(directory: Path, names: Sequence[str] = ("lora",), model: Path | None = None, **settings: Any) -> Path:
    options = {"train.learning_rate": 0.05, "train.warmup_steps": 0, **settings}
    return run_tiny(names, directory, model=model, settings=options).output_dir


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("lora"))


def test_a_merged_model_is_a_directory_of_transformers(lora_run: Path, tmp_path: Path) -> None:
    done = sftx("merge", lora_run, "--into", tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "20KB")
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'out'}: " in done.stdout
    assert "verified: read by transformers" in done.stdout
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert set(load_run(lora_run, device="cpu").stop_ids) <= set(model.generation_config.eos_token_id)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    again = sftx("merge", lora_run, "--into", tmp_path / "out")
    assert (again.exit_code, again.stderr.count("\n")) == (1, 1)
    assert "exists already; move it away, or choose another place with --into" in again.stderr
    wrong = sftx("merge", lora_run, "--into", tmp_path / "b", "--max-shard-size", "many")
    assert "option 'max_shard_size'" in wrong.stderr


def test_an_export_that_does_not_answer_as_the_run_is_an_error_and_is_not_kept(
    lora_run: Path, tmp_path: Path, install_plugin: Any
) -> None:
    install_plugin("acme", PLANTED, {"planted": "Plugin"})
    done = sftx("export", lora_run, "--to", "planted", "--into", tmp_path / "out")
    assert done.exit_code == 1
    assert "plugin 'planted' (acme 1.0): what it wrote does not answer as the run does" in done.stderr
    assert "another chat template" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("nothing is kept, and --no-verify would keep it all the same")
    assert {path.name for path in tmp_path.iterdir()} == {"site-packages"}  # of the plugin
    done = sftx("export", lora_run, "--to", "planted", "--into", tmp_path / "out", "--no-verify")
    assert done.exit_code == 0
    assert "not verified: --no-verify" in done.stdout
    assert "--no-verify left it out" in (tmp_path / "out" / "README.md").read_text()


# --- the base ---------------------------------------------------------------------------------------


def test_a_base_that_has_moved_is_said_in_one_sentence_and_can_be_named(tmp_path: Path) -> None:
    run = trained(tmp_path / "before")
    moved = (tmp_path / "before" / "model").rename(tmp_path / "moved")
    done = sftx("merge", run)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert f"model {tmp_path / 'before' / 'model'}: no such directory" in done.stderr
    assert "the base of this adapter: put it back, name it with --base, or correct model in" in done.stderr
    done = sftx("merge", run, "--base", moved)
    assert done.exit_code == 0, done.output
    assert "verified: read by transformers" in done.stdout
    assert "--base" in sftx("merge", run, "--base", tmp_path / "none", "--into", tmp_path / "x").stderr


def test_a_quantised_base_is_merged_into_as_it_was_trained_or_into_the_original(tmp_path: Path) -> None:
    run = trained(tmp_path, ["qlora"])
    done = sftx("merge", run)
    assert done.exit_code == 0, done.output
    assert "merged into its dequantised weights" in done.stderr
    assert "--base original" in done.stderr
    near, far = (
        float(re.search(r"difference of a logit (\S+),", text)[1])  # type: ignore[index]
        for text in (done.stdout, sftx("merge", run, "--base", "original", "--into", tmp_path / "far").stdout)
    )
    assert near < 1e-4 < far
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "far").state_dict()
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(base[name], original[name])


def test_a_base_that_is_stored_quantised_is_merged_dequantised_or_into_the_model_that_it_was_made_of(
    tmp_path: Path,
) -> None:
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(tiny.model_dir(), quantization_config=options).save_pretrained(tmp_path / "q")
    Kit(None).tokenizer.save_pretrained(tmp_path / "q")
    run = trained(tmp_path / "run", model=tmp_path / "q")
    refused = sftx("merge", run, "--base", "original")
    assert "is stored quantised; name the model that it was made of: --base DIR|HUB_ID" in refused.stderr
    done = sftx("merge", run)
    assert done.exit_code == 0, done.output
    assert "--base DIR|HUB_ID merges into a base of 16 bits" in done.stderr
    assert "quantization_config" not in json.loads((run / "merged" / "config.json").read_text())
    other = sftx("merge", run, "--base", tiny.model_dir(), "--into", tmp_path / "other")
    near, far = (float(re.findall(r"difference of a logit (\S+),", text)[0]) for text in (done.stdout, other.stdout))
    assert near < 1e-4 < far


def test_original_is_refused_for_a_base_that_is_not_quantised(lora_run: Path, tmp_path: Path) -> None:
    done = sftx("merge", lora_run, "--base", "original", "--into", tmp_path / "out")
    assert "--base original" in done.stderr
    assert "was trained on a base that is not quantised; leave it out" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_head_that_was_trained_apart_from_the_embedding_comes_back_untied(
    lora_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = load_run(lora_run, device="cpu", dtype=torch.float32)
    source = LoadedSource(run)
    head: Any = run.lm.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 1.5)
    caplog.set_level("WARNING")
    source.save_pretrained(tmp_path)
    assert "the output head is no longer equal to the embedding" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, run.lm.model(ids).logits)


def test_a_head_that_is_equal_stays_tied(lora_run: Path, tmp_path: Path) -> None:
    run = load_run(lora_run, device="cpu", dtype=torch.float32)
    head: Any = run.lm.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    LoadedSource(run).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_weight_too_large_for_float16_is_an_error(lora_run: Path, tmp_path: Path) -> None:
    run = load_run(lora_run, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        run.lm.model.get_input_embeddings().weight[7, 7] = 70_000
    with pytest.raises(ConfigError, match=r"a weight is too large for float16, .* take bfloat16"):
        LoadedSource(run).save_pretrained(tmp_path, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


# --- the questions ----------------------------------------------------------------------------------


def test_the_questions_are_those_that_the_run_has_held_out(tmp_path: Path) -> None:
    run = trained(tmp_path, **{"data.eval": [], "data.eval_fraction": 2})
    held_out = {
        line["where"]
        for line in map(json.loads, (run / "ledger.jsonl").read_text().splitlines())
        if line["action"] == "held out"
    }
    kind, questions = find_questions(load_run(run, device="cpu"), 8)
    assert kind == "held-out rows"
    assert {question.name for question in questions} == held_out


def test_without_held_out_rows_it_asks_training_rows_and_without_data_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(tmp_path, **{"data.eval": []})
    kind, questions = find_questions(load_run(run, device="cpu"), 2)
    assert kind == "training rows"
    assert [Path(question.name).name for question in questions] == ["rows.jsonl:1", "rows.jsonl:2"]
    (tmp_path / "rows.jsonl").unlink()
    kind, questions = find_questions(load_run(run, device="cpu"), 3)
    assert (kind, len(questions)) == ("sample questions", 3)
    assert "the questions are samples, since the run's data cannot be read: " in caplog.text


def test_a_run_on_plain_text_is_compared_by_continuing_text(tmp_path: Path) -> None:
    rows = [{"text": f"The number {n} comes after the number {n - 1}."} for n in range(8)]
    options = {"train.learning_rate": 0.05, "train.warmup_steps": 0}
    run = run_tiny(["lora", "text"], tmp_path, rows=rows, settings=options).output_dir
    loaded = load_run(run, device="cpu")
    loaded = replace(loaded, template=None, encoder=Encoder(loaded.tokenizer, None))  # as one without a template is
    kind, questions = find_questions(loaded, 2)
    assert (kind, questions[0].messages) == ("held-out rows", ())
    assert loaded.tokenizer.decode(questions[0].token_ids) in rows[0]["text"]
    answers, directory = ask(loaded, questions), tmp_path / "merged"
    directory.mkdir()
    LoadedSource(loaded).save_pretrained(directory)

    def compare() -> Verification:
        stage = ExportedStage("the exporter", TransformersReader(directory))
        return verify(kind, answers, stage, loaded.tokenizer, loaded.stop_ids, "none")

    assert compare().num_agreeing == 2 * MAX_NEW_TOKENS
    file = directory / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["T"], vocabulary["h"] = vocabulary["h"], vocabulary["T"]
    file.write_text(json.dumps(values))
    with pytest.raises(PluginError, match="another vocabulary or tokenizer: 'The number"):
        compare()


def test_a_bare_model_is_compared_by_sample_questions(tmp_path: Path) -> None:
    done = sftx("merge", tiny.model_dir(), "--into", tmp_path / "out", "--verify-rows", "2")
    assert done.exit_code == 0, done.output
    assert "tokens of its 2 answers (sample questions)" in done.stdout


def test_without_any_question_the_advice_is_to_leave_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftx.checkpoint.questions._SAMPLES", ())
    with pytest.raises(DataError, match="its template accepts no question; leave the comparison out with --no-verify"):
        find_questions(load_run(tiny.model_dir(), device="cpu"), 2)


# --- the model card -----------------------------------------------------------------------------------


def test_the_card_has_what_the_record_of_the_run_has(lora_run: Path, tmp_path: Path) -> None:
    assert sftx("merge", lora_run, "--into", tmp_path / "out").exit_code == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "text-generation", None)
    manifest = json.loads((lora_run / "manifest.json").read_text())
    assert "There are 6 training rows and 6 held-out rows." in text
    assert f"| rows.jsonl | {manifest['data'][0]['fingerprint']} |" in text
    assert f"| rows.jsonl (held out) | {manifest['eval_data'][0]['fingerprint']} |" in text
    before, after = (
        json.loads((lora_run / "summary.json").read_text())["held_out"][key] for key in ("before", "after")
    )
    assert f"| loss | {before['loss']:.4g} | {after['loss']:.4g} |" in text
    assert "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant" in text
    assert 'AutoModelForCausalLM.from_pretrained("out", dtype="auto")' in text
    assert "Answers end with `<|im_end|>`." in text
    assert re.search(
        r"it comes from, read by transformers .* its 6 answers \(held-out rows\); .* mean KL divergence \d\.\de.\d\d\.",
        text,
    )


def test_the_card_names_a_base_of_the_hub_and_its_license(lora_run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(lora_run.parent / "model", base)
    (base / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    copy = shutil.copytree(lora_run, tmp_path / "run")
    for name in ("run.yaml", "adapter/adapter_config.json"):
        file = copy / name
        file.write_text(file.read_text().replace(str(lora_run.parent / "model"), str(base)))
    assert sftx("merge", copy, "--no-verify").exit_code == 0
    card = ModelCard.load(copy / "merged" / "README.md")
    assert card.data.license == "mit"
    assert "The base model's is mit." in card.text


def test_damaged_files_are_named(lora_run: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(lora_run, run)
    assert sftx("merge", run, "--into", model, "--no-verify").exit_code == 0
    for place, name, content, message in (
        (run / "adapter", "chat_template.jinja", b"{% if", "its chat template is no valid Jinja: unexpected"),
        (run / "adapter", "adapter_model.safetensors", None, "is damaged, or was not copied to its end"),
        (model, "model.safetensors", None, "its model.safetensors is damaged, or was not copied to its end"),
    ):
        file = place / name
        file.write_bytes(file.read_bytes()[:3000] if content is None else content)
        result = sftx("merge", place, "--into", tmp_path / "merged")
        assert (result.exit_code, isinstance(result.exception, SystemExit)) == (1, True)
        assert message in result.stderr
        assert not (tmp_path / "merged").exists()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    said = sftx("merge", model, "--into", tmp_path / "merged").stderr
    assert "its model-00001-of-00001.safetensors is missing, which model.safetensors.index.json names" in said
    (model / "other.safetensors").rename(model / "model.safetensors")
    refused = sftx("push", model, "me/model", "--dry-run")
    assert f"{model / 'model.safetensors'}: is damaged, or not complete" in refused.stderr
