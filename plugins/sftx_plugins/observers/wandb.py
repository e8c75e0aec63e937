"""The run in Weights & Biases, on its server or in files that `wandb sync` sends there later."""

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
    Ending,
    Scalar,
    Tracker,
    assembled,
    clean,
    derived,
    keep_id,
    kept_id,
    library,
)

log = logging.getLogger(__name__)

_EXTRA = "wandb"
_INIT_S: Final = 20.0
"""For the server to answer; the run goes on without W&B when it does not."""
_FINISH_S: Final = 20.0
"""Less than the 30 seconds that Slurm and Kubernetes give a process to end; what is not sent by then stays on disk."""
_FLUSH_S: Final = 0.2
"""Between two writes to the disk by W&B's own process, which ends with one that is killed."""
_SERVICE: Final = "WANDB_SERVICE"
_EXIT_CODES: Final[Mapping[Ending, int]] = {"finished": 0, "failed": 1, "killed": 255}
"""As W&B's own hook at the end of a process has them."""


@dataclass(frozen=True, eq=False)
class WeightsAndBiases:
    """Writes a W&B run: losses and rates by step, evaluations, tables of answers, the run file and the result."""

    project: Annotated[str | None, Field(min_length=1, description="By default WANDB_PROJECT, else `sftx`.")] = None
    entity: Annotated[str | None, Field(min_length=1, description="User or team; by default your own.")] = None
    name: Annotated[str | None, Field(min_length=1, description="By default that of the run directory.")] = None
    group: Annotated[str | None, Field(min_length=1, description="Runs that are shown together.")] = None
    tags: Annotated[tuple[str, ...], Field(description="Words to find the run by.")] = ()
    mode: Annotated[
        Literal["online", "offline", "disabled"] | None,
        Field(description="By default WANDB_MODE, else online where an API key is found, and offline where none is."),
    ] = None
    dir: Annotated[
        str | None, Field(min_length=1, description="Where `wandb/` with its files is; by default the run directory.")
    ] = None
    save_code: Annotated[bool, Field(description="Let W&B read the git repository and save the program.")] = False

    @hookimpl
    def sftx_observer(self, run: RunInfo) -> Observer:
        wandb = library("wandb", _EXTRA)
        return _Run(run, wandb, self._init_arguments(run, wandb, _mode(wandb, self.mode)))

    def _init_arguments(self, run: RunInfo, wandb: Any, mode: str) -> dict[str, Any]:
        """What wandb.init is given; it takes no hold of the process: no signals, no streams."""
        settings = wandb.Settings(
            console="off",
            silent=True,
            symlink=False,
            init_timeout=_INIT_S,
            finish_timeout=_FINISH_S,
            disable_git=not self.save_code,
            disable_code=not self.save_code,
            save_code=self.save_code,
            x_transaction_log_flush_interval=_FLUSH_S,
        )
        return {
            "project": self.project or os.environ.get("WANDB_PROJECT") or "sftx",
            "entity": self.entity,
            "name": self.name or os.environ.get("WANDB_NAME") or run.output_dir.name,
            "group": self.group,
            "tags": self.tags or None,
            "mode": mode,
            "dir": self.dir and str(Path(self.dir).expanduser()),
            "reinit": "create_new",  # a run of the program that calls sftx stays as it is
            "settings": settings,
        }


def _mode(wandb: Any, option: str | None) -> str:
    """Never a question on the terminal. Raises ConfigError when a key is needed that is not there."""
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
    def __init__(self, run: RunInfo, wandb: Any, arguments: dict[str, Any]) -> None:
        super().__init__(run)
        self._wandb = wandb
        self._arguments = arguments
        self._run: Any = None
        self._sent: int | None = None
        """The step of the row that was sent last."""

    def begin(self, report: StartReport) -> None:
        run_id = kept_id(self.run, "wandb", report) or secrets.token_hex(4)
        directory = self._arguments["dir"] or str(self.run.output_dir)
        Path(directory).mkdir(parents=True, exist_ok=True)  # into the system's directory for temporary files otherwise
        service = os.environ.get(_SERVICE)
        config = copy.deepcopy(dict(self.run.config))
        facts = {"derived": derived(report), "assembled": assembled(report.providers)}
        self._run = self._wandb.init(
            **self._arguments | {"dir": directory, "config": config | facts, "id": run_id, "resume": "allow"},
            allow_val_change=True,  # a run that goes on may save more often than before
        )
        if service is None:
            os.environ.pop(_SERVICE, None)  # for processes that this one starts; the environment is not ours to change
        keep_id(self.run, "wandb", run_id)
        self._run.define_metric(GLOBAL_STEP)
        self._run.define_metric("*", step_metric=GLOBAL_STEP, step_sync=True)
        self._tell_where()

    def _tell_where(self) -> None:
        if self._run.disabled:
            return
        if self._run.offline:
            log.info("wandb: offline; `wandb sync %s` sends the run", Path(self._run.dir).parent)
        else:
            log.info("wandb: %s", self._run.url)

    # Each row has its step: those that an interrupted process sent are not taken a second time. A row is held back
    # until its step is over, which a checkpoint ends: what is in it is never told again.

    def points(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def on_save(self, step: int, directory: Path) -> None:
        if step != self._sent:  # the result is saved at a step that a checkpoint may have sent already
            self._run.log({}, step=step, commit=True)
        self._sent = step

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        columns = ["row", "prompt", "reference", "prediction"]
        rows = [[clean(text) for text in (s.row_id, s.prompt, s.reference, s.prediction)] for s in samples]
        self._run.log({"eval/samples": self._wandb.Table(columns=columns, data=rows)}, step=step)

    def figures(self, figures: Mapping[str, Scalar], step: int) -> None:
        self._run.summary.update(dict(figures))

    def finish(self, ending: Ending) -> None:
        self._run.finish(exit_code=_EXIT_CODES[ending])
        link = Path(self._run.dir).parent / "logs" / "debug-core.log"
        if link.is_symlink():  # to a log of W&B's service that lies elsewhere, and that later runs write too
            link.unlink()
