"""`sftx report` compares several runs, and rejects directories without a run and files of another origin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from run_pages import Page, lines, sftx, step, write_run
from sftx.errors import ConfigError
from sftx.inspection.run_report import compare, plot
from sftx.inspection.run_report.run_record import RunRecord, read_run
from sftx.inspection.run_report.write_report import write_reports

# --- several runs -------------------------------------------------------------------------------


def test_a_difference_is_shown_without_what_is_the_same() -> None:
    def shown(*values: Any) -> list[str]:
        records = [RunRecord(path=Path("x"), config={"a": value}) for value in values]
        ((name, texts),) = compare.differing_options(records)
        assert name == "a"
        return texts

    assert shown(["q", "k", "v"], ["q", "k", "o", "u"]) == ["v, 2 that all have", "o, u, 2 that all have"]
    assert shown(["q", "k"], ["q", "k", "v"]) == ["2 that all have", "v, 2 that all have"]
    assert shown(["q", "k"], ["k", "q"]) == ["q, k", "k, q"]
    assert shown([1], []) == ["1", ""]
    assert shown("x" * 300 + "one", "x" * 300 + "two") == [f"... {'x' * 40}{end}" for end in ("one", "two")]
    assert shown("short one", "short two", 3) == ["short one", "short two", "3"]


def test_runs_lie_over_one_another_and_what_differs_is_told(tmp_path: Path) -> None:
    one = write_run(
        tmp_path / "x" / "same",
        config={"output_dir": "x", "plugins": {"chatml": {}, "lora": {"r": 8}}, "train": {"seed": 1, "lr": 0.1}},
        manifest={"libraries": {"torch": "2.11", "numpy": "2"}, "data": [{"path": "d", "fingerprint": "1"}]},
    )
    other = write_run(
        tmp_path / "y" / "same",
        metrics=lines([step(n) for n in range(1, 9)]),
        config={"output_dir": "y", "plugins": {"chatml": {}}, "train": {"seed": 1, "lr": 0.2}},
        manifest={"libraries": {"torch": "2.13", "numpy": "2"}, "data": [{"path": "d", "fingerprint": "2"}]},
    )
    done = sftx(one, other, "-o", tmp_path / "both.html")
    assert done.exit_code == 0, done.output
    data = Page(tmp_path / "both.html").data
    assert [run["name"] for run in data["runs"]] == ["x/same", "y/same"]
    assert [len(run["steps"]["step"]) for run in data["runs"]] == [4, 8]
    assert data["options"] == [
        ["plugins", ["chatml, lora", "chatml"]],
        ["plugins.lora.r", ["8", compare.NOT_SET]],
        ["train.lr", ["0.1", "0.2"]],
    ]
    assert data["versions"] == [["torch", ["2.11", "2.13"]], ["training data d", ["1", "2"]]]
    assert data["details"] is None
    assert (tmp_path / "both-loss.png").read_bytes().startswith(b"\x89PNG")


def test_names_have_as_many_parts_as_they_need() -> None:
    paths = [Path("/r/a/run"), Path("/r/b/run"), Path("/r/c")]
    assert compare.short_names(paths) == ["a/run", "b/run", "c"]


def test_the_average_is_not_pulled_to_the_first_value() -> None:
    assert plot.smooth([3.0, 3.0, 3.0], 10) == pytest.approx([3.0, 3.0, 3.0])
    assert plot.smooth([1.0, 2.0, 4.0], 1) == [1.0, 2.0, 4.0]
    first, second = plot.smooth([0.0, 1.0], 3)
    assert (first, second) == pytest.approx((0.0, 1 / 1.5)), "weights 1/2 and 1"


# --- the command --------------------------------------------------------------------------------


def test_the_command_refuses_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, said in (("empty", "holds no run"), ("file", "is a file"), ("nowhere", "no such directory")):
        with pytest.raises(ConfigError, match=said):
            read_run(tmp_path / name)
        done = sftx(tmp_path / name)
        assert done.exit_code == 1
        assert said in done.stderr
    run = write_run(tmp_path / "run")
    done = sftx(run, tmp_path / "run" / ".." / "run")
    assert done.exit_code == 2
    assert "named twice" in done.stderr
    assert sftx().exit_code == 2


def test_what_is_no_report_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / name) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert sftx(*runs).stdout.splitlines() == ["wrote report.html", "wrote loss.png"]
    again = ["wrote report.html, in place of the one before", "wrote loss.png, in place of the one before"]
    assert sftx(*runs).stdout.splitlines() == again, "its own files it writes again"
    for name in ("report.html", "loss.png"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text("mine")
        done = sftx(*runs)
        assert done.exit_code == 1
        assert f"{name}: holds something else" in done.stderr
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).write_bytes(kept)


@pytest.mark.parametrize("output", ["rows.jsonl", "rows.jsonl/report.html", "a/run.yaml"])
def test_a_place_that_is_no_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    run = write_run(tmp_path / "a")
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    done = sftx(run, "-o", output)
    assert done.exit_code == 1
    place = output.removesuffix("/report.html")
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"sftx: error: {place}: is no directory, and cannot be made one; name a directory")


def test_a_link_that_leads_back_to_itself_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    done = sftx(tmp_path / "loop", tmp_path)
    assert done.exit_code == 1
    assert "no such directory" in done.stderr


def test_without_matplotlib_the_page_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = write_run(tmp_path / "run")
    with caplog.at_level("INFO", logger="sftx"):
        write_reports(run)
    assert (run / "report.html").exists()
    assert not (run / "loss.png").exists()
    (line,) = [line for line in caplog.messages if "matplotlib" in line]
    assert "sftx[plot]" in line


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    code = f"import sys; from sftx.inspection.run_report.write_report import write_reports; from pathlib import Path\n\
write_reports(Path({str(run)!r})); sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
