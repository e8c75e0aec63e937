"""`sftx data export` from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sftx.cli import main

ROW = '{"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "A"}]}\n'


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(ROW * 2, encoding="utf-8")


def sftx(*words: str) -> Result:
    return CliRunner().invoke(main, ["data", "export", *words])


def test_a_file_is_written_once_and_never_over() -> None:
    Path("b.csv").write_text("text\nT\n")
    first = sftx("--data", "a.jsonl:3", "--data", "b.csv", "--output", "new/out.jsonl")
    assert (first.exit_code, first.stdout) == (0, "")
    assert "3 of 3 rows" in first.stderr
    pair = {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "A"}]}
    text = Path("new/out.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == [pair, pair, {"text": "T"}]
    assert "你好" in text
    again = sftx("--data", "a.jsonl", "--output", "new/out.jsonl")
    assert again.exit_code == 1
    assert "--output new/out.jsonl: " in again.stderr
    assert Path("new/out.jsonl").read_text(encoding="utf-8") == text
    assert [path.name for path in Path("new").iterdir()] == ["out.jsonl"]


def test_the_terminal_gets_the_lines_and_nothing_else() -> None:
    done = sftx("--data", "a.jsonl", "--set", "data.filters.duplicates=drop", "--output", "-")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 1
    filtered, written = done.stderr.splitlines()
    assert filtered.startswith("1 of 2 rows filtered: ")
    assert "a.jsonl:2" in filtered
    assert written.startswith("1 of 2 rows ")


def test_rows_that_train_nothing_are_left_out_with_their_reasons() -> None:
    rows = [
        {"messages": []},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": " "}]},
        {"messages": [{"role": "user", "content": "Q"}]},
        {"prompt": "Q", "completion": ""},
        {"text": ""},
    ]
    Path("b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("c.jsonl").write_text(ROW * 100, encoding="utf-8")
    done = sftx("--data", "b.jsonl", "--data", "c.jsonl", "--output", "out.jsonl")
    assert done.exit_code == 0
    assert len(Path("out.jsonl").read_text(encoding="utf-8").splitlines()) == 100
    *reasons, written = done.stderr.splitlines()
    assert written == "100 of 105 rows written to out.jsonl"
    assert "2 of 105 rows dropped: every trained turn is empty (first: b.jsonl:2)" in reasons
    assert sum(int(reason.split()[0]) for reason in reasons) == 5
    too_many = sftx("--data", "b.jsonl", "--data", "a.jsonl", "--output", "none.jsonl")
    assert (too_many.exit_code, Path("none.jsonl").exists()) == (1, False)
    assert "more than data.max_dropped" in too_many.stderr


def test_a_filter_that_counts_tokens_is_said_not_to_apply() -> None:
    done = sftx("--data", "a.jsonl", "--set", "data.filters.max_length=5", "--output", "-")
    assert "filters.min_length" in done.stderr.splitlines()[0]
    assert "max_length" in done.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none.jsonl", "--output", "x.jsonl"], "none.jsonl: "),
        (["--data", "a.jsonl", "--output", "x.parquet"], ".jsonl"),
        (["--data", "a.jsonl", "--output", "a.jsonl/x.jsonl"], "a.jsonl/x.jsonl: "),
        (["--data", "a.jsonl", "--format", "alpca", "--output", "x.jsonl"], "'alpaca'"),
        (["--data", "bad.jsonl", "--output", "x.jsonl"], "bad.jsonl:2: "),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_nothing(words: list[str], message: str) -> None:
    Path("bad.jsonl").write_text(ROW + "{", encoding="utf-8")
    done = sftx(*words)
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in Path().iterdir()) == ["a.jsonl", "bad.jsonl"]


def test_an_export_needs_no_torch() -> None:
    script = (
        "import sys\nfrom sftx.cli import main\n"
        "main(['data', 'export', '--data', 'a.jsonl', '--output', '-'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_pattern_of_files_in_another_encoding_is_read_with_a_line_that_says_what_was_taken() -> None:
    Path("parts").mkdir()
    Path("parts/1.csv").write_text("prompt;completion\nÜber?;Ja, über\n", encoding="cp1252")
    Path("parts/2.TSV").write_text("prompt\tcompletion\nGröße?\tgroß\n", encoding="cp1252")
    done = sftx("--data", "parts/*", "--encoding", "cp1252", "--output", "-")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (0, "2 of 2 rows written to -")
    answers = [json.loads(line)["messages"][-1]["content"] for line in done.stdout.splitlines()]
    assert answers == ["Ja, über", "groß"]
    wrong = sftx("--data", "parts/*", "--output", "-")
    assert wrong.stderr.splitlines()[-1].startswith("sftx: error: parts/1.csv:2: is not UTF-8: ")
    assert "--encoding cp1252" in wrong.stderr
    for name in ("cp12522", "undefined"):  # the second is a codec of Python that always fails
        unknown = sftx("--data", "parts/*", "--encoding", name, "--output", "-")
        assert f"option 'data.encoding': got \"{name}\", expected an encoding of text" in unknown.stderr
    unquoted = sftx("--data", "parts/1.csv", "parts/2.TSV", "--output", "-")
    assert "quote the pattern" in unquoted.stderr
