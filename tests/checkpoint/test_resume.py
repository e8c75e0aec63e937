"""A run that is interrupted in whatever way and resumed ends like one that was not: bit for bit.

Processes are killed at random instants. A kill leaves what is on disk at that instant, so kills during a save are also
simulated one by one: the run directory is copied before each file operation, and each copy is resumed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from killing import Case, Runs
from resuming import (
    BEST,
    LLAMA3,
    PACKED,
    PADDED,
    SHORT,
    STREAMING,
    Sftx,
    checkpoints,
    copy,
    interrupted,
    lines,
    only_shared,
    signal_at,
)
from sftx.verify.run_differences import differences

SEED = int(os.environ.get("SFTX_KILL_SEED", time.time_ns() % 10**6))
"""The seed of the random instants: another one in every run of the tests, and printed where one fails."""


# --- killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(PACKED, id="packed"),
        pytest.param(PADDED, id="padded", marks=pytest.mark.slow),
        pytest.param(STREAMING, id="streaming", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_a_random_instant_ends_the_same(runs: Runs, wanted: Case) -> None:
    rng = random.Random(f"{SEED} {wanted.name}")
    killed = runs.killed(wanted, rng)
    assert killed.codes[-1] == 0, f"SFTX_KILL_SEED={SEED} {killed}"
    found = differences(runs.undisturbed(wanted)[0], killed.output_dir)
    assert not found, f"SFTX_KILL_SEED={SEED} {killed.story}: {found}"


def test_a_run_stopped_by_sigterm_ends_the_same_and_its_exit_code_says_so(runs: Runs) -> None:
    directory = runs.directory("sigterm")
    process = runs.start(PADDED, directory)
    metrics = directory / "out" / "metrics.jsonl"
    process.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 4)
    process.signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, process.printed
    done = lines(metrics)[-1]["step"]
    assert f"stopped by SIGTERM after step {done} of 12; saved out/checkpoints/step-{done};" in process.printed
    assert checkpoints(directory / "out")[-1] == f"step-{done}"
    assert runs.start(PADDED, directory, "--resume").wait() == 0
    assert not only_shared(runs.undisturbed(PADDED)[0], directory / "out")


@pytest.mark.slow
def test_the_command_itself_is_killed_while_it_saves_and_goes_on(runs: Runs) -> None:
    """The installed command in a process of its own gets kill -9."""
    directory = runs.directory("command")
    command = [str(Path(sys.executable).with_name("sftx")), *PACKED.command(runs.root, runs.model)]
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        part = directory / "out" / "checkpoints" / ".step-4.part"
        while process.poll() is None and not part.exists():
            time.sleep(0.0005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run([*command, "--resume"], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not differences(runs.undisturbed(PACKED)[0], directory / "out")


# --- every instant of saving --------------------------------------------------------------------


class Snapshots:
    """Copies of a run directory, taken before every file operation when it has changed since the last one."""

    EVENTS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.chmod"})

    def __init__(self, out: Path, into: Path) -> None:
        self.out, self.into = out, into
        self.taken: list[Path] = []
        self.is_on = False
        self._last: object = None
        sys.addaudithook(self._hook)  # for good: audit hooks cannot be removed

    def _hook(self, event: str, _: tuple[Any, ...]) -> None:
        if not self.is_on or event not in self.EVENTS:
            return
        self.is_on = False
        try:
            self._look()
        finally:
            self.is_on = True

    def _look(self) -> None:
        now = {str(p.relative_to(self.out)): (p.stat().st_ino, p.stat().st_size) for p in self.out.rglob("*")}
        if now != self._last:
            self._last = now
            self.taken.append(self.into / f"{len(self.taken)}")
            shutil.copytree(self.out, self.taken[-1] / "out")

    def chosen(self) -> list[Path]:
        """Return the first, middle and last of copies that differ only in how much of a new directory is written."""
        alike: list[list[Path]] = []
        last: object = None
        for snapshot in self.taken:
            files = [path for path in snapshot.rglob("*") if ".part" not in str(path.relative_to(snapshot))]
            now = [(str(path.relative_to(snapshot)), path.stat().st_size) for path in sorted(files)]
            if now != last:
                alike.append([])
            alike[-1].append(snapshot)
            last = now
        return [path for same in alike for path in dict.fromkeys((same[0], same[len(same) // 2], same[-1]))]


@pytest.mark.parametrize("every", [pytest.param(1, id="all", marks=pytest.mark.slow), pytest.param(5, id="some")])
def test_whatever_a_kill_leaves_of_saving_a_run_goes_on_from_it(
    every: int, runs: Runs, sftx: Sftx, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftx.trainer.session import Session

    directory, into = runs.directory("watched"), runs.directory("snapshots")
    snapshots = Snapshots(directory / "out", into)
    save, finish = Session.save, Session._finish

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(session: Session) -> Any:
            snapshots.is_on = session.state.step in (4, 6)
            try:
                return method(session)
            finally:
                snapshots.is_on = False

        return call

    monkeypatch.setattr(Session, "save", watched(save))
    monkeypatch.setattr(Session, "_finish", watched(finish))
    assert sftx(SHORT, directory).exit_code == 0
    monkeypatch.undo()
    undisturbed = runs.undisturbed(SHORT)[0]
    chosen = snapshots.chosen()
    assert len(chosen) > 15
    for snapshot in chosen[::every]:
        result = sftx(SHORT, snapshot, "--resume")
        assert result.exit_code == 0, f"{snapshot}: {result.output}"
        assert not differences(undisturbed, snapshot / "out"), f"{snapshot}: {result.output}"
        shutil.rmtree(snapshot)


# --- stopped ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "places"),
    [
        pytest.param(signal.SIGTERM, (1, 4, 9, 14), id="SIGTERM"),
        pytest.param(signal.SIGTERM, range(1, 1000), id="SIGTERM-everywhere", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, range(1, 1000, 7), id="SIGINT-everywhere", marks=pytest.mark.slow),
    ],
)
def test_wherever_a_signal_finds_a_run_no_step_is_half_done(
    number: signal.Signals, places: Sequence[int], runs: Runs, sftx: Sftx
) -> None:
    """The signal arrives at places where a run may stop: between micro-batches, and in evaluations."""
    undisturbed = runs.undisturbed(SHORT)[0]
    for place in places:
        directory = runs.directory("stopped")
        with signal_at(place, number) as passed:
            stopped = sftx(SHORT, directory)
        if passed() < place:
            assert stopped.exit_code == 0
            assert place > 12, "twelve micro-batches at least were passed"
            break
        assert stopped.exit_code == 128 + number, stopped.output
        metrics, out = directory / "out" / "metrics.jsonl", directory / "out"
        steps = [line["step"] for line in lines(metrics) if line["event"] == "step"] if metrics.exists() else []
        if steps:
            assert f"stopped by {number.name} after step {steps[-1]} of 6; saved {Path('out')}" in stopped.output
            assert checkpoints(out)[-1] == f"step-{steps[-1]}"
        else:
            assert f"stopped by {number.name} before a step" in stopped.output
            assert not out.exists()
        assert sftx(SHORT, directory, "--resume").exit_code == 0
        assert not only_shared(undisturbed, out), f"place {place}"


def test_a_signal_while_the_best_checkpoint_is_evaluated_loses_neither(runs: Runs, sftx: Sftx) -> None:
    """At that time the model has the weights of the best step, and the run's counters are those of the last step."""
    undisturbed = runs.directory("best-undisturbed")
    with signal_at(None, signal.SIGTERM) as passed:
        assert sftx(BEST, undisturbed).exit_code == 0
    summary = json.loads((undisturbed / "out" / "summary.json").read_text())
    assert summary["best"]["step"] < summary["num_steps"], "the best was the last, which proves nothing"
    for place in (passed(), passed() - 1):
        directory = runs.directory("best-stopped")
        with signal_at(place, signal.SIGTERM):
            assert sftx(BEST, directory).exit_code == 128 + signal.SIGTERM
        assert sftx(BEST, directory, "--resume").exit_code == 0
        assert not only_shared(undisturbed / "out", directory / "out")


def test_a_second_signal_ends_a_run_at_once_and_the_last_checkpoint_is_whole(runs: Runs) -> None:
    from sftx.atomic_files import find_damage

    directory = runs.directory("twice")
    process = runs.start(PADDED, directory)
    process.until((directory / "out" / "checkpoints" / "step-4").exists)
    process.signal(signal.SIGTERM)
    time.sleep(0.002)
    process.signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    newest = directory / "out" / "checkpoints" / checkpoints(directory / "out")[-1]
    assert find_damage(newest) is None
    assert runs.start(PADDED, directory, "--resume").wait() == 0
    assert not only_shared(runs.undisturbed(PADDED)[0], directory / "out")


# --- damaged ------------------------------------------------------------------------------------


def truncate(checkpoint: Path) -> str:
    os.truncate(checkpoint / "adapter_model.safetensors", 1000)
    return "adapter_model.safetensors has 1000 bytes"


def flip(checkpoint: Path) -> str:
    file = checkpoint / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "optimizer.safetensors has another SHA-256"


def lose(checkpoint: Path) -> str:
    (checkpoint / "run_state.json").unlink()
    return "run_state.json is missing"


def lose_checksums(checkpoint: Path) -> str:
    (checkpoint / "checksums.json").unlink()
    return "checksums.json is missing"


def garble_checksums(checkpoint: Path) -> str:
    (checkpoint / "checksums.json").write_text('{"run_state.json": ')
    return "it cannot be read"


@pytest.mark.parametrize(
    "harms",
    [
        pytest.param((flip, lose_checksums), id="some"),
        pytest.param((truncate, lose, garble_checksums), id="others", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    harms: Sequence[Callable[[Path], str]], runs: Runs, sftx: Sftx
) -> None:
    before, end = interrupted(runs, sftx, PADDED, 8)
    assert checkpoints(before / "out") == ["step-4", "step-6"]
    for harm in harms:
        directory = copy(before / "out", runs, harm.__name__)
        what = harm(directory / "out" / "checkpoints" / "step-6")
        result = sftx(PADDED, directory, "--resume")
        assert result.exit_code == 0, result.output
        assert f"step-6 is damaged and set aside: {what}" in result.output
        assert [line for line in lines(directory / "out" / "metrics.jsonl") if line["event"] == "step"][-1][
            "step"
        ] == 12
        found = differences(end, directory / "out")
        assert not [line for line in found if not line.startswith("checkpoints/step-6.damaged/")], harm.__name__


def test_when_every_checkpoint_is_damaged_the_run_begins_anew(runs: Runs, sftx: Sftx) -> None:
    directory, end = interrupted(runs, sftx, PADDED, 6)
    for place in checkpoints(directory / "out"):
        flip(directory / "out" / "checkpoints" / place)
    result = sftx(PADDED, directory, "--resume")
    assert result.exit_code == 0, result.output
    assert [f"step-{n} is damaged" in result.output for n in (2, 4)] == [True, True]
    found = differences(end, directory / "out")
    assert not [line for line in found if ".damaged/" not in line]


# --- what else is kept --------------------------------------------------------------------------


@pytest.mark.parametrize("every", [pytest.param(1, id="all", marks=pytest.mark.slow), pytest.param(4, id="some")])
def test_the_best_checkpoint_and_the_patience_of_early_stopping_outlive_an_interruption(
    every: int, runs: Runs, sftx: Sftx
) -> None:
    _, end = interrupted(runs, sftx, BEST, 1)
    summary = json.loads((end / "summary.json").read_text())
    best, last = summary["best"]["step"], summary["num_steps"]
    evaluations = {line["step"]: line["loss"] for line in lines(end / "metrics.jsonl") if line["event"] == "evaluate"}
    assert best == min((step for step in evaluations if step), key=lambda step: evaluations[step])
    assert 0 < best < last < 12, "neither the last step, nor all of them: this run stops early"
    assert f"step-{best}" in checkpoints(end)
    assert len(checkpoints(end)) == 2
    weights = "adapter_model.safetensors"
    assert (end / "adapter" / weights).read_bytes() == (end / "checkpoints" / f"step-{best}" / weights).read_bytes()
    for step in range(last, 1, -every):
        directory, _ = interrupted(runs, sftx, BEST, step)
        result = sftx(BEST, directory, "--resume")
        assert result.exit_code == 0, result.output
        assert not differences(end, directory / "out"), f"interrupted before step {step}"


OPTIONS = (
    (SHORT, "--optim lion --bf16"),
    (PACKED, "--optim muon --max-steps 6"),
    (LLAMA3, "--add-tokens"),
)
MORE_OPTIONS = (
    (SHORT, "--optim adafactor"),
    (SHORT, "--optim sgd --momentum 0.9"),
    (PACKED, "--optim adamw_bf16 --bf16 --max-steps 6"),
    (PACKED, "--fp16 --max-steps 6"),
    (SHORT, "--gradient-checkpointing"),
    (SHORT, "--set lora.modules_to_save=[lm_head,embed_tokens]"),
)


@pytest.mark.parametrize(
    ("wanted", "more"),
    [*OPTIONS, *(pytest.param(*options, marks=pytest.mark.slow) for options in MORE_OPTIONS)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_optimizer_and_precision_goes_on_where_it_was(runs: Runs, sftx: Sftx, wanted: Case, more: str) -> None:
    directory, end = interrupted(runs, sftx, wanted, 4, *more.split())
    assert sftx(wanted, directory, *more.split(), "--resume").exit_code == 0
    assert not differences(end, directory / "out")
