"""What a run leaves is read by the tools of others: transformers, PEFT, and whatever reads a trainer's state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftx.config.loading import load
from sftx.run import run

MAX_NEW_TOKENS = 12
SOUNDS = {
    "cat": "meow",
    "dog": "woof",
    "cow": "moo",
    "owl": "hoot hoot",
    "bee": "buzz",
    "duck": "quack",
    "lion": "roar",
}
PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""How a pickle begins, and the archive that torch.save makes of several."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rows")
    others = dict(zip(SOUNDS, [*list(SOUNDS.values())[1:], "meow"], strict=True))
    for name, sounds, repeats in (
        ("train", SOUNDS, (2, 3, 4, 5)),
        ("held", SOUNDS, (3,)),
        ("other", others, (2, 3, 4)),
    ):
        made = [
            {"messages": [{"role": "user", "content": " ".join([who] * n)}, {"role": "assistant", "content": says}]}
            for who, says in sounds.items()
            for n in repeats
        ]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return directory


def trained(rows: Path, out: Path, *plugins: str, **more: Any) -> Path:
    """The directory of a run that learns these rows, with checkpoints and answers."""
    given = {
        "data.train": str(rows / "train.jsonl"),
        "data.eval": str(rows / "held.jsonl"),
        "output_dir": str(out),
        "train.learning_rate": 1e-2,
        "train.num_train_epochs": 30,
        "train.save_steps": 30,
        "train.eval_steps": 30,
        "train.logging_steps": 5,
        "generation.max_new_tokens": MAX_NEW_TOKENS,
        "generation.num_samples": 7,
    } | {name.replace("__", "."): value for name, value in more.items()}
    assignments = [(name, value, f"--set {name}") for name, value in given.items()]
    return run(load(None, add=["chatml", "exact-match", *plugins], assignments=assignments)).output_dir


@pytest.fixture(scope="module")
def full(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny model."""
    from sftx.model.tiny import model_dir

    return trained(rows, tmp_path_factory.mktemp("full") / "run", model=str(model_dir()))


@pytest.fixture(scope="module")
def adapted(rows: Path, full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the model that `full` made, which learns other answers."""
    more = {"plugins__lora__lora_dropout": 0.05, "train__save_total_limit": 1, "data__train": str(rows / "other.jsonl")}
    return trained(rows, tmp_path_factory.mktemp("adapted") / "run", "lora", model=str(full / "model"), **more)


def answers(model: Any, directory: Path, questions: list[str]) -> list[str]:
    """What transformers alone answers, greedily, from the model's and the tokenizer's files: one row at a time."""
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


def said(out: Path) -> tuple[list[str], list[str]]:
    """The held-out questions of a run and its own answers at the end."""
    samples = json.loads((out / "summary.json").read_text(encoding="utf-8"))["samples"]
    written = [json.loads(line) for line in (out / "generated_predictions.jsonl").read_text().splitlines()]
    assert [line["predict"] for line in written] == [sample["after"] for sample in samples]
    assert len({sample["after"] for sample in samples}) > 3, "answers that are all alike show little"
    return [" ".join([who] * 3) for who in SOUNDS], [sample["after"] for sample in samples]


def test_transformers_loads_a_full_model_and_answers_as_the_run_did(full: Path) -> None:
    from transformers import AutoModelForCausalLM

    questions, expected = said(full)
    for directory in (full / "model", full / "checkpoints" / "step-120"):
        assert answers(AutoModelForCausalLM.from_pretrained(directory), directory, questions) == expected
    earlier = full / "checkpoints" / "step-30"
    assert answers(AutoModelForCausalLM.from_pretrained(earlier), earlier, questions) != expected


def test_peft_loads_an_adapter_and_answers_as_the_run_did(full: Path, adapted: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    questions, expected = said(adapted)
    assert expected != said(full)[1]
    last = adapted / "checkpoints"
    for directory in (adapted / "adapter", *last.iterdir()):
        base = AutoModelForCausalLM.from_pretrained(full / "model")
        adapter = PeftModel.from_pretrained(base, directory)
        assert answers(adapter, directory, questions) == expected
        assert answers(adapter.merge_and_unload(), directory, questions) == expected


def test_a_checkpoint_holds_a_trainer_state_that_transformers_reads(adapted: Path) -> None:
    from transformers import TrainerState

    (checkpoint,) = (adapted / "checkpoints").iterdir()
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    assert (state.global_step, state.max_steps, state.epoch) == (90, 90, 30)
    events = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    trained = {line["step"]: line["loss"] for line in state.log_history if "loss" in line}
    assert trained == {
        e["step"]: e["loss"] for e in events if e["event"] == "step" and (e["step"] == 1 or e["step"] % 5 == 0)
    }
    evaluated = {line["step"]: line["eval_loss"] for line in state.log_history if "eval_loss" in line}
    assert evaluated == {e["step"]: e["loss"] for e in events if e["event"] == "evaluate"}
    assert all({"step", "epoch"} <= line.keys() for line in state.log_history)
    assert all("learning_rate" in line for line in state.log_history if "loss" in line)
    assert all("eval_exact-match" in line for line in state.log_history if "eval_loss" in line)


def test_nothing_in_a_run_directory_is_pickled(full: Path, adapted: Path) -> None:
    files = [path for out in (full, adapted) for path in out.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".jinja", ".safetensors", ".yaml", ".html", ".png"}
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
