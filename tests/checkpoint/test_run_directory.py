"""Which directory a run gets, and what may differ when it is resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftx.checkpoint import run_directory
from sftx.checkpoint.run_directory import RunDirectory
from sftx.checkpoint.run_state import RunState
from sftx.config.loading import load
from sftx.config.options import as_dict
from sftx.errors import ConfigError, OutputError


def resolved(**options: Any) -> dict[str, Any]:
    given = {"model": "m", "data.train": ["a.jsonl"], "lora.r": 16} | {
        n.replace("__", "."): v for n, v in options.items()
    }
    plugins = given.pop("plugins", ["chatml", "lora"])
    config = load(None, add=plugins, assignments=[(n, v, n) for n, v in given.items()]).config
    train = dataclasses.replace(config.train.resolve_batch_size(1), gradient_accumulation_steps=None)
    return as_dict(dataclasses.replace(config, train=train))


MANIFEST: dict[str, Any] = {
    "sftx": "0.1.0",
    "python": "3.11.7",
    "device": "cpu",
    "dtype": "float32",
    "libraries": {"torch": "2.13.0"},
    "plugins": [{"plugin": "lora", "stage": "adapter", "version": "0.1.0"}],
    "model": {"name": "m", "sha256": "aa"},
    "data": [{"path": "a.jsonl", "fingerprint": "bb"}],
    "eval_data": [],
}


@pytest.fixture
def begun(tmp_path: Path) -> RunDirectory:
    directory = run_directory.new(str(tmp_path / "out"), "run")
    assert directory.claim()
    directory.write_start(resolved(), MANIFEST)
    directory.release()
    return run_directory.resume(str(tmp_path / "out"), "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train__learning_rate": 1e-3}, r"train\.learning_rate 0\.0002.* 0\.001"),
        ({"data__train": ["b.jsonl"]}, r"data\.train .*a\.jsonl.*b\.jsonl"),
        ({"lora__r": 4}, r"plugins\.lora\.r 16.* 4"),
        (
            {"plugins": ["lora", "chatml"]},
            r'plugins \["chatml", "lora"\].*\["lora", "chatml"\]',
        ),
        ({"train__per_device_train_batch_size": 4}, r"train\.train_batch_size 8.* 4"),
        ({"train__train_batch_size": 16}, r"train\.train_batch_size 8.* 16"),
        ({"train__seed": 1, "train__max_steps": 3}, r"train\.max_steps null.* 3.* 1 more"),
    ],
)
def test_another_run_does_not_go_on_here(begun: RunDirectory, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        begun.check_same(resolved(**options), [])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, None),
        ({"train__save_steps": 5, "train__logging_steps": 1, "output_dir": "elsewhere", "data__num_proc": 2}, None),
        ({"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 4}, "micro-batches"),
        ({"plugins": ["chatml", "lora", "wandb"]}, None),
        ({"train__gradient_checkpointing": True}, "train.gradient_checkpointing"),
    ],
)
def test_what_computes_the_same_may_change(
    begun: RunDirectory, caplog: pytest.LogCaptureFixture, options: dict[str, Any], told: str | None
) -> None:
    begun.check_same(resolved(**options), [{"plugin": "wandb", "stage": "observer"}])
    assert (told in caplog.text) if told is not None else not caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"name": "m", "sha256": "cc"}}, "content of model"),
        ({"data": [{"path": "a.jsonl", "fingerprint": "cc"}]}, "content of data"),
        ({"eval_data": [{"path": "b.jsonl", "fingerprint": "cc"}]}, "content of eval data"),
    ],
)
def test_other_inputs_under_the_same_names_are_refused(
    begun: RunDirectory, changed: dict[str, Any], message: str
) -> None:
    begun.check_inputs(MANIFEST)
    with pytest.raises(ConfigError, match=message):
        begun.check_inputs(MANIFEST | changed)


def test_other_versions_are_told(begun: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    begun.check_inputs(MANIFEST | {"libraries": {"torch": "2.11.0"}})
    assert "torch 2.13.0 -> 2.11.0" in caplog.text


def test_a_directory_has_one_process_at_a_time(begun: RunDirectory) -> None:
    again = run_directory.resume(str(begun.path), "run")
    assert begun.claim()
    assert not again.claim()
    begun.release()
    assert again.claim()
    again.release()


def test_the_last_numbered_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_directory.resume(None, "demo").path == Path("runs/demo-1")
    for number in (1, 2):
        directory = run_directory.new(None, "demo")
        assert directory.path == Path(f"runs/demo-{number}")
        assert directory.claim()
        directory.write_start(resolved(), MANIFEST)
        directory.release()
    going_on = run_directory.resume(None, "demo")
    assert (going_on.path, going_on.resumed) == (Path("runs/demo-2"), True)
    assert going_on.finished() is None
    going_on.write_summary({"artefact": "runs/demo-2/adapter"})
    assert going_on.finished() is None, "what it came to is not there"
    Path("runs/demo-2/adapter").mkdir()
    done = going_on.finished()
    assert done is not None
    assert (done.output_dir, done.summary) == (Path("runs/demo-2"), {"artefact": "runs/demo-2/adapter"})
    shutil.rmtree("runs/demo-1")
    assert run_directory.resume(None, "demo").path == Path("runs/demo-2"), "a gap is none"
    assert run_directory.new(None, "demo").path == Path("runs/demo-3")


def test_files_of_others_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for choose in (run_directory.new, run_directory.resume):
        with pytest.raises(OutputError, match="files"):
            choose(str(tmp_path), "run")
    with pytest.raises(OutputError, match=r"letter\.txt"):
        run_directory.resume(str(tmp_path / "letter.txt"), "run")


def test_what_a_kill_left_is_no_obstacle(tmp_path: Path) -> None:
    """A process was killed between making the directory and writing run.yaml."""
    (tmp_path / ".run.yaml.part").write_text("mod")
    directory = run_directory.resume(str(tmp_path), "run")
    assert not directory.resumed
    assert directory.claim()
    directory.write_start(resolved(), MANIFEST)
    assert json.loads((tmp_path / "manifest.json").read_text()) == MANIFEST
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "manifest.json"}
    directory.release()


# --- directories of sftx 0.1 ----------------------------------------------------------------------

STATE_OF_0_1: dict[str, Any] = {
    "step": 4, "epoch": 0.5, "num_tokens": 120, "num_real_tokens": 200, "seconds": 1.5, "wall_seconds": 2.0,
    "first_loss": 6.0, "last_loss": 5.5, "peak_bytes": 7, "history": [{"loss": 6.0, "step": 1}],
    "before": {"step": 0, "metrics": {"loss": 6.1}, "samples": [], "seconds": 0.1, "token_losses": None},
    "latest": None, "best_step": None, "best_value": None, "num_worse": 0,
}  # fmt: skip


def test_counters_that_sftx_0_1_wrote_are_read_under_their_old_names() -> None:
    state = RunState.from_dict(STATE_OF_0_1)
    assert (state.num_label_tokens, state.num_input_tokens) == (120, 200)
    assert state.before is not None
    assert state.before.metrics == {"loss": 6.1}
    names = {"num_tokens": "num_label_tokens", "num_real_tokens": "num_input_tokens"}
    assert json.loads(json.dumps(state.as_dict())) == {names.get(k, k): v for k, v in STATE_OF_0_1.items()}
    assert RunState.from_dict(json.loads(json.dumps(state.as_dict()))) == state


def test_the_rows_per_step_of_sftx_0_1_are_the_product_of_its_options(begun: RunDirectory) -> None:
    assert begun.recorded_batch_size() == 8
    file = begun.file("run.yaml")
    values = yaml.safe_load(file.read_text())
    values["train"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    del values["train"]["train_batch_size"]
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    assert begun.recorded_batch_size() == 8
    begun.check_same(resolved(), [])
    del values["train"]["gradient_accumulation_steps"]
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(OutputError, match=r"run\.yaml"):
        begun.recorded_batch_size()


def test_a_run_that_sftx_0_1_completed_is_complete(begun: RunDirectory) -> None:
    (begun.path / "model").mkdir()
    begun.write_summary({"artefact": str(begun.path / "model"), "num_steps": 3, "num_tokens": 77})
    done = begun.finished()
    assert done is not None
    assert done.summary["num_label_tokens"] == 77
