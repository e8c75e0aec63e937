"""MLflow: the run on a tracking server, in a database, or in files in the run directory."""

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
    ExitStatus,
    Scalar,
    Tracker,
    assembled_table,
    flatten,
    import_library,
    replace_surrogates,
    start_values,
)

# The limits of MLflow: parameters in one call, and characters of a name, a parameter and a tag.
_BATCH_SIZE, _MAX_NAME, _MAX_PARAM, _MAX_TAG = 100, 250, 6000, 5000
_ALLOW_FILES: Final = "MLFLOW_ALLOW_FILE_STORE"
_STATUS: Final[Mapping[ExitStatus, str]] = {"finished": "FINISHED", "killed": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True, eq=False)
class MLflow:
    """Writes an MLflow run: losses and rates by step, evaluations, answers, the run file and the result."""

    tracking_uri: Annotated[
        str | None,
        Field(min_length=1, description="By default MLFLOW_TRACKING_URI, else files in `mlruns` in the run directory."),
    ] = None
    experiment: Annotated[
        str | None,
        Field(min_length=1, description="Name of the experiment; by default MLFLOW_EXPERIMENT_NAME, else `sftx`."),
    ] = None
    run_name: Annotated[
        str | None, Field(min_length=1, description="Name of the run; by default that of the run directory.")
    ] = None

    @hookimpl
    def sftx_observer(self, run: RunInfo) -> Observer:
        mlflow = import_library("mlflow", "mlflow")
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        experiment = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "sftx"
        return _Run(run, mlflow, uri, experiment, self.run_name or run.output_dir.name)


class _Run(Tracker):
    tool = "mlflow"

    def __init__(self, run: RunInfo, mlflow: Any, uri: str | None, experiment: str, name: str) -> None:
        super().__init__(run)
        self._mlflow = mlflow
        self._uri = uri
        self._experiment = experiment
        self._name = name
        self._client: Any = None
        self._id = ""
        self._last_steps: dict[str, int] = {}
        """For each metric, the last step that the interrupted process wrote."""

    def begin(self, report: StartReport) -> None:
        if self._uri is not None:
            self._client = self._mlflow.MlflowClient(self._uri)
        else:
            with _file_store_allowed():
                self._client = self._mlflow.MlflowClient((self.run.output_dir / "mlruns").absolute().as_uri())
        run_id = self.load_run_id(report)
        if run_id is None:
            self._create_run(report)
        else:
            self._id = run_id
            self._client.update_run(run_id, status="RUNNING")
            for name in self._client.get_run(run_id).data.metrics:
                self._last_steps[name] = max(m.step for m in self._client.get_metric_history(run_id, name))
        for provider in report.providers:
            self._set_tag(f"sftx.plugin.{provider.plugin}", f"{provider.distribution} {provider.version}")
        self._client.log_dict(self._id, {"assembled": assembled_table(report.providers)}, "assembled.json")

    def _create_run(self, report: StartReport) -> None:
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            experiment_id = self._client.create_experiment(self._experiment)
        else:
            experiment_id = experiment.experiment_id
        self._id = str(self._client.create_run(experiment_id, run_name=self._name).info.run_id)
        self.save_run_id(self._id)
        values = flatten({**self.run.config, "derived": start_values(report)})
        param = self._mlflow.entities.Param
        params = [param(_valid_name(name), str(value)[:_MAX_PARAM]) for name, value in values.items()]
        for start in range(0, len(params), _BATCH_SIZE):
            self._client.log_batch(self._id, params=params[start : start + _BATCH_SIZE])
        self._client.log_dict(self._id, copy.deepcopy(dict(self.run.config)), "run.yaml")

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        named = {_valid_name(name): value for name, value in values.items()}
        # MLflow keeps every value it gets: a step that a resumed run repeats would be there twice.
        new = {name: value for name, value in named.items() if step > self._last_steps.get(name, -1)}
        metric = self._mlflow.entities.Metric
        self._client.log_batch(self._id, metrics=[metric(name, value, now, step) for name, value in new.items()])

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        rows = [{name: replace_surrogates(text) for name, text in asdict(sample).items()} for sample in samples]
        text = json.dumps(rows, indent=2, ensure_ascii=False)
        self._client.log_text(self._id, text, f"samples/step-{step}.json")

    def log_summary(self, summary: Mapping[str, Scalar], step: int) -> None:
        self.log_values({name: value for name, value in summary.items() if not isinstance(value, str)}, step)
        for name, value in summary.items():
            if isinstance(value, str):
                self._set_tag(name.replace("/", "."), value)

    def finish(self, status: ExitStatus) -> None:
        self._client.set_terminated(self._id, _STATUS[status])

    def _set_tag(self, name: str, value: str) -> None:
        self._client.set_tag(self._id, _valid_name(name), replace_surrogates(value)[:_MAX_TAG])


def _valid_name(name: str) -> str:
    """Return a name that MLflow accepts: few kinds of characters, and a relative path without `.` or `..`."""
    parts = re.sub(r"[^\w.\- /]", "_", name).split("/")
    valid = "/".join(part if part.strip(".") else "_" * max(1, len(part)) for part in parts)
    return valid[:_MAX_NAME].rstrip("/.")


@contextlib.contextmanager
def _file_store_allowed() -> Iterator[None]:
    """Set the environment variable that MLflow, which prefers a database, needs to open a store of files.

    Files need no package besides MLflow itself, and no lock, which a network file system may not have.
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
