"""Artefacts and checkpoints can be read by transformers, PEFT and tools that read a TrainerState."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from answering import MAX_NEW_TOKENS, QUESTIONS, answers_of

PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""The first bytes of a pickle, and of the archive that torch.save writes."""


def answers(model: Any, directory: Path, questions: list[str]) -> list[str]:
    """Return the greedy answers of transformers alone, with the tokenizer in `directory`, one row at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.eval().generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        found.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def test_transformers_loads_a_full_model_and_answers_as_the_run_did(full: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = answers_of(full)
    for directory in (full / "model", full / "checkpoints" / "step-120"):
        assert answers(AutoModelForCausalLM.from_pretrained(directory), directory, QUESTIONS) == expected
    earlier = full / "checkpoints" / "step-30"
    assert answers(AutoModelForCausalLM.from_pretrained(earlier), earlier, QUESTIONS) != expected


def test_peft_loads_an_adapter_and_answers_as_the_run_did(full: Path, adapted: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = answers_of(adapted)
    assert expected != answers_of(full)
    last = adapted / "checkpoints"
    for directory in (adapted / "adapter", *last.iterdir()):
        base = AutoModelForCausalLM.from_pretrained(full / "model")
        adapter = PeftModel.from_pretrained(base, directory)
        assert answers(adapter, directory, QUESTIONS) == expected
        assert answers(adapter.merge_and_unload(), directory, QUESTIONS) == expected


def test_the_lines_in_an_adapters_readme_answer_and_stop(
    base: Path, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of PEFT, of transformers for the merged model, and of pipeline(); each line that is there is needed."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = answers_of(adapted)
    adapter = adapted / "adapter"
    readme = (adapter / "README.md").read_text(encoding="utf-8")
    card = yaml.safe_load(readme.split("---\n")[1])
    assert (card["base_model"], card["library_name"]) == (str(base), "peft")
    load, merge, pipe = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    shutil.copytree(adapter, tmp_path / "adapter")  # the lines write `merged` beside it
    monkeypatch.chdir(tmp_path / "adapter")
    assert "What is the capital of France?" in load
    found = []
    for question in QUESTIONS:
        names: dict[str, Any] = {}
        exec(load.replace("What is the capital of France?", question), names)
        found.append(capsys.readouterr().out.removesuffix("\n"))
        assert int(names["output"][0, -1]) == names["tokenizer"].eos_token_id
        exec(pipe, names)
        assert capsys.readouterr().out == found[-1] + "\n"
    assert found == expected
    exec(merge, names)
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert answers(merged, Path("merged"), QUESTIONS) == expected

    # Without the adapter's generation settings PEFT goes on after the answer.
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    asked = tokenizer.apply_chat_template(names["messages"], add_generation_prompt=True, return_tensors="pt")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ids = model.generate(**asked, max_new_tokens=40)[0, asked["input_ids"].shape[1] :].tolist()
    assert tokenizer.eos_token_id in ids[:-1]
    # What reads the token from the tokenizer stops.
    ids = model.generate(**asked, max_new_tokens=40, eos_token_id=tokenizer.eos_token_id)[0].tolist()
    assert (ids[-1], tokenizer.eos_token) == (tokenizer.eos_token_id, "<|im_end|>")


def test_a_checkpoint_holds_a_trainer_state_that_transformers_reads(adapted: Path) -> None:
    from transformers import TrainerState

    (checkpoint,) = (adapted / "checkpoints").iterdir()
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    assert (state.global_step, state.max_steps, state.epoch) == (90, 90, 30)
    events = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    trained = {line["step"]: line["loss"] for line in state.log_history if "loss" in line}
    steps = [e for e in events if e["event"] == "step"]
    lines = [1, *range(5, 91, 5)]
    expected = {}
    for before, last in zip([0, *lines], lines, strict=False):  # as the Trainer's, a loss is the mean since the last
        since = steps[before:last]
        num_tokens = sum(e["num_label_tokens"] for e in since)
        expected[last] = sum(e["loss"] * e["num_label_tokens"] for e in since) / num_tokens
    assert trained == pytest.approx(expected)
    evaluated = {line["step"]: line["eval_loss"] for line in state.log_history if "eval_loss" in line}
    assert evaluated == {e["step"]: e["loss"] for e in events if e["event"] == "evaluate"}
    assert all({"step", "epoch"} <= line.keys() for line in state.log_history)
    assert all("learning_rate" in line for line in state.log_history if "loss" in line)
    assert all("eval_exact-match" in line for line in state.log_history if "eval_loss" in line)


def test_nothing_in_a_run_directory_is_pickled(full: Path, adapted: Path) -> None:
    files = [path for out in (full, adapted) for path in out.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {
        ".json",
        ".jsonl",
        ".jinja",
        ".safetensors",
        ".yaml",
        ".html",
        ".png",
        ".md",
    }
    for path in files:
        assert not path.read_bytes().startswith(PICKLED), path


def test_a_tokenizer_that_was_saved_asks_and_reads_as_the_run_did(full: Path, adapted: Path) -> None:
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(adapted / "adapter")
    own = AutoTokenizer.from_pretrained(full / "model")
    text = "cat 7. <|im_start|>\n  Zählt! 你好"
    assert saved(text)["input_ids"] == own(text)["input_ids"]
    written = [json.loads(line) for line in (adapted / "generated_predictions.jsonl").read_text().splitlines()]
    asked = saved.apply_chat_template(
        [{"role": "user", "content": "cat cat cat"}], add_generation_prompt=True, tokenize=False
    )
    assert written[0]["prompt"] == asked
