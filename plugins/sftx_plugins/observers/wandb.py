"""Weights & Biases: the run on its server, or in files that `wandb sync` sends there later."""

from __future__ import annotations

import copy
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from sftx import ConfigError, Observer, RunInfo, Sample, StartReport, hookimpl
from sftx_plugins.observers._tracking import (
    GLOBAL_STEP,
    ExitStatus,
    Scalar,
    Tracker,
    assembled_table,
    import_library,
    sample_rows,
    start_values,
)

log = logging.getLogger(__name__)

_INIT_SECONDS: Final = 20.0
"""The time that the server has to answer. Without an answer the run goes on without W&B."""
_FINISH_SECONDS: Final = 20.0
"""Less than the 30 seconds that Slurm and Kubernetes give a process to end; data not sent by then stays on disk."""
_FLUSH_SECONDS: Final = 0.2
"""The time between two writes of W&B's own process, which ends with a process that is killed."""
_SERVICE: Final = "WANDB_SERVICE"
_EXIT_CODES: Final[Mapping[ExitStatus, int]] = {"finished": 0, "failed": 1, "killed": 255}
"""The exit codes that W&B's own hook at the end of a process reports."""


@dataclass(frozen=True, eq=False)
class WeightsAndBiases:
    """Writes a W&B run: losses and rates by step, evaluations, tables of answers, the run file and the result."""

    project: Annotated[
        str | None, Field(min_length=1, description="Name of the project; by default WANDB_PROJECT, else `sftx`.")
    ] = None
    entity: Annotated[str | None, Field(min_length=1, description="User or team; by default your own.")] = None
    name: Annotated[
        str | None, Field(min_length=1, description="Name of the run; by default that of the run directory.")
    ] = None
    group: Annotated[str | None, Field(min_length=1, description="Group in which W&B shows the run.")] = None
    tags: Annotated[tuple[str, ...], Field(description="Tags of the run.")] = ()
    mode: Annotated[
        Literal["online", "offline", "disabled"] | None,
        Field(description="By default WANDB_MODE, else online if an API key is found and offline otherwise."),
    ] = None
    dir: Annotated[
        str | None, Field(min_length=1, description="Directory of `wandb/`; by default the run directory.")
    ] = None
    save_code: Annotated[bool, Field(description="Let W&B read the git repository and save the program.")] = False

    @hookimpl
    def sftx_observer(self, run: RunInfo) -> Observer:
        wandb = import_library("wandb", "wandb")
        settings = wandb.Settings(
            console="off",
            silent=True,
            symlink=False,
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            disable_git=not self.save_code,
            disable_code=not self.save_code,
            save_code=self.save_code,
            x_transaction_log_flush_interval=_FLUSH_SECONDS,
        )
        arguments = {
            "project": self.project or os.environ.get("WANDB_PROJECT") or "sftx",
            "entity": self.entity,
            "name": self.name or os.environ.get("WANDB_NAME") or run.output_dir.name,
            "group": self.group,
            "tags": self.tags or None,
            "mode": _mode(wandb, self.mode),
            "dir": self.dir and str(Path(self.dir).expanduser()),
            "reinit": "create_new",  # leaves alone a W&B run that the calling program may have open
            "settings": settings,
        }
        return _Run(run, wandb, arguments)


def _mode(wandb: Any, option: str | None) -> str:
    """Return the mode, without ever asking on the terminal. Raises ConfigError if a key is needed and none is found."""
    mode = option or os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        return mode
    if wandb.login(prompt=False, verify=False):
        return mode or "online"
    if mode is None:
        return "offline"
    raise ConfigError(
        f"mode {mode} needs an API key, and none is found; `wandb login`, set WANDB_API_KEY, or set wandb.mode=offline"
    )


class _Run(Tracker):
    tool = "wandb"

    def __init__(self, run: RunInfo, wandb: Any, arguments: dict[str, Any]) -> None:
        super().__init__(run)
        self._wandb = wandb
        self._arguments = arguments
        self._run: Any = None
        self._committed_step: int | None = None

    def begin(self, report: StartReport) -> None:
        run_id = self.load_run_id(report) or secrets.token_hex(4)
        directory = self._arguments["dir"] or str(self.run.output_dir)
        Path(directory).mkdir(parents=True, exist_ok=True)  # without it W&B would write into the temporary directory
        service = os.environ.get(_SERVICE)
        config = copy.deepcopy(dict(self.run.config))
        facts = {"derived": start_values(report), "assembled": assembled_table(report.providers)}
        self._run = self._wandb.init(
            **self._arguments | {"dir": directory, "config": config | facts, "id": run_id, "resume": "allow"},
            allow_val_change=True,  # some options of a resumed run may differ, such as save_steps
        )
        if service is None:
            os.environ.pop(_SERVICE, None)  # W&B sets it, and processes started by this one would inherit it
        self.save_run_id(run_id)
        self._run.define_metric(GLOBAL_STEP)
        self._run.define_metric("*", step_metric=GLOBAL_STEP, step_sync=True)
        if self._run.offline and not self._run.disabled:
            log.info("wandb: offline; `wandb sync %s` sends the run", Path(self._run.dir).parent)
        elif not self._run.disabled:
            log.info("wandb: %s", self._run.url)

    # Each row has its step, so W&B does not take a second time the rows that an interrupted process sent. A row stays
    # open until its step is over; a checkpoint commits it, because a resumed run does not write it again.

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def on_save(self, step: int, directory: Path) -> None:
        if step != self._committed_step:  # the result may be saved at the step of the last checkpoint
            self._run.log({}, step=step, commit=True)
        self._committed_step = step

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        columns = ["row", "prompt", "reference", "prediction"]
        rows = [list(row.values()) for row in sample_rows(samples)]
        self._run.log({"eval/samples": self._wandb.Table(columns=columns, data=rows)}, step=step)

    def log_summary(self, summary: Mapping[str, Scalar], step: int) -> None:
        self._run.summary.update(dict(summary))

    def finish(self, status: ExitStatus) -> None:
        self._run.finish(exit_code=_EXIT_CODES[status])
        link = Path(self._run.dir).parent / "logs" / "debug-core.log"
        if link.is_symlink():  # to a log of W&B's service outside of the run, which later runs write too
            link.unlink()
