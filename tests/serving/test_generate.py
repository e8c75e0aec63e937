"""`sftx generate` answers rows as the run's evaluation does, goes on where it was killed, and loses no row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from sftx.checkpoint.load_run import LoadedRun, load_run
from sftx.cli import main
from sftx.errors import OutputError
from sftx.serving.answers_file import AnswersFile, write_line
from sftx.testing.runs import run_tiny
from sftx.types import Conversation, Message

SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "owl": "hoot", "bee": "buzz"}
ROWS: list[dict[str, Any]] = [
    *(
        {"messages": [{"role": "user", "content": animal}, {"role": "assistant", "content": sound}]}
        for animal, sound in SOUNDS.items()
    ),
    {"prompt": "What does the cat say?", "completion": "meow"},
    {"prompt": "What does the dog say?"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]},
    {"text": "The owl said"},
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose adapter has clearly changed the model, evaluated on the rows that it trained on."""
    settings = {
        "train.learning_rate": 0.02,
        "train.max_steps": 6,
        "lora.r": 8,
        "generation.max_rows": None,
        "generation.max_new_tokens": 8,
        "generation.num_samples": 5,
    }
    directory = tmp_path_factory.mktemp("generated")
    return run_tiny(["lora", "exact-match"], directory, rows=ROWS[:5], settings=settings).output_dir


@pytest.fixture(scope="module")
def loaded(run_dir: Path) -> LoadedRun:
    return load_run(run_dir)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def generate(model: Path, *arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(main, ["generate", str(model), "--max-new-tokens", "8", *map(str, arguments)], **options)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_and_scores_are_those_of_the_run(run_dir: Path, loaded: LoadedRun, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    result = generate(run_dir, "--data", data, "--out", out, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    lines = lines_of(out)
    assert [line["id"] for line in lines] == [f"{data}:{n + 1}" for n in range(len(ROWS))]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [line["answer"] for line in lines[:5]] == [sample["after"] for sample in summary["samples"]]
    assert [line.get("label") for line in lines] == [*SOUNDS.values(), "meow", None, None, None]
    assert lines[6]["messages"] == [{"role": "user", "content": "What does the dog say?"}]
    assert lines[7]["messages"] == ROWS[7]["messages"]
    [greeted] = loaded.answer(
        [loaded.prompt(Conversation((Message("system", "Be brief."), Message("user", "Hello!"))))], max_new_tokens=8
    )
    assert lines[7]["answer"] == loaded.tokenizer.decode(greeted, skip_special_tokens=True)
    [told] = loaded.answer([loaded.encoder.text("The owl said")], max_new_tokens=8)
    assert (lines[8]["prompt"], lines[8]["answer"]) == ("The owl said", loaded.tokenizer.decode(told))
    right = [line["answer"].strip() == line["label"] for line in lines if "label" in line]
    written = json.loads((tmp_path / "answers.summary.json").read_text())
    assert written["is_complete"]
    assert written["scores"] == {"exact-match": sum(right) / len(right)}
    assert f"exact-match {sum(right) / len(right):.5g} of 6 rows" in result.stdout


def test_adapters_are_merged_where_answers_stay_the_same(run_dir: Path, loaded: LoadedRun) -> None:
    prompts = [loaded.prompt(Conversation((Message("user", animal),))) for animal in SOUNDS]
    merged, narrow = load_run(run_dir), load_run(run_dir, dtype=torch.bfloat16)
    assert merged.merge_adapters()
    assert not any("lora" in name for name, _ in merged.lm.named_parameters())
    expected = loaded.answer(prompts, max_new_tokens=20)
    assert merged.answer(prompts, max_new_tokens=20) == expected
    with loaded.lm.without_adapters():
        assert loaded.answer(prompts, max_new_tokens=20) != expected
    assert not narrow.merge_adapters()
    assert narrow.lm.adapters


def test_what_is_drawn_for_a_row_does_not_depend_on_its_batch(run_dir: Path, data: Path, tmp_path: Path) -> None:
    found = {}
    for name, options in {"1": ["--batch-size", 1], "4": ["--batch-size", 4], "other": ["--seed", 1]}.items():
        out = tmp_path / f"{name}.jsonl"
        result = generate(run_dir, "--data", data, "--out", out, "--temperature", "1.5", *options)
        assert result.exit_code == 0, result.output
        found[name] = out.read_text()
    assert found["1"] == found["4"] != found["other"]


def test_a_killed_command_goes_on_and_writes_the_same_file(run_dir: Path, tmp_path: Path) -> None:
    data, whole, killed = tmp_path / "many.jsonl", tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {n} + 1?"}) + "\n" for n in range(120)))
    options = ["--data", str(data), "--batch-size", "2", "--temperature", "1", "--max-new-tokens", "40"]
    command = [sys.executable, "-m", "sftx", "generate", str(run_dir), *options]
    process = subprocess.Popen([*command, "--out", str(killed)], stderr=subprocess.PIPE)
    while not (killed.exists() and killed.read_bytes().count(b"\n") > 20):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    content = killed.read_bytes()
    assert content.count(b"\n") < 120, "it was killed before its end"
    killed.write_bytes(content + b'{"id": "half a li')
    result = CliRunner().invoke(main, [*command[3:], "--out", str(killed)])
    assert result.exit_code == 0, result.output
    assert "rows of 120 written before" in result.stderr or "row of 120 written before" in result.stderr
    assert CliRunner().invoke(main, [*command[3:], "--out", str(whole)]).exit_code == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert killed.read_bytes().startswith(content), "what was written is not written again"


def test_a_file_of_other_options_is_not_gone_on_with(run_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert generate(run_dir, "--data", data, "--out", out).exit_code == 0
    before = out.read_text()
    assert generate(run_dir, "--data", data, "--out", out, "--batch-size", 3).exit_code == 0
    assert out.read_text() == before
    refused = generate(run_dir, "--data", data, "--out", out, "--seed", 4)
    assert refused.exit_code == 1
    assert "was begun with other options (seed: 0 then, 4 now)" in refused.stderr
    data.write_text(json.dumps(ROWS[0]) + "\n")
    refused = generate(run_dir, "--data", data, "--out", out)
    assert "was begun with other options (data: " in refused.stderr
    assert out.read_text() == before
    assert generate(run_dir, "--data", data, "--out", out, "--overwrite").exit_code == 0
    assert len(lines_of(out)) == 1
    (tmp_path / "answers.summary.json").unlink()
    refused = generate(run_dir, "--data", data, "--out", out)
    assert "exists already" in refused.stderr


def test_a_row_that_cannot_be_answered_is_listed(run_dir: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": "one " * 3000}, {"input_ids": [5, 6], "labels": [5, 6]}, {"prompt": "Hello!"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = generate(run_dir, "--data", data, "--out", out)
    assert result.exit_code == 0, result.output
    long, tokens, answered = lines_of(out)
    assert "tokens, and the model takes" in long["error"]
    assert tokens["error"] == "token ids have no prompt"
    assert "error" not in answered
    assert f"{data}:1: not answered: its prompt has " in result.stderr
    assert "1 of 3 rows answered" in result.stdout


def test_rows_and_answers_may_come_and_go_through_pipes(run_dir: Path, loaded: LoadedRun) -> None:
    result = generate(run_dir, "--data", "-", "--out", "-", "--stop", "zzz", input='{"prompt": "cat"}\n')
    assert result.exit_code == 0, result.output
    [line] = [json.loads(line) for line in result.stdout.splitlines()]
    [ids] = loaded.answer([loaded.prompt(Conversation((Message("user", "cat"),)))], max_new_tokens=8)
    assert line["id"] == "-:1"
    assert line["answer"] == loaded.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["--data", "missing.jsonl", "--out", "{dir}/a.jsonl"], "", "missing.jsonl: no such file"),
        (["--data", "-", "--out", "{dir}/a.jsonl"], "", "--data -: the input is empty"),
        (["--data", "-", "--out", "{dir}/a.jsonl"], '{"quest": 1}', "-:1: "),
        (["--data", "-", "--out", "{dir}/a.txt"], "", "name a file that ends in .jsonl"),
        (["--data", "-", "--out", "{dir}/none/a.jsonl"], "", "there is no directory"),
        (["--data", "-", "--data", "x.jsonl", "--out", "-"], "", "leave the other files out"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_read(
    run_dir: Path, tmp_path: Path, arguments: list[str], text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftx.cli.generate.loaded_model", None)
    result = generate(run_dir, *(argument.format(dir=tmp_path) for argument in arguments), input=text)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_answers_never_take_the_place_of_their_rows(run_dir: Path, data: Path, tmp_path: Path) -> None:
    before = data.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(data)
    for rows, out in ((data, data), (data, "link.jsonl"), (tmp_path, "new.jsonl"), (tmp_path / "*.jsonl", "new.jsonl")):
        refused = generate(run_dir, "--data", rows, "--out", tmp_path / out, "--overwrite")
        assert refused.exit_code == 1
        assert f"is or would be among the rows of --data {rows}; choose another place" in refused.stderr
    assert data.read_bytes() == before


def test_one_process_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    file, lines = AnswersFile(path).begin({"seed": 1}, overwrite=False)
    with file:
        assert not lines
        write_line(file, {"answer": "first"})
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="another process is writing it"):
                AnswersFile(path).begin({"seed": 1}, overwrite=overwrite)
    file, lines = AnswersFile(path).begin({"seed": 1}, overwrite=False)
    file.close()
    assert lines == [{"answer": "first"}]


def test_rows_that_cannot_be_answered(run_dir: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text('{"prompt": "\\ud800"}\n{"prompt": "Hello!"}\n')
    result = generate(run_dir, "--data", data, "--out", out)
    assert result.exit_code == 0, result.output
    first, second = lines_of(out)
    assert first == {"id": f"{data}:1", "error": "text holds a lone surrogate, which no tokenizer can read"}
    assert "answer" in second
    data.write_text('{"prompt": 5}\n')
    result = generate(run_dir, "--data", data, "--out", "-")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "rows.jsonl:1: its prompt is a number, expected a text or a list of messages" in result.stderr
