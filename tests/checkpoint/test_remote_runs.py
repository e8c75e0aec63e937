"""Runs whose directory is copied to a store: resumed on another machine, whatever fails or is killed."""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner, Result

import faulty_store
import killing
from faulty_store import FaultyStore
from killing import Case, Runs, case
from resuming import SHORT, Sftx
from sftx import ModelError, atomic_files, stores
from sftx.checkpoint import layout, uploading
from sftx.checkpoint.remote_runs import complete_checkpoints, local_copy
from sftx.checkpoint.uploading import Uploader, UploadError
from sftx.stores import RemoteDirectory
from sftx.verify.run_differences import differences

PLACE = "faulty://bucket/runs/x"
KEYS = frozenset({"artefact", "best_model_checkpoint"})
"""They have the run directory's own path."""


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    faulty_store.register()
    FaultyStore.reset()
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    for module, name in ((stores, "_DELAY_S"), (uploading, "_FIRST_PAUSE_S")):
        monkeypatch.setattr(module, name, 0.01)
    stores.refresh()
    yield
    FaultyStore.released.set()


def remote_names(under: str = "bucket/runs/x") -> list[str]:
    return [name.removeprefix(f"{under}/") for name in FaultyStore.names()]


def local_names(directory: Path) -> list[str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path.relative_to(directory).as_posix() for path in files)


def checkpoint(directory: Path, step: int, content: str = "weights") -> Path:
    """Write a checkpoint by hand."""
    path = directory / layout.CHECKPOINTS / f"step-{step}"
    with atomic_files.atomic_directory(path, checksums=True) as part:
        (part / "adapter_model.safetensors").write_text(f"{content} of {step}" * 50, encoding="utf-8")
        (part / layout.RUN_STATE).write_text('{"run": {"best_step": null}}', encoding="utf-8")
    return path


def written_run(directory: Path, *steps: int) -> Path:
    """Write a run directory by hand, with checkpoints."""
    directory.mkdir()
    (directory / layout.RUN).write_text("model: m\nplugins: {}\n", encoding="utf-8")
    for step in steps:
        checkpoint(directory, step)
    return directory


def complete(address: str = PLACE) -> list[int]:
    """Return the checkpoints that a reader of the store finds complete."""
    remote = RemoteDirectory(address)
    return list(complete_checkpoints(remote, remote.sizes()))


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- uploads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["raise", "tear", "truncate"])
def test_what_fails_is_tried_again_until_all_has_arrived(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = written_run(tmp_path / "run", 2, 4)
    seen: list[list[int]] = []

    def fail(number: int, place: str) -> str:
        seen.append(complete())
        return fault if number in (2, 5, 6, 9) else ""

    FaultyStore.fault = staticmethod(fail)
    uploader = Uploader(PLACE, limit=None)
    with caplog.at_level("INFO"):
        uploader.changed(directory, None)
        uploader.finish(30)
    assert remote_names() == local_names(directory)
    assert seen[-1] == [4], "the newest checkpoint comes first"
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1, "one line, until it works again"
    assert complete() == [2, 4]
    last = {step: max(n for n, place in enumerate(FaultyStore.writes) if f"step-{step}/" in place) for step in (2, 4)}
    assert all(FaultyStore.writes[n].endswith(atomic_files.CHECKSUMS) for n in last.values())


def test_an_older_checkpoint_goes_when_the_newer_one_is_complete(tmp_path: Path) -> None:
    directory = written_run(tmp_path / "run", 2)
    uploader = Uploader(PLACE, limit=1)
    uploader.changed(directory, None)
    until(lambda: complete() == [2] and uploader.busy is None)
    checkpoint(directory, 4)
    shutil.rmtree(directory / layout.CHECKPOINTS / "step-2")
    before: list[list[int]] = []
    FaultyStore.fault = staticmethod(lambda number, place: before.append(complete()) or "")
    uploader.changed(directory, None)
    uploader.finish(30)
    assert before == [[2]] * 3, "until the last file of step 4 is there"
    assert complete() == [4]
    assert not any("step-2" in name for name in remote_names())
    assert FaultyStore.removals[0].endswith("step-2/checksums.json"), "it is incomplete before it is gone"


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    directory = written_run(tmp_path / "run", 2, 4, 6)
    uploader = Uploader(PLACE, limit=1)
    uploader.changed(directory, 2)
    uploader.finish(30)
    assert complete() == [2, 6]


def test_a_checkpoint_that_is_removed_while_it_is_uploaded_leaves_no_part(tmp_path: Path) -> None:
    directory = written_run(tmp_path / "run", 2)

    def remove(number: int, place: str) -> str:
        if place.endswith(f"step-2/{layout.RUN_STATE}"):
            checkpoint(directory, 4)
            shutil.rmtree(directory / layout.CHECKPOINTS / "step-2")
        return ""

    FaultyStore.fault = staticmethod(remove)
    uploader = Uploader(PLACE, limit=1)
    uploader.changed(directory, None)
    uploader.finish(30)
    assert remote_names() == local_names(directory)


def test_the_summary_comes_after_the_last_checkpoint(tmp_path: Path) -> None:
    """A run that ends while an older checkpoint is uploaded is not complete in the store before its last one is."""
    directory = written_run(tmp_path / "run", 2)
    seen: list[list[int]] = []

    def end(number: int, place: str) -> str:
        if place.endswith(f"step-2/{layout.RUN_STATE}"):
            checkpoint(directory, 4)
            (directory / layout.SUMMARY).write_text("{}", encoding="utf-8")
        if place.endswith(layout.SUMMARY):
            seen.append(complete())
        return ""

    FaultyStore.fault = staticmethod(end)
    uploader = Uploader(PLACE, limit=None)
    uploader.changed(directory, None)
    until((directory / layout.SUMMARY).exists)
    uploader.finish(30)
    assert seen == [[2, 4]]
    assert remote_names() == local_names(directory)


def test_a_store_that_hangs_is_given_up_and_completed_later(tmp_path: Path) -> None:
    directory = written_run(tmp_path / "run", 2)
    before = local_names(directory)
    FaultyStore.fault = staticmethod(lambda number, place: "hang" if number == 3 else "")
    uploader = Uploader(PLACE, limit=None)
    uploader.changed(directory, None)
    until(lambda: uploader.busy == 2)
    with pytest.raises(UploadError, match="not uploaded: step-2") as caught:
        uploader.finish(0.2)
    assert f"nothing is lost in {directory}, and `sftx upload {directory} {PLACE}` uploads" in str(caught.value)
    assert "nothing moved for 0.2 s" in str(caught.value)
    assert caught.value.exit_code == 74
    assert complete() == []
    assert local_names(directory) == before
    FaultyStore.fault = staticmethod(lambda number, place: "")
    from sftx.cli import main

    result = CliRunner().invoke(main, ["upload", str(directory), PLACE], catch_exceptions=False)
    assert result.output == f"uploaded {directory} to {PLACE}\n"
    assert complete() == [2]
    assert remote_names() == before


def test_a_checkpoint_without_its_last_file_is_not_read(tmp_path: Path) -> None:
    directory = written_run(tmp_path / "run", 2, 4)
    uploader = Uploader(PLACE, limit=None)
    uploader.changed(directory, None)
    uploader.finish(30)
    store = fsspec.filesystem("faulty")
    for torn in (b"", b'{"adapter_model.safetensors": {"byt'):
        store.pipe_file("/bucket/runs/x/checkpoints/step-4/checksums.json", torn)
        assert complete() == [2]
    with pytest.raises(ModelError, match=r"no result yet; .*, or load its last checkpoint, .*/checkpoints/step-2$"):
        local_copy(PLACE)
    stores.refresh()
    with pytest.raises(ModelError, match="this checkpoint is not complete"):
        local_copy(f"{PLACE}/checkpoints/step-4")
    copied = local_copy(f"{PLACE}/checkpoints/step-2/")
    assert local_names(copied) == local_names(directory / "checkpoints" / "step-2")
    assert layout.run_of(copied) is not None


# --- whole runs -----------------------------------------------------------------------------------


def invoke(*arguments: str) -> Result:
    from sftx.cli import main

    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def with_rows_in_store(runs: Runs) -> Case:
    """Put the rows into the store; return the case that reads them there."""
    for path in runs.root.glob("*.jsonl"):
        fsspec.filesystem("faulty").pipe_file(f"/bucket/rows/{path.name}", path.read_bytes())
    return case("remote", " ".join(SHORT.arguments).replace("{data}", "faulty://bucket/rows"))


def test_a_run_goes_on_from_the_store_on_another_machine(
    runs: Runs, sftx: Sftx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the same bytes as one that stayed where it was."""
    from sftx.trainer.session import Session
    from sftx.trainer.trainer import Trainer

    undisturbed, _ = runs.undisturbed(SHORT)
    memory, remote = fsspec.filesystem("faulty"), with_rows_in_store(runs)
    sessions: list[Session] = []
    snapshots: list[dict[str, Any]] = []
    begin, train_step = Session.run, Trainer.train_step

    def remember(session: Session) -> Any:
        sessions.append(session)
        return begin(session)

    def step(trainer: Trainer, number: int, *rest: Any) -> Any:
        if number == 6 and not snapshots:  # the machine is lost here
            until(lambda: complete() == [4])
            snapshots.append({name: copy.copy(file.getvalue()) for name, file in FaultyStore.store.items()})
        return train_step(trainer, number, *rest)

    monkeypatch.setattr(Session, "run", remember)
    monkeypatch.setattr(Trainer, "train_step", step)
    there = runs.directory("there")
    result = sftx(remote, there, "--output-dir", PLACE)
    assert result.exit_code == 0, result.output
    assert f"uploaded to {PLACE}" in result.output
    assert not (there / "out").exists()
    first = sessions[0].writer.directory.path
    assert remote_names_of_run() == local_names(first)

    FaultyStore.reset()
    for name, content in snapshots[0].items():
        memory.pipe_file(name, content)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "another"))
    result = sftx(remote, runs.directory("another"), "--output-dir", PLACE)
    assert result.exit_code == 1
    assert f"{PLACE}: holds a run already, which is never written over; choose another, or go on" in result.output
    result = sftx(remote, runs.directory("another"), "--output-dir", PLACE, "--resume")
    assert result.exit_code == 0, result.output
    assert f"fetched from step 4 of {PLACE}" in result.output
    second = sessions[1].writer.directory.path
    assert second.is_relative_to(tmp_path / "another")
    assert differences(first, second, ignore=KEYS) == []
    unlike = differences(second, undisturbed, ignore=KEYS)  # its data has another name
    assert [one for one in unlike if ".safetensors" in one or "metrics" in one or "only in" in one] == []
    assert remote_names_of_run() == local_names(second)


def test_a_run_that_goes_on_from_its_last_checkpoint_uploads_its_result(runs: Runs, sftx: Sftx) -> None:
    there, elsewhere = runs.directory("there"), runs.directory("elsewhere")
    result = sftx(SHORT, there, "--upload-to", PLACE)
    assert result.exit_code == 0, result.output
    whole = remote_names()
    for name in whole:  # the machine was lost before these files were uploaded
        if name == layout.SUMMARY or name.startswith(f"{layout.ADAPTER}/"):
            FaultyStore.store.pop(f"/bucket/runs/x/{name}")
    result = sftx(SHORT, elsewhere, "--upload-to", PLACE, "--resume")
    assert result.exit_code == 0, result.output
    assert f"fetched from step 6 of {PLACE}" in result.output
    assert f"uploaded to {PLACE}" in result.output
    assert remote_names() == whole


@pytest.mark.slow
def test_a_complete_run_is_read_from_the_store(
    runs: Runs, sftx: Sftx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = runs.undisturbed(SHORT)
    remote = with_rows_in_store(runs)
    result = sftx(remote, runs.directory("there"), "--output-dir", PLACE)
    assert result.exit_code == 0, result.output

    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "third"))
    result = sftx(remote, runs.directory("third"), "--output-dir", PLACE, "--resume")
    assert "is complete, nothing is left to do" in result.output, result.output
    result = invoke("evaluate", PLACE, "--json")
    assert result.exit_code == 0, result.output
    loss = json.loads(result.stdout)["trained"]["loss"]
    assert loss == json.loads((undisturbed / layout.SUMMARY).read_text())["held_out"]["after"]["loss"]
    result = invoke("merge", PLACE)
    assert result.exit_code == 1
    assert "is a copy of what is in a store; say with --into" in result.output

    fsspec.filesystem("faulty").pipe_file("/bucket/rows/train.jsonl", (runs.root / "more.jsonl").read_bytes())
    FaultyStore.store.pop("/bucket/runs/x/summary.json")
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "fourth"))
    result = sftx(remote, runs.directory("fourth"), "--output-dir", PLACE, "--resume")
    assert result.exit_code == 1
    assert "was begun with another content of data" in result.output


def remote_names_of_run() -> list[str]:
    return [name for name in remote_names() if not name.startswith("bucket/rows/")]


def test_a_store_that_fails_ends_no_run(runs: Runs, sftx: Sftx) -> None:
    """The result is here, the exit code says that it is not there, and `sftx upload` mends it."""
    FaultyStore.fault = staticmethod(lambda number, place: "raise")
    directory = runs.directory("failing")
    result = sftx(SHORT, directory, "--upload-to", PLACE, "--upload-timeout", "0.3")
    out = directory / "out"
    assert result.exit_code == 74, result.output
    assert len(re.findall("cannot be written to: OSError: the store is not there; the run goes on", result.output)) == 1
    assert re.search(
        rf"error: {PLACE}: not uploaded: step-6, \d+ other files \(OSError: the store is not there\); nothing is lost "
        rf"in out, and `sftx upload out {PLACE}` uploads the rest",
        result.output,
    )
    ignored = [one for one in differences(out, runs.undisturbed(SHORT)[0]) if not one.startswith("run.yaml")]
    assert ignored == []
    FaultyStore.fault = staticmethod(lambda number, place: "")
    result = invoke("upload", "out")
    assert result.exit_code == 0, result.output
    assert remote_names() == local_names(out)
    result = sftx(SHORT, directory, "--upload-to", PLACE, "--resume")
    assert result.exit_code == 0, result.output
    assert "is complete, nothing is left to do" in result.output


def test_a_model_is_read_from_a_store_and_the_secret_of_an_address_is_in_no_file_of_a_run(
    runs: Runs, sftx: Sftx
) -> None:
    from web_server import serving

    directory, model = runs.directory("signed"), "faulty://bucket/models/tiny"
    for path in runs.model.iterdir():
        fsspec.filesystem("faulty").pipe_file(f"/bucket/models/tiny/{path.name}", path.read_bytes())
    secret = "0123456789abcdef0123456789abcdef"
    with serving(runs.root) as web:
        signed = f"{web.address}/train.jsonl?X-Amz-Signature={secret}"
        wanted = case("signed", " ".join(SHORT.arguments).replace("{data}/train.jsonl", signed))
        result = sftx(wanted, directory, "--max-steps", "2", "--model", model)
        assert result.exit_code == 0, result.output
        assert web.num_downloads("train.jsonl") == 1
    assert secret not in result.output
    texts = {path: path.read_bytes() for path in (directory / "out").rglob("*") if path.is_file()}
    assert [path for path, content in texts.items() if secret.encode() in content] == []
    assert b"train.jsonl?***" in texts[directory / "out" / layout.RUN]
    assert f"model: {model}\n".encode() in texts[directory / "out" / layout.RUN]


# --- processes that are killed --------------------------------------------------------------------


def work(command: list[str], directory: Path) -> None:
    """Run the command with a slow store, in a process of its own."""
    faulty_store.register()
    killing._work(command, directory)


def start(runs: Runs, directory: Path, *more: str) -> killing.Process:
    command = SHORT.command(runs.root, runs.model, *more)
    child = runs._context.Process(target=work, args=(command, directory), name="sftx-upload")
    child.start()
    return killing.Process(directory, child)


def killed_and_resumed(runs: Runs, directory: Path, step: int, delay: float) -> None:
    """Kill a run `delay` seconds after the upload of a step has begun, resume it elsewhere, and compare."""
    store = directory / "store"
    address = f"slow-disk://{store}"
    first, second = directory / "first", directory / "second"
    first.mkdir()
    second.mkdir()
    process = start(runs, first, "--upload-to", address)
    if process.until((store / "checkpoints" / f"step-{step}").exists):
        time.sleep(delay)
        process.signal(signal.SIGKILL)
    process.wait()
    faulty_store.register()
    steps = complete(address)
    resumed = start(runs, second, "--upload-to", address, "--resume")
    assert resumed.wait() == 0, resumed.printed
    if steps:
        assert f"fetched from step {steps[-1]}" in resumed.printed
    undisturbed = runs.undisturbed(SHORT)[0]
    for out in (second / "out", store):
        unlike = differences(out, undisturbed, ignore=KEYS)
        assert [one for one in unlike if not one.startswith("run.yaml")] == [], (step, delay)


def test_a_run_that_is_killed_in_an_upload_goes_on_from_what_is_complete(runs: Runs) -> None:
    killed_and_resumed(runs, runs.directory("killed"), step=4, delay=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_at_any_instant_of_an_upload(runs: Runs, number: int) -> None:
    killed_and_resumed(runs, runs.directory("killed"), step=(2, 4, 6)[number % 3], delay=0.05 * number**1.3)
