"""Which directory a run gets, and what may differ when it is resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftx.checkpoint import run_directory
from sftx.checkpoint.run_directory import RunDirectory
from sftx.checkpoint.run_state import RunState
from sftx.config.loading import load
from sftx.config.options import OnResume, as_dict, effects_on_resume
from sftx.errors import ConfigError, OutputError


def resolved(**options: Any) -> dict[str, Any]:
    given = {"model": "m", "data.train": ["a.jsonl"], "lora.r": 16} | {
        n.replace("__", "."): v for n, v in options.items()
    }
    given = {name: value for name, value in given.items() if value is not None}
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


TABLE = [
    {"plugin": name, "stage": stage}
    for name, stage in (
        ("chatml", "template"), ("lora", "adapter"), ("dora", "adapter"), ("exact-match", "metric"),
        ("rouge", "metric"), ("wandb", "observer"), ("both", "metric"), ("both", "parser"),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train__learning_rate": 1e-3}, "train.learning_rate was 0.0002 and is 0.001"),
        ({"data__train": ["b.jsonl"]}, 'data.train was [{"path": "a.jsonl", "weight": 1.0, '),
        ({"lora__r": 4}, "lora.r was 16 and is 4"),
        ({"plugins": ["chatml", "lora", "dora"]}, "dora was added"),
        ({"plugins": ["chatml", "lora", "both"]}, "both was added"),
        ({"plugins": ["chatml"], "lora.r": None}, "lora was removed"),
        ({"train__per_device_train_batch_size": 4}, "train.train_batch_size was 8 and is 4"),
        ({"train__train_batch_size": 16}, "train.train_batch_size was 8 and is 16"),
        ({"train__seed": 1, "train__max_grad_norm": 3},
         "train.max_grad_norm was 1.0 and is 3.0; train.seed was 42 and is 1;"),
        ({"train__early_stopping_patience": 1, "train__eval_steps": 2},
         "train.early_stopping_patience was null and is 1; train.eval_steps was null and is 2, which decides the best"),
        ({"train__learning_rate": 1e-3, "plugins": ["chatml", "lora", "rouge"]}, "is 0.001; give the same"),
    ],
)  # fmt: skip
def test_another_run_does_not_go_on_here(begun: RunDirectory, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        begun.check_same(resolved(**options), TABLE)
    assert str(caught.value).startswith(f"--resume: {begun.path} was begun with other options: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, None),
        ({"train__save_steps": 5, "train__logging_steps": 1, "output_dir": "elsewhere", "data__num_proc": 2}, None),
        (
            {"train__save_total_limit": 3, "data__cache": False, "data__max_dropped": 0.5, "train__save_minutes": 1},
            None,
        ),
        ({"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 4}, "micro-batches"),
        ({"plugins": ["chatml", "lora", "wandb"]}, None),
        ({"plugins": ["wandb", "chatml", "lora"], "wandb__project": "p"}, None),
        ({"plugins": ["lora", "chatml"]}, None),
        ({"without": ["progress"]}, None),
        ({"plugins": ["chatml", "lora", "exact-match"]}, "exact-match was added: the weights are the same"),
        ({"train__eval_steps": 5}, "train.eval_steps was null and is 5: the weights are the same"),
        ({"generation__max_new_tokens": 5}, "generation.max_new_tokens was 256 and is 5: the weights are the same"),
        ({"generation__batch_size": 5}, "generation.batch_size was null and is 5: the results are the same but for"),
        ({"train__gradient_checkpointing": True}, "train.gradient_checkpointing was null and is true: the results"),
    ],
)
def test_what_computes_the_same_may_change(
    begun: RunDirectory, caplog: pytest.LogCaptureFixture, options: dict[str, Any], told: str | None
) -> None:
    begun.check_same(resolved(**options), TABLE)
    assert (told in caplog.text) if told is not None else not caplog.text


BEST = {"train__load_best_model_at_end": True, "train__eval_steps": 2}


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("loss", {"train__eval_steps": 3}, "train.eval_steps was 2 and is 3, which decides the best checkpoint"),
        ("loss", {"plugins": ["chatml", "lora", "rouge"], "generation__max_new_tokens": 4}, ""),
        ("exact-match", {"plugins": ["chatml", "lora", "rouge"]}, "rouge was added, which decides"),
        ("exact-match", {"generation__max_rows": 4}, "generation.max_rows was null and is 4, which decides"),
        ("exact-match", {"train__save_steps": 4, "plugins": ["chatml", "lora", "wandb"]}, ""),
    ],
)
def test_what_decides_the_best_checkpoint_may_not_change(
    begun: RunDirectory, metric: str, options: dict[str, Any], message: str
) -> None:
    """The result is then the best checkpoint's weights, or training ends after it."""
    best = {**BEST, "train__metric_for_best_model": metric}
    begun.write_start(resolved(**best), MANIFEST)
    if message:
        with pytest.raises(ConfigError) as caught:
            begun.check_same(resolved(**best | options), TABLE)
        assert message in str(caught.value)
    else:
        begun.check_same(resolved(**best | options), TABLE)


def test_the_order_of_adapters_matters_and_that_of_metrics_does_not(begun: RunDirectory) -> None:
    before = [{"plugin": name, "stage": stage} for name, stage in (("lora", "adapter"), ("dora", "adapter"))]
    metrics = [{"plugin": name, "stage": "metric"} for name in ("rouge", "exact-match")]
    both = {"plugins": ["chatml", "lora", "dora", "rouge", "exact-match"]}
    begun.write_start(resolved(**both), {**MANIFEST, "plugins": [*before, *metrics]})
    swapped = {"plugins": ["chatml", "dora", "lora", "exact-match", "rouge"]}
    begun.check_same(resolved(**swapped), [*before, *reversed(metrics)])
    with pytest.raises(ConfigError, match=r"the order of adapters was lora, dora and is dora, lora"):
        begun.check_same(resolved(**swapped), [*reversed(before), *metrics])


def test_an_option_that_is_newer_than_the_run_had_its_default(begun: RunDirectory) -> None:
    run_yaml = begun.file("run.yaml")
    values = yaml.safe_load(run_yaml.read_text())
    del values["train"]["embedding_learning_rate"], values["generation"]
    del values["data"]["train"][0]["limit"]
    run_yaml.write_text(yaml.safe_dump(values, sort_keys=False))
    begun.check_same(resolved(), TABLE)
    with pytest.raises(ConfigError, match=r"embedding_learning_rate was null and is 1\.0"):
        begun.check_same(resolved(train__embedding_learning_rate=1), TABLE)


def test_each_option_says_what_it_changes() -> None:
    """A new option is refused on --resume unless its declaration says otherwise; these are the ones that do."""
    effects = effects_on_resume()
    names = {effect: sorted(name for name, found in effects.items() if found is effect) for effect in OnResume}
    assert names[OnResume.EVALUATIONS] == ["train.eval_steps"]
    assert names[OnResume.ANSWERS] == ["generation.max_new_tokens", "generation.max_rows", "generation.num_samples"]
    assert names[OnResume.SPLIT] == ["train.gradient_accumulation_steps", "train.per_device_train_batch_size"]
    assert "train.learning_rate" not in effects
    assert not [name for name in effects if name.startswith("train.") and "rate" in name]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"name": "m", "sha256": "cc"}}, "content of model"),
        ({"data": [{"path": "a.jsonl", "fingerprint": "cc"}]}, "content of data"),
        ({"eval_data": [{"path": "b.jsonl", "fingerprint": "cc"}]}, "content of eval data"),
        ({"eval_split": {"num_held_out": 1, "sha256": "cc"}}, "content of eval split"),
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
    written = {names.get(k, k): v for k, v in STATE_OF_0_1.items()}
    now = json.loads(json.dumps(state.as_dict()))  # has what is newer than 0.1, too
    assert now["phase_seconds"] == {"other": written.pop("wall_seconds")}
    assert now["controls"]["early-stopping"]["num_worse"] == written.pop("num_worse")
    assert {name: now[name] for name in written} == written
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


def test_without_flock_a_file_beside_the_directory_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock  # noqa: F401  (it chooses its own way of locking now, with fcntl)

    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    first, second = (run_directory.new(str(tmp_path / "out"), "run") for _ in range(2))
    assert first.claim()
    assert not second.claim()
    assert list((tmp_path / "out").iterdir()) == []
    first.release()
    assert second.claim()
    second.release()
