"""`--resume` with other options, without a run, of a complete run; and disks that are full or read-only."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from killing import Runs
from resuming import PACKED, PADDED, SHORT, Sftx, copy, interrupted, lines
from sftx.atomic_files import CHECKSUMS, sha256_of_file
from sftx.checkpoint.layout import RUN_STATE
from sftx.verify.run_differences import differences


@pytest.fixture(scope="module")
def stopped(runs: Runs) -> Path:
    """Return the directory of a run that is not complete."""
    directory = runs.directory("stopped")
    process = runs.start(PACKED, directory)
    process.until((directory / "out" / "checkpoints" / "step-4").exists)
    process.signal(signal.SIGKILL)
    process.wait()
    return directory / "out"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--learning-rate 1e-4", ("train.learning_rate was 0.001 and is 0.0001",)),
        ("--set packed.length=80", ("packed.length was 96 and is 80",)),
        ("--plugin lora", ("lora was added",)),
        ("--seed 1", ("train.seed was 42 and is 1",)),
        ("--train-batch-size 6 --gradient-accumulation-steps 3", ("train.train_batch_size", "4", "6")),
        ("--data {root}/more.jsonl", ("data.train",)),
    ],
)
def test_another_run_is_no_continuation(
    runs: Runs, sftx: Sftx, stopped: Path, change: str, named: tuple[str, ...]
) -> None:
    directory = copy(stopped, runs, "changed")
    before = {path: path.stat().st_mtime_ns for path in (directory / "out").rglob("*")}
    result = sftx(PACKED, directory, "--resume", *change.format(root=runs.root).split())
    assert result.exit_code == 1
    assert result.output.startswith("sftx: error: --resume: out ")
    assert all(part in result.output for part in named), result.output
    assert {path: path.stat().st_mtime_ns for path in (directory / "out").rglob("*")} == before, "nothing was touched"


def test_what_changes_no_weight_may_change(runs: Runs, sftx: Sftx) -> None:
    """A run that is resumed with other such options ends with the bytes of the one that was never stopped."""
    begun, end = interrupted(runs, sftx, SHORT, 4)
    for change, told in (
        ("--eval-steps 1", "train.eval_steps was 3 and is 1: the weights are the same"),
        (
            "--plugin exact-match --set generation.max_new_tokens=2 --num-samples 1",
            "generation.max_new_tokens was 256 and is 2; generation.num_samples was 3 and is 1; exact-match was added",
        ),
        (
            "--save-steps 1 --save-total-limit 3 --logging-steps 1 --num-proc 1 --max-dropped 0.5 --no-plugin progress",
            "",
        ),
        ("--per-device-eval-batch-size 3", "train.per_device_eval_batch_size was 16 and is 3"),
    ):
        directory = copy(begun / "out", runs, "may-change")
        result = sftx(SHORT, directory, "--resume", *change.split())
        assert result.exit_code == 0, result.output
        assert told in result.output
        assert "results may differ" not in result.output
        ours, theirs = (out / "adapter" / "adapter_model.safetensors" for out in (directory / "out", end))
        assert ours.read_bytes() == theirs.read_bytes(), change
        held_out = json.loads((directory / "out" / "summary.json").read_text())["held_out"]
        assert ("exact-match" in held_out["after"]) == ("exact-match" in change)
        assert "exact-match" not in held_out["before"]
        page = (directory / "out" / "report.html").read_text()
        recorded = json.loads((directory / "out" / "manifest.json").read_text())["plugins"]
        added = {line["plugin"]: line["since_step"] for line in recorded if "since_step" in line}
        assert added == ({"exact-match": 3} if "exact-match" in change else {})
        assert ("from step 3 on" in page) == bool(added)


def test_other_rows_of_the_same_name_are_refused(runs: Runs, sftx: Sftx, stopped: Path) -> None:
    directory, rows = copy(stopped, runs, "rows"), runs.root / "train.jsonl"
    content = rows.read_text()
    try:
        rows.write_text(content.replace("count", "number"))
        result = sftx(PACKED, directory, "--resume")
    finally:
        rows.write_text(content)
    assert result.exit_code == 1
    assert "--resume: out was begun with another content of data" in result.output


def test_the_rows_of_a_step_may_be_split_otherwise(runs: Runs, sftx: Sftx, stopped: Path) -> None:
    directory = copy(stopped, runs, "split")
    split = ("--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "4")
    result = sftx(PACKED, directory, "--resume", *split)
    assert result.exit_code == 0, result.output
    assert "the same but for rounding" in result.output
    ours, theirs = (lines(out / "metrics.jsonl") for out in (directory / "out", runs.undisturbed(PACKED)[0]))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine.get("num_label_tokens") == other.get("num_label_tokens")


def test_a_complete_run_is_left_as_it_is(runs: Runs, sftx: Sftx) -> None:
    directory = copy(runs.undisturbed(PACKED)[0], runs, "complete")
    before = {path: path.stat().st_mtime_ns for path in (directory / "out").rglob("*")}
    result = sftx(PACKED, directory, "--resume")
    assert result.exit_code == 0
    assert result.output == "out is complete, nothing is left to do\n"
    assert {path: path.stat().st_mtime_ns for path in (directory / "out").rglob("*")} == before


def test_where_there_is_no_run_it_begins_and_files_are_never_touched(runs: Runs, sftx: Sftx) -> None:
    directory = runs.directory("none")
    result = sftx(SHORT, directory, "--resume")
    assert result.exit_code == 0
    assert "--resume: there is no run in out yet; it begins" in result.output
    assert not differences(runs.undisturbed(SHORT)[0], directory / "out")
    other = runs.directory("files")
    (other / "out").mkdir()
    (other / "out" / "thesis.txt").write_text("years of work")
    result = sftx(SHORT, other, "--resume")
    assert result.exit_code == 1
    assert "--resume: out holds files and no run" in result.output
    assert [path.name for path in (other / "out").iterdir()] == ["thesis.txt"]


def test_the_run_file_that_a_run_wrote_goes_on_with_it(runs: Runs, sftx: Sftx, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.cli import main

    directory, end = interrupted(runs, sftx, SHORT, 4)
    monkeypatch.chdir(directory)
    result = CliRunner().invoke(main, ["run", "out/run.yaml", "--resume"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not differences(end, directory / "out")


def test_a_run_of_sftx_0_1_is_resumed(runs: Runs, sftx: Sftx) -> None:
    """0.1 named two counters otherwise, and recorded the rows of a step as two factors alone."""
    directory, end = interrupted(runs, sftx, SHORT, 4)
    out = directory / "out"
    (checkpoint,) = (out / "checkpoints").iterdir()
    state_file, checksums_file = checkpoint / RUN_STATE, checkpoint / CHECKSUMS
    state = json.loads(state_file.read_text())
    for name, old_name in (("num_label_tokens", "num_tokens"), ("num_input_tokens", "num_real_tokens")):
        state["run"][old_name] = state["run"].pop(name)
    state_file.write_text(json.dumps(state))
    checksums = json.loads(checksums_file.read_text())
    checksums[RUN_STATE] = {"bytes": state_file.stat().st_size, "sha256": sha256_of_file(state_file)}
    checksums_file.write_text(json.dumps(checksums))
    run_file = out / "run.yaml"
    values = yaml.safe_load(run_file.read_text())
    values["train"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    values["train"].pop("train_batch_size", None)
    run_file.write_text(yaml.safe_dump(values, sort_keys=False))
    result = sftx(SHORT, directory, "--resume")
    assert result.exit_code == 0, result.output
    found = differences(end, out)
    assert not [line for line in found if not line.startswith("run.yaml: ")]


def test_without_a_directory_the_newest_run_of_that_name_goes_on(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.cli import main

    monkeypatch.chdir(runs.directory("newest"))
    command = [part for part in SHORT.command(runs.root, runs.model) if part not in ("--output-dir", "out")]
    for number, more in ((1, []), (2, []), (2, ["--resume"])):
        result = CliRunner().invoke(main, [*command, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        if more:
            assert result.output == f"runs/train-{number} is complete, nothing is left to do\n"
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["train-1", "train-2"]


# --- disks --------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_costs_one_checkpoint_and_one_line(runs: Runs) -> None:
    """No file may exceed 50 kB after the second checkpoint, and some files of the next checkpoint do."""
    import resource

    directory = runs.directory("full")
    process = runs.start(PADDED, directory)
    process.until((directory / "out" / "checkpoints" / "step-2").exists)
    assert process.child.pid is not None
    resource.prlimit(process.child.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert process.wait() == 1, process.printed
    errors = [line for line in process.printed.splitlines() if "error" in line]
    assert len(errors) == 1, process.printed
    assert errors[0].startswith("sftx: error: out/checkpoints/step-")
    assert "cannot be written: " in errors[0]
    assert "make room, or keep fewer checkpoints with --save-total-limit" in errors[0]
    assert not list((directory / "out").rglob("*.part"))
    assert runs.start(PADDED, directory, "--resume").wait() == 0
    assert not differences(runs.undisturbed(PADDED)[0], directory / "out")


def test_a_place_that_cannot_be_written_is_told_before_training(runs: Runs, sftx: Sftx) -> None:
    result = sftx(SHORT, runs.directory("read-only"), "--output-dir", "/proc/sftx-run")
    assert result.exit_code == 1
    assert "output_dir /proc/sftx-run: cannot be written" in result.output
    assert "step 1" not in result.output
