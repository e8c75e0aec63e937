"""The plugin `mlflow`: its runs as MLflow's own client reads them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from observing import HOSTILE, SAVED, STEPS, STOPPED, InterruptedRunError, logged, play, stop_in, train
from sftx.assembly.registry import activate
from sftx.config.loading import load
from sftx.distributed.signals import Stop
from sftx.errors import ConfigError
from sftx.events import RunInfo
from sftx_plugins.observers.mlflow import MLflow


@pytest.fixture(scope="module", autouse=True)
def _files_and_silence() -> Iterator[None]:
    """Allow the client to read files, and let no test send telemetry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield


def read(run_directory: Path) -> tuple[Any, Any]:
    """Return a client of the files in the run directory, and their only run."""
    from mlflow import MlflowClient

    client = MlflowClient(str(run_directory / "mlruns"))
    experiment = client.get_experiment_by_name("sftx")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def history(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that is interrupted two steps after a checkpoint and then resumed."""
    directory = tmp_path_factory.mktemp("mlflow")
    out = directory / "run"

    def look() -> None:
        client, run = read(out)
        assert run.info.status == "RUNNING"
        assert history(client, run, "train/loss") == list(logged(out, "step", "loss").items())

    patch = stop_in(STOPPED, InterruptedRunError(), look)
    with pytest.raises(InterruptedRunError):
        train("mlflow", directory)
    patch.undo()
    assert read(out)[1].info.status == "FAILED"
    train("mlflow", directory, resume=True)
    return out


def test_every_step_and_evaluation_is_there_once(run_directory: Path) -> None:
    client, run = read(run_directory)
    assert run.info.status == "FINISHED"
    for name in ("loss", "grad_norm", "learning_rate", "epoch", "num_label_tokens"):
        expected = logged(run_directory, "step", name)
        assert list(expected) == list(range(1, STEPS + 1))
        assert history(client, run, f"train/{name}") == list(expected.items())
    for name in ("loss", "exact-match"):
        expected = logged(run_directory, "evaluate", name)
        assert list(expected) == [0, SAVED, STEPS]
        assert history(client, run, f"eval/{name}") == list(expected.items())


def test_answers_options_table_and_result_are_there(run_directory: Path) -> None:
    client, run = read(run_directory)
    params, tags, place = run.data.params, run.data.tags, Path(run.info.artifact_uri.removeprefix("file://"))
    assert params["train.learning_rate"] == "0.01"
    assert params["plugins.lora.target_modules"] == "all-linear"
    assert params["plugins.chatml.default_system"] == "null"
    assert int(params["derived.num_trainable"]) > 0
    assert tags["sftx.plugin.lora"].startswith("sftx ")
    assert tags["summary.artefact"] == str(run_directory / "adapter")
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names == {"run.yaml", "assembled.json", "samples"}
    samples = json.loads((place / "samples" / f"step-{STEPS}.json").read_text(encoding="utf-8"))
    summary = json.loads((run_directory / "summary.json").read_text(encoding="utf-8"))
    assert [(s["row_id"], s["prediction"]) for s in samples] == [(s["row"], s["after"]) for s in summary["samples"]]
    assert run.data.metrics["summary/num_label_tokens"] == summary["num_label_tokens"]
    assert run.data.metrics["summary/held_out/after/loss"] == summary["held_out"]["after"]["loss"]


def test_a_run_that_a_signal_ends_is_marked_killed(tmp_path: Path) -> None:
    patch = stop_in(STOPPED, Stop(15))
    with pytest.raises(Stop):
        train("mlflow", tmp_path)
    patch.undo()
    assert read(tmp_path / "run")[1].info.status == "KILLED"


def test_any_name_and_text_is_written(tmp_path: Path) -> None:
    def change(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in ("on_step", "on_log"):
            return (dataclasses.replace(arguments[0], metrics={HOSTILE: 0.5, "../..": 0.25, "/": 0.125}),)
        if name == "on_evaluate":
            sample = dataclasses.replace(arguments[0].samples[0], prediction=HOSTILE)
            return (dataclasses.replace(arguments[0], metrics={HOSTILE: 0.5}, samples=(sample,)),)
        return arguments

    client, run = read(play(MLflow(), tmp_path, change).output_dir)
    assert history(client, run, "train/__/__") == [(1, 0.25), (2, 0.25)]
    (name,) = (name for name in run.data.metrics if name.startswith("train/a"))
    assert history(client, run, name) == [(1, 0.5), (2, 0.5)]


def test_a_long_option_is_cut_and_complete_in_run_yaml(tmp_path: Path) -> None:
    from sftx.assembly.stages.stage import make
    from sftx.testing.observer_case import events, run_info, send

    info = run_info(tmp_path)
    config = dict(info.config) | {"model": "m" * 10_000, "data": {"x": {f"o{n}": n for n in range(250)}}}
    info = RunInfo(info.output_dir, config)
    observer = make(MLflow(experiment="sftx"), "sftx_observer", run=info)
    send(observer, events(info)[0], info)
    observer.close()
    _, run = read(info.output_dir)
    assert run.data.params["model"] == "m" * 6000
    assert run.data.params["data.x.o249"] == "249"
    whole = Path(run.info.artifact_uri.removeprefix("file://")) / "run.yaml"
    assert "m" * 10_000 in whole.read_text(encoding="utf-8")


def test_a_store_and_names_from_the_options(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    place = (tmp_path / "elsewhere").as_uri()
    plugin = MLflow(tracking_uri=place, experiment="mine", run_name="first")
    info = play(plugin, tmp_path, lambda name, arguments: arguments)
    assert not (info.output_dir / "mlruns").exists()
    client = MlflowClient(place)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_name == "first"


def test_a_missing_library_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assembly = activate(load(None, add=["chatml", "mlflow"], assignments=[]))
    said = r"^plugin 'mlflow' .*: .*mlflow.*pip install 'sftx\[mlflow\]'"
    with pytest.raises(ConfigError, match=said):
        assembly.observers()


def test_an_unknown_option_is_refused() -> None:
    given = [("mlflow.uri", "x", "--set mlflow.uri=x")]
    with pytest.raises(ConfigError, match=r"mlflow\.uri.*tracking_uri"):
        activate(load(None, add=["chatml", "mlflow"], assignments=given))
