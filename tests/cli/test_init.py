"""`sftx init`: five questions or options, and a run file that is planned to fit, trains, and says why."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sftx.config import run_file
from sftx.inspection.first_run import sampled_rows
from sftx.model import names

TIMER = {"prompt": "Set a timer for tea, please: {n} minutes.", "completion": "{n}"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
KINDS: dict[str, dict[str, Any]] = {
    "chat": TIMER,
    "tools": {"messages": [{"role": "user", "content": "call f {n}"}, CALL], "tools": [TOOL]},
    "pairs": {"prompt": "Name a tree ({n}).", "chosen": "An oak.", "rejected": "There are many trees."},
    "ranking": {"instruction": "Name a river ({n}).", "input": "", "output": ["The Nile.", "It depends."]},
    "labelled": {"prompt": "Name a fish ({n}).", "completion": "A trout.", "label": True},
    "text": {"text": "Rain fell on the roof all day long, and the river rose by {n} inches. " * 5},
}


@pytest.fixture(autouse=True)
def _in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(kind: str, num: int = 40) -> None:
    row = json.dumps(KINDS[kind])
    text = "".join(row.replace("{n}", str(n)) + "\n" for n in range(num))
    Path("rows.jsonl").write_text(text, encoding="utf-8")


def sftx(*arguments: str, answers: str | None = None) -> Result:
    from sftx.cli import main

    return CliRunner().invoke(main, list(arguments), input=answers, catch_exceptions=False)


def init(*arguments: str, answers: str | None = None) -> dict[str, Any]:
    done = sftx("init", "--model", "sftx:tiny", *arguments, answers=answers)
    assert done.exit_code == 0, done.output
    return run_file.read(Path("run.yaml"))[0]


def test_the_run_file_says_why_each_option_has_its_value() -> None:
    write_rows("chat")
    done = sftx("init", "--model", "sftx:tiny", "--data", "rows.jsonl", "--gpu", "cpu")
    assert done.exit_code == 0, done.output
    assert [line.split("#")[0].strip() for line in done.stdout.splitlines()[-2:]] == [
        "sftx inspect run.yaml", "sftx run run.yaml",
    ]  # fmt: skip
    values, origins = run_file.read(Path("run.yaml"))
    assert list(values["plugins"]) == ["chatml", "lora", "exact-match"]
    assert values["data"]["eval_fraction"] == 0.1
    assert values["train"]["train_batch_size"] == values["train"]["per_device_train_batch_size"] == 8
    lines = Path("run.yaml").read_text(encoding="utf-8").splitlines()
    for name in [*(f"train.{name}" for name in values["train"]), *(f"plugins.{name}" for name in values["plugins"])]:
        number = int(origins.of(name).rpartition(":")[2])
        assert lines[number - 2].strip().startswith("# "), f"{name} has no reason above it"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_file_trains(kind: str) -> None:
    write_rows(kind)
    init("--data", "rows.jsonl", "--yes")
    assert sftx("plan", "run.yaml", "--gpu", "24GB").exit_code == 0
    assert sftx("inspect", "run.yaml").exit_code == 0
    trained = sftx("run", "run.yaml", "--max-steps", "2")
    assert trained.exit_code == 0, trained.output
    assert "step 2/2" in trained.stdout


@pytest.mark.parametrize(
    ("kind", "arguments", "plugins"),
    [
        ("pairs", ["--gpu", "24GB"], ["chatml", "lora", "dpo", "packed", "exact-match"]),
        pytest.param("text", [], ["lora", "packed"], marks=pytest.mark.slow),
        ("chat", ["--for", "grpo"], ["chatml", "lora", "grpo", "reward-exact-match", "exact-match"]),
        pytest.param("tools", ["--gpu", "h100"], ["chatml", "lora", "packed"], marks=pytest.mark.slow),
    ],
)
def test_plugins_are_chosen_by_the_rows(kind: str, arguments: list[str], plugins: list[str]) -> None:
    write_rows(kind)
    values = init("--data", "rows.jsonl", "--yes", *arguments)
    assert [name for name in values["plugins"] if name != "json-valid"] == plugins
    assert sftx("run", "run.yaml", "--dry-run").exit_code == 0


@pytest.mark.parametrize(
    ("row", "kind"),
    [("chat", "chat"), ("pairs", "pairs"), ("ranking", "pairs"), ("labelled", "labelled"), ("text", "text")],
)
def test_what_the_rows_are_for(row: str, kind: str) -> None:
    write_rows(row, 3000)
    rows = sampled_rows.look_at(["rows.jsonl"])
    assert (rows.kind, rows.num_rows, rows.is_complete, rows.num_invalid) == (kind, 3000, True, 0)
    lines = [where.number for where, _ in rows.parsed]
    assert 400 <= len(lines) <= 800
    assert {after - before for before, after in itertools.pairwise(lines)} == {4}, "evenly spread"


@pytest.mark.slow
def test_the_most_rows_that_fit_are_computed_at_once() -> None:
    row = {"prompt": "word " * 150, "completion": "word " * 50}
    Path("rows.jsonl").write_text((json.dumps(row) + "\n") * 40, encoding="utf-8")
    train = init("--data", "rows.jsonl", "--gpu", "0.86GB", "--yes")["train"]
    assert train.get("gradient_checkpointing") or train["per_device_train_batch_size"] < train["train_batch_size"]
    assert sftx("plan", "run.yaml", "--gpu", "0.86GB").exit_code == 0
    failed = sftx("init", "other.yaml", "--model", "sftx:tiny", "--data", "rows.jsonl", "--gpu", "0.8GB")
    assert failed.exit_code == 1
    assert re.search(r"does not fit: one row of \d+ tokens with qlora needs 0\.8 GB", failed.stderr)
    assert not Path("other.yaml").exists()


def test_five_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows("chat")
    monkeypatch.setattr("sftx.cli.init._is_terminal", lambda: True)
    answers = ["sftx:tiny", "nowhere.jsonl", "rows.jsonl", "2 apples", "24GB", "dpo", "", "results"]
    done = sftx("init", answers="\n".join(answers) + "\n")
    assert done.exit_code == 0, done.output
    for said in ("1/5  Model", "2/5  Data", "nowhere.jsonl: no such file", "40 rows: conversations", "3/5  GPU"):
        assert said in done.stderr
    assert "--gpu '2 apples': expected a GPU's memory" in done.stderr
    assert "is for sft or grpo" in done.stderr
    values, _ = run_file.read(Path("run.yaml"))
    assert (values["model"], values["output_dir"]) == ("sftx:tiny", "results")
    assert "dpo" not in values["plugins"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "--data is missing: name the file of your rows"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (
            ["--data", "odd.jsonl"],
            "no format reads this row; tried were preference, messages, prompt-completion",
        ),
        (["--data", "rows.jsonl", "--for", "dpo"], "rows: conversations (format prompt-completion) is for sft or grpo"),
        (["--data", "rows.jsonl", "--model", "./nothing"], "model ./nothing: no such directory"),
        (["--data", "rows.jsonl", "--gpu", "big"], "--gpu 'big': expected a GPU's memory"),
        (["taken.yaml", "--data", "rows.jsonl"], "taken.yaml: exists already; give another name, or --overwrite"),
        (["odd.jsonl/run.yaml", "--data", "rows.jsonl"], "odd.jsonl is no directory that you may write into"),
        (["run.txt", "--data", "rows.jsonl"], "give it a name that ends in .yaml"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(arguments: list[str], error: str) -> None:
    write_rows("chat", 3)
    Path("odd.jsonl").write_text('{"question": "a", "reply": "b"}\n', encoding="utf-8")
    Path("taken.yaml").write_text("mine", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    done = sftx("init", *arguments)
    assert done.exit_code in (1, 2)
    assert error in " ".join(done.stderr.split())
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_the_template_is_the_one_that_writes_what_the_models_own_does() -> None:
    from sftx.inspection.first_run.proposal import Chooser
    from sftx.inspection.memory_plan.target_device import CPU
    from sftx.model.load import load_tokenizer

    write_rows("chat", 3)
    rows = sampled_rows.look_at(["rows.jsonl"])
    chatml = load_tokenizer(names.resolve(names.TINY_MODEL)).chat_template

    def templates(own: str | None) -> list[str]:
        tokenizer = load_tokenizer(names.resolve(names.TINY_MODEL))
        tokenizer.chat_template = own
        return [name for name, _, _ in Chooser(names.TINY_MODEL, rows, CPU, "sft")._templates(tokenizer)]

    assert templates(chatml)[:2] == ["chatml", "tokenizer"]
    assert templates("{{ messages[0].content }}")[0] == "tokenizer"
    assert templates(None)[0] == "chatml"
