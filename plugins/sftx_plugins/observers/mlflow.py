"""The run in MLflow: on a tracking server, in a database, or in files in the run directory."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

from pydantic import Field

from sftx import Observer, RunInfo, Sample, StartReport, hookimpl
from sftx_plugins.observers._tracking import (
    Ending,
    Scalar,
    Tracker,
    assembled,
    clean,
    derived,
    flat,
    keep_id,
    kept_id,
    library,
)

_EXTRA = "mlflow"
_BATCH: Final = 100
"""Of parameters that MLflow takes at once."""
_MAX_NAME: Final = 250
_MAX_PARAM: Final = 6000
_MAX_TAG: Final = 5000
_ALLOW_FILES: Final = "MLFLOW_ALLOW_FILE_STORE"
_STATUS: Final[Mapping[Ending, str]] = {"finished": "FINISHED", "killed": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True, eq=False)
class MLflow:
    """Writes an MLflow run: losses and rates by step, evaluations, answers, the run file and the result."""

    tracking_uri: Annotated[
        str | None,
        Field(min_length=1, description="By default MLFLOW_TRACKING_URI, else files in `mlruns` in the run directory."),
    ] = None
    experiment: Annotated[
        str | None, Field(min_length=1, description="Its name; by default MLFLOW_EXPERIMENT_NAME, else `sftx`.")
    ] = None
    run_name: Annotated[str | None, Field(min_length=1, description="By default that of the run directory.")] = None

    @hookimpl
    def sftx_observer(self, run: RunInfo) -> Observer:
        mlflow = library("mlflow", _EXTRA)
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        experiment = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "sftx"
        return _Run(run, mlflow, uri, experiment, self.run_name or run.output_dir.name)


class _Run(Tracker):
    def __init__(self, run: RunInfo, mlflow: Any, uri: str | None, experiment: str, name: str) -> None:
        super().__init__(run)
        self._mlflow = mlflow
        self._uri = uri
        self._experiment = experiment
        self._name = name
        self._client: Any = None
        self._id = ""
        self._told: dict[str, int] = {}
        """The last step of each metric that the interrupted process told."""

    def begin(self, report: StartReport) -> None:
        self._client = self._connect()
        run_id = kept_id(self.run, "mlflow", report)
        if run_id is None:
            self._id = self._create()
            keep_id(self.run, "mlflow", self._id)
            self._parameters(flat({**self.run.config, "derived": derived(report)}))
            self._client.log_dict(self._id, copy.deepcopy(dict(self.run.config)), "run.yaml")
        else:
            self._id = run_id
            self._client.update_run(self._id, status="RUNNING")
            self._told = self._last_steps()
        for provider in report.providers:
            self._tag(f"sftx.plugin.{provider.plugin}", f"{provider.distribution} {provider.version}")
        self._client.log_dict(self._id, {"assembled": assembled(report.providers)}, "assembled.json")

    def points(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        # MLflow keeps whatever it is told: a step that is done again, the same as it was, would stand there twice.
        new = {name: value for name, value in _named(values).items() if step > self._told.get(name, -1)}
        metric = self._mlflow.entities.Metric
        self._client.log_batch(self._id, metrics=[metric(name, value, now, step) for name, value in new.items()])

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        rows = [{name: clean(text) for name, text in asdict(sample).items()} for sample in samples]
        text = json.dumps(rows, indent=2, ensure_ascii=False)
        self._client.log_text(self._id, text, f"samples/step-{step}.json")

    def figures(self, figures: Mapping[str, Scalar], step: int) -> None:
        self.points({name: value for name, value in figures.items() if not isinstance(value, str)}, step)
        for name, value in figures.items():
            if isinstance(value, str):
                self._tag(name.replace("/", "."), value)

    def finish(self, ending: Ending) -> None:
        self._client.set_terminated(self._id, _STATUS[ending])

    def _connect(self) -> Any:
        if self._uri is not None:
            return self._mlflow.MlflowClient(self._uri)
        with _files_allowed():
            return self._mlflow.MlflowClient((self.run.output_dir / "mlruns").absolute().as_uri())

    def _create(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        experiment_id = self._client.create_experiment(self._experiment) if found is None else found.experiment_id
        made = self._client.create_run(experiment_id, run_name=self._name)
        return str(made.info.run_id)

    def _parameters(self, values: Mapping[str, Scalar]) -> None:
        param = self._mlflow.entities.Param
        params = [param(name, str(value)[:_MAX_PARAM]) for name, value in _named(values).items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self._id, params=params[start : start + _BATCH])

    def _last_steps(self) -> dict[str, int]:
        names = self._client.get_run(self._id).data.metrics
        return {name: max(m.step for m in self._client.get_metric_history(self._id, name)) for name in names}

    def _tag(self, name: str, value: str) -> None:
        self._client.set_tag(self._id, _legal(name), clean(value)[:_MAX_TAG])


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_legal(name): value for name, value in values.items()}


def _legal(name: str) -> str:
    """A name that MLflow takes: of few characters, and a path below where it keeps a run's metrics."""
    parts = re.sub(r"[^\w.\- /]", "_", name).split("/")
    named = "/".join(part if part.strip(".") else "_" * max(1, len(part)) for part in parts)
    return named[:_MAX_NAME].rstrip("/.")


@contextlib.contextmanager
def _files_allowed() -> Iterator[None]:
    """MLflow prefers a database, and makes no store of files unless the environment says so at that moment.

    Files need no more than MLflow itself, and no lock that a network's file system may not have.
    """
    before = os.environ.get(_ALLOW_FILES)
    os.environ[_ALLOW_FILES] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ALLOW_FILES]
        else:
            os.environ[_ALLOW_FILES] = before
