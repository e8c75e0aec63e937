"""Make the checks of `sftx verify` and collect what they find.

This process reads rows. Models are loaded in processes of their own, one run at a time, and all files are in a
temporary directory.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from sftx import __version__
from sftx.assembly.registry import Assembly
from sftx.config.loading import LoadedConfig
from sftx.data.held_out import check_overlap
from sftx.distributed.process_group import is_launched
from sftx.errors import ConfigError, DataError, SftxError, counted, one_line
from sftx.inspection.dataset_view import DatasetView, view_dataset
from sftx.inspection.memory_plan.checkpointing import free_bytes
from sftx.phases import phase
from sftx.verify import runs, splits
from sftx.verify.findings import CHECKS, FailedError, Finding, NotCheckedError, Verification
from sftx.verify.processes import ChildError, Processes
from sftx.verify.prompts import check_prompts
from sftx.verify.rows import RowChecks
from sftx.verify.run_differences import compared_files, differences
from sftx.verify.short_run import ShortRun, shorten

_SHOWN_DIFFERENCES: Final = 3
_MEMORY_TOLERANCE: Final = 1.25
"""A measured peak is at most this many times the planned one; docs/planning.md has measured ones."""
_LIBRARY_BYTES: Final = 128 * 2**20
"""Of a process on the CPU, so much may be memory of libraries that are imported during a run."""
_LIBRARIES: Final = ("torch", "transformers", "tokenizers")
_MAX_CHARS: Final = 1000


def verify(loaded: LoadedConfig, *, steps: int, only: Collection[str] = ()) -> Verification:
    """Make all CHECKS of a run, or those of `only`, with short runs of so many steps.

    What the run itself refuses is a finding of the check `start`.
    """
    if is_launched():
        raise ConfigError("sftx verify starts its processes by itself; start it without torchrun")
    begun = time.perf_counter()
    on_gpu = torch.cuda.is_available() and not loaded.config.train.use_cpu
    with (
        tempfile.TemporaryDirectory(prefix="sftx-verify-") as directory,
        Processes(Path(directory), on_gpu=on_gpu) as processes,
    ):
        proof = _Proof(loaded, steps, Path(directory), processes, on_gpu=on_gpu, chosen=only or tuple(CHECKS))
        proof.make()
    versions = {library: importlib.metadata.version(library) for library in _LIBRARIES}
    return Verification(
        run=proof.described,
        versions={"sftx": __version__, "python": platform.python_version(), **versions},
        changes=proof.changes,
        findings=tuple(proof.findings[check] for check in CHECKS if check in proof.findings),
        warnings=tuple(proof.warnings),
        speed=proof.speed,
        seconds=time.perf_counter() - begun,
    )


@dataclass
class _Proof:
    """The checks in progress; what one of them leaves, such as a finished run, others go on from."""

    loaded: LoadedConfig
    steps: int
    directory: Path
    processes: Processes
    on_gpu: bool
    chosen: Collection[str]
    findings: dict[str, Finding] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    speed: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _refused: bool = False
    """Whether the run does not start."""
    _no_window: str = "nothing was computed in one process"
    """Why there is no loss of a window to compare with; empty where there is one."""
    _splits: dict[str, Finding] = field(default_factory=dict)
    """The findings that come with the start of the run."""
    _whole: Path | None = None
    """The uninterrupted run."""

    def make(self) -> None:
        """Make the chosen checks: first those of rows, then those that start the run."""
        try:
            self._describe()
        except SftxError as error:
            self._refuse(error)
        self._make("masks", lambda: self._rows.masks())
        self._make("stop", lambda: self._rows.stop())
        self._make("rows", lambda: self._rows.rows())
        self._make("held-out", lambda: self._rows.held_out())
        if not self._refused:
            self._compare_splits()
        self._make("accumulation", lambda: self._splits["accumulation"])
        self._make("packing", lambda: self._splits["packing"])
        self._make("processes", self._compare_processes)
        self._make("resume", self._resume)
        self._make("prompt", self._prompt)
        self._make("memory", self._memory)

    def _make(self, name: str, check: Callable[[], Finding]) -> None:
        """Make a check, if it was chosen, and keep its finding."""
        if name not in self.chosen:
            return
        try:
            if self._refused:
                raise NotCheckedError("the run does not start")
            with phase("verifying", name):
                finding = check()
        except NotCheckedError as error:
            finding = Finding(name, "not checked", str(error))
        except FailedError as error:
            finding = Finding(name, "failed", str(error), error.figures)
        except (ChildError, SftxError) as error:
            finding = Finding(name, "failed", one_line(error, max_chars=_MAX_CHARS))
        self.findings[name] = finding

    # --- start ----------------------------------------------------------------------------------

    @functools.cached_property
    def _view(self) -> DatasetView:
        return view_dataset(self.loaded)

    @functools.cached_property
    def _rows(self) -> RowChecks:
        return RowChecks(self._view)

    @property
    def _assembly(self) -> Assembly:
        return self._view.pipeline.assembly

    @property
    def _has_held_out(self) -> bool:
        return self.loaded.config.data.has_eval

    def _describe(self) -> None:
        """Read the rows. Raises SftxError where that cannot be done at all."""
        config = self.loaded.config
        self.described |= {"model": config.model, "plugins": list(config.plugins)}
        ledger = self._view.dataset("train").ledger
        num_held_out = self._view.dataset("eval").ledger.num_rows if self._has_held_out else 0
        self.described |= {
            "rows": ledger.num_rows - sum(entry.action == "held out" for entry in ledger.entries),
            "held_out_rows": num_held_out,
        }

    def _check_all_rows(self) -> None:
        """Raise DataError as the run does, which has more held-out rows than the short runs."""
        problems = [*self._view.problems("train"), *(self._view.problems("eval") if self._has_held_out else ())]
        if problems:
            raise DataError(problems[0])
        if self._has_held_out:
            train, held_out = self._view.dataset("train"), self._view.dataset("eval")
            check_overlap(train, held_out, self.loaded.config.data.max_overlap)

    def _refuse(self, error: Exception) -> None:
        """Keep the finding that the run does not start, also where that was not asked for: nothing else is proved."""
        self._refused = True
        reason = one_line(error, max_chars=_MAX_CHARS)
        self.findings["start"] = Finding("start", "failed", f"refused before the first step: {reason}")

    @functools.cached_property
    def _short(self) -> ShortRun:
        num_held_out = len(self._view.dataset("eval").examples) if self._has_held_out else 0
        place = self.directory / "run"
        return shorten(self.loaded, self._assembly, steps=self.steps, num_held_out=num_held_out, output_dir=place)

    @functools.cached_property
    def _for_splits(self) -> LoadedConfig:
        return self._short.for_splits(self._short.loaded.config.train.resolve_batch_size(1).micro_batch_size)

    # --- splits ---------------------------------------------------------------------------------

    @property
    def _reference(self) -> Path:
        return self.directory / "window.safetensors"

    def _compare_splits(self) -> None:
        """Start the run in a process, which compares splits of its rows as well."""
        if not {"start", "accumulation", "packing", "processes", "memory"} & set(self.chosen):
            return
        try:
            self._check_all_rows()
            with phase("verifying", "start, accumulation and packing"):
                found = self.processes.run("splits", splits.compare_splits, self._for_splits, self._reference)
        except (ChildError, SftxError) as error:
            self._refuse(error)
            return
        report, train = found["report"], self._short.loaded.config.train.resolve_batch_size(1)
        self.changes, self.warnings = self._short.changes, found["warnings"]
        self.described |= {name: report[name] for name in ("device", "dtype", "num_parameters", "num_trainable")}
        self.described |= {"rows_per_step": train.rows_per_step, "micro_batch_rows": train.micro_batch_size}
        if "start" in self.chosen:
            rows, examples = counted(report["num_rows"], "row"), counted(report["num_examples"], "example")
            data = "a stream of rows" if report["is_stream"] else f"{rows} of data make {examples}"
            seen = f"{data}; {report['num_trainable']:,} of {report['num_parameters']:,} parameters train"
            self.findings["start"] = Finding("start", "passed", seen)
        self._splits = {finding["check"]: Finding(**finding) for finding in found["findings"]}
        accumulation = self._splits["accumulation"]
        if self._reference.exists():
            self._no_window = ""
        elif accumulation.status == "not checked":
            self._no_window = accumulation.seen

    def _compare_processes(self) -> Finding:
        if self._no_window:
            raise NotCheckedError(self._no_window)
        if self.on_gpu and (num_gpus := torch.cuda.device_count()) < 2:
            raise NotCheckedError(
                f"two processes need two GPUs, and this host has {num_gpus}; with --use-cpu they are compared on the "
                "CPU, as gloo connects them"
            )
        if not torch.distributed.is_available():
            raise NotCheckedError("this build of torch has no torch.distributed")
        num_bytes = 2 * runs.model_bytes(self.described["num_parameters"], self.described["num_trainable"])
        free = None if self.on_gpu else free_bytes(torch.device("cpu"))
        if free is not None and num_bytes > free:
            raise NotCheckedError(
                f"two processes need {num_bytes / 1e9:.1f} GB at least, and {free / 1e9:.1f} GB are free on this host"
            )
        found = self.processes.run_as_ranks("ranks", 2, splits.compare_processes, self._for_splits, self._reference)
        return Finding(**found)

    # --- runs -----------------------------------------------------------------------------------

    def _made(self, name: str) -> Path:
        """Make a run to its end, and move it away: all runs have the same output directory, which files name."""
        self.processes.run(name, runs.train, self._short.loaded)
        place = self.directory / name
        self._short.output_dir.rename(place)
        return place

    def _uninterrupted(self) -> Path:
        """Return the uninterrupted run, which is made once. Raises ChildError."""
        if self._whole is None:
            self._whole = self._made("whole")
            self.changes = self._short.changes
            steps = runs.steps_of(self._whole)[1:]
            seconds = statistics.median(step["seconds"] for step in steps)
            tokens = statistics.median(step["num_input_tokens"] for step in steps)
            self.speed = {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds}
        return self._whole

    def _resume(self) -> Finding:
        short, whole = self._short, self._uninterrupted()
        child = self.processes.start("killed", runs.train_until_killed, short.loaded, short.killed_step)
        if child.wait() >= 0:
            child.result()  # raises the error of a run that ended by itself
            raise FailedError(f"the run ended before step {short.killed_step}, in which it was to be killed")
        saved = [path.name for path in sorted(short.output_dir.glob("checkpoints/step-*"))]
        if not saved:
            raise FailedError(f"a run that was killed within step {short.killed_step} had left no checkpoint")
        self.processes.run("resumed", functools.partial(runs.train, resume=True), short.loaded)
        found, names = differences(short.output_dir, whole), compared_files(whole)
        story = f"killed within step {short.killed_step} of {short.steps}, resumed from {saved[-1]}"
        shutil.rmtree(short.output_dir)
        if found:
            shown = "; ".join(line.replace(f"{self.directory}/", "") for line in found[:_SHOWN_DIFFERENCES])
            shown += f"; and {len(found) - _SHOWN_DIFFERENCES} more" if found[_SHOWN_DIFFERENCES:] else ""
            if differences(self._made("again"), whole):
                shown += "; two uninterrupted runs differ as well: something does not follow from the seed alone"
            raise FailedError(
                f"{story}: {len(found)} of {len(names)} files differ from those of an uninterrupted run: {shown}",
                files=len(names),
                differing_files=len(found),
            )
        num_bytes = sum((whole / name).stat().st_size for name in names)
        return Finding(
            "resume",
            "passed",
            f"{story}: {len(names)} files of {num_bytes / 1e6:,.1f} MB (weights, optimizer, metrics, checkpoints) are "
            "bit for bit those of an uninterrupted run, but for durations",
            {"files": len(names), "bytes": num_bytes, "differing_files": 0},
        )

    def _prompt(self) -> Finding:
        trust = self.loaded.config.trust_remote_code
        return check_prompts(self._uninterrupted(), self._rows.read, trust_remote_code=trust)

    def _memory(self) -> Finding:
        if self._short.loaded.config.train.torch_compile:
            raise NotCheckedError("sftx plan does not count the buffers of torch_compile")
        if self._assembly.providers("sftx_rollout"):
            raise NotCheckedError("sftx plan does not count the sampling of answers")
        device = self.described["device"]
        measured = max(step["peak_bytes"] for step in runs.steps_of(self._uninterrupted()))
        plan_memory = functools.partial(runs.plan_memory, is_forked=self.processes.are_forked)
        plan = self.processes.run("plan", plan_memory, self._short.loaded, device)
        # On a GPU the peak is that of tensors: torch does not count its context and libraries.
        planned = plan["total"] - (0 if device == "cpu" else plan["kinds"]["process"])
        ratio = measured / planned
        seen = (
            f"{measured / 1e6:,.0f} MB measured, {planned / 1e6:,.0f} MB planned, ratio {ratio:.2f} (peak of the "
            f"steps, {counted(plan['rows'], 'row')} of up to {counted(plan['longest'], 'token')} at once)"
        )
        figures = {"measured_bytes": measured, "planned_bytes": planned, "ratio": ratio}
        if ratio > _MEMORY_TOLERANCE and measured - planned > (_LIBRARY_BYTES if device == "cpu" else 0):
            raise FailedError(f"{seen}; at most {_MEMORY_TOLERANCE} is accepted", **figures)
        return Finding("memory", "passed", seen, figures)


def as_json(verification: Verification) -> dict[str, Any]:
    """Return the values of `sftx verify --json`."""
    return {"made_by": "sftx verify", "passed": verification.passed, **dataclasses.asdict(verification)}
