"""The plugin `wandb`: its offline files as W&B's own messages; no test contacts a server."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from observing import (
    HOSTILE,
    SAVED,
    STEPS,
    STOPPED,
    InterruptedRunError,
    logged,
    play,
    stop_in,
    train,
    wandb_files,
    wandb_records,
)
from sftx.assembly.registry import activate
from sftx.config.loading import load
from sftx.errors import ConfigError
from sftx_plugins.observers.wandb import WeightsAndBiases


@pytest.fixture(scope="module", autouse=True)
def _no_key_and_no_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Hide the user's key, settings and directories from the tests."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        for name in ("CONFIG", "CACHE", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))
        yield home


def kept(path: Path, kind: str) -> list[Any]:
    return [getattr(record, kind) for record in wandb_records(path) if record.WhichOneof("record_type") == kind]


def values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def rows(path: Path) -> list[dict[str, Any]]:
    return [values(record.item) for record in kept(path, "history")]


def history(paths: Sequence[Path], name: str) -> dict[int, float]:
    """Return values by step. A repeated step must have the same value, and each file has it once."""
    found: dict[int, float] = {}
    for path in paths:
        steps = [row["_step"] for row in rows(path)]
        assert steps == sorted(set(steps))
        for row in rows(path):
            if name in row:
                assert found.setdefault(row["_step"], row[name]) == row[name]
                assert row["train/global_step"] == row["_step"]
    return found


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that is interrupted two steps after a checkpoint and then resumed."""
    directory = tmp_path_factory.mktemp("wandb")
    patch = stop_in(STOPPED, InterruptedRunError())
    with pytest.raises(InterruptedRunError):
        train("wandb", directory, wandb__tags=["a", "b"])
    patch.undo()
    train("wandb", directory, resume=True, wandb__tags=["a", "b"])
    return directory / "run"


def test_every_step_and_evaluation_is_there(run_directory: Path) -> None:
    files = wandb_files(run_directory)
    assert [[row["_step"] for row in rows(file)] for file in files] == [
        list(range(STOPPED)),
        list(range(SAVED + 1, STEPS + 1)),
    ]
    for name in ("loss", "grad_norm", "learning_rate", "epoch", "num_label_tokens"):
        assert history(files, f"train/{name}") == logged(run_directory, "step", name)
    for name in ("loss", "exact-match"):
        expected = logged(run_directory, "evaluate", name)
        assert list(expected) == [0, SAVED, STEPS]
        assert history(files, f"eval/{name}") == expected


def test_both_processes_write_one_run_and_their_exit_codes(run_directory: Path) -> None:
    begun = [kept(file, "run")[0] for file in wandb_files(run_directory)]
    ended = [kept(file, "exit")[-1].exit_code for file in wandb_files(run_directory)]
    assert {run.run_id for run in begun} == {(run_directory / "wandb-run-id.txt").read_text().strip()}
    assert {(run.project, run.display_name, tuple(run.tags)) for run in begun} == {("sftx", "run", ("a", "b"))}
    assert ended == [1, 0]


def test_answers_options_table_and_result_are_there(run_directory: Path) -> None:
    last = wandb_files(run_directory)[-1]
    config = values(kept(last, "run")[0].config.update)
    assert config["train"]["learning_rate"] == 1e-2
    assert config["derived"]["num_trainable"] > 0
    assert {"lora", "wandb"} <= {row["plugin"] for row in config["assembled"]}
    summary = {key: value for record in kept(last, "summary") for key, value in values(record.update).items()}
    assert summary["summary/artefact"] == str(run_directory / "adapter")
    (table,) = (row for row in rows(last) if "eval/samples/path" in row)
    place = last.parent / "files" / table["eval/samples/path"]
    shown = json.loads(place.read_text(encoding="utf-8"))
    assert shown["columns"] == ["row", "prompt", "reference", "prediction"]
    expected = json.loads((run_directory / "summary.json").read_text(encoding="utf-8"))["samples"]
    assert [(row[0], row[3]) for row in shown["data"]] == [(sample["row"], sample["after"]) for sample in expected]


def test_neither_console_nor_code_nor_git_is_captured(run_directory: Path) -> None:
    for file in wandb_files(run_directory):
        assert not kept(file, "output")
        assert not kept(file, "output_raw")
        assert not kept(file, "run")[0].git.ByteSize()
        assert not list(file.parent.glob("files/**/*.py"))


@pytest.mark.slow
def test_a_killed_process_has_written_what_it_reported(tmp_path: Path) -> None:
    """Except for its last row, if no checkpoint has committed that step, and reports of the last moment."""
    script = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom observing import *\n"
        "def look():\n    time.sleep(1)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "stop_in(STOPPED, KeyboardInterrupt(), look)\ntrain('wandb', Path(sys.argv[1]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, check=False, stdout=subprocess.DEVNULL
    )
    assert done.returncode == -signal.SIGKILL
    found = history(wandb_files(tmp_path / "run"), "train/loss")
    assert found.items() <= logged(tmp_path / "run", "step", "loss").items()
    assert list(range(1, SAVED + 1)) == list(found)[:SAVED]


def test_any_name_and_text_is_written(tmp_path: Path) -> None:
    def change(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in ("on_step", "on_log"):
            return (dataclasses.replace(arguments[0], metrics={HOSTILE: 0.5, "a.b": 0.25}),)
        if name == "on_evaluate":
            sample = dataclasses.replace(arguments[0].samples[0], prediction=HOSTILE)
            return (dataclasses.replace(arguments[0], metrics={HOSTILE: 0.5}, samples=(sample,)),)
        return arguments

    files = wandb_files(play(WeightsAndBiases(), tmp_path, change).output_dir)
    shown = HOSTILE.replace("\ud800", "?")
    assert history(files, f"train/{shown}") == {1: 0.5, 2: 0.5}
    assert history(files, f"eval/{shown}") == {0: 0.5, 1: 0.5, 2: 0.5}
    assert history(files, "train/a.b") == {1: 0.25, 2: 0.25}


def test_disabled_it_writes_nothing(tmp_path: Path) -> None:
    info = play(WeightsAndBiases(mode="disabled"), tmp_path, lambda name, arguments: arguments)
    assert not (info.output_dir / "wandb").exists()


def test_online_without_a_key_is_an_error_without_a_prompt(tmp_path: Path) -> None:
    given = [("wandb.mode", "online", "--set wandb.mode=online")]
    assembly = activate(load(None, add=["chatml", "wandb"], assignments=given))
    with pytest.raises(ConfigError, match=r"^plugin 'wandb' .*: .*online.*wandb login"):
        assembly.observers()


def test_with_a_key_it_goes_online_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    from sftx_plugins.observers.wandb import _mode

    monkeypatch.setattr(wandb, "login", lambda **given: given == {"prompt": False, "verify": False})
    assert _mode(wandb, None) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert _mode(wandb, None) == "offline"
    assert _mode(wandb, "online") == "online"


def test_a_missing_library_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assembly = activate(load(None, add=["chatml", "wandb"], assignments=[]))
    with pytest.raises(ConfigError, match=r"^plugin 'wandb' .*: .*wandb.*pip install 'sftx\[wandb\]'"):
        assembly.observers()


def test_an_unknown_mode_is_refused() -> None:
    given = [("wandb.mode", "sideways", "--set wandb.mode=sideways")]
    with pytest.raises(ConfigError, match=r"wandb\.mode.*offline"):
        activate(load(None, add=["chatml", "wandb"], assignments=given))
