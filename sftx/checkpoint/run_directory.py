"""The directory of a run: which one it is, that no run overwrites another, and whether an old run may go on in it.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

from sftx import atomic_files
from sftx.checkpoint import layout
from sftx.config import run_file
from sftx.config.flatten import flatten
from sftx.errors import ConfigError, OutputError, one_line
from sftx.events import Result
from sftx.model import names

log = logging.getLogger(__name__)

_FREE: Final = frozenset(
    {"output_dir", "data.num_proc", "data.cache", "train.logging_steps"}
    | {"train.save_steps", "train.save_minutes", "train.save_total_limit", "train.save_dtype"}
)
"""Options that may change when a run is resumed, as they have no effect on what it computes."""

_ROUNDING: Final = frozenset(
    {"generation.batch_size", "train.per_device_eval_batch_size", "train.gradient_checkpointing"}
    | {"train.selective_checkpointing", "train.torch_compile", "train.use_cpu"}
    | {"train.distributed", "train.fsdp_offload"}
)
"""Options that may change with a warning, as they change only the order of floating-point additions."""

_SPLIT: Final = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
"""Options that divide the rows of an optimizer step, which changes neither the order of the data nor the update."""

_LOCKS_UNSUPPORTED: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass
class RunDirectory:
    """The directory of one run."""

    path: Path
    resumed: bool = False
    """True when the directory holds a run that is to go on."""
    _lock: int | None = None

    def file(self, name: str) -> Path:
        return self.path / name

    def check_same(self, resolved: Mapping[str, Any], plugins: Sequence[Mapping[str, Any]]) -> None:
        """Raise ConfigError when the run in this directory had other options than `resolved`.

        `plugins` are the rows of the assembled table. Plugins that are only observers may differ: they change nothing.
        """
        observers = _only_observers(plugins) | _only_observers(
            (self.read_json(layout.MANIFEST) or {}).get("plugins", ())
        )
        before = _flat_options(run_file.read(self.file(layout.RUN))[0], observers)
        now = _flat_options(json.loads(json.dumps(resolved)), observers)
        before["train.train_batch_size"] = _rows_per_step(before)
        before["model"] = names.absolute(str(before.get("model")))  # sftx 0.1 recorded it as it was typed
        changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)} - _FREE
        if changed & set(_SPLIT):
            changed -= set(_SPLIT)
            log.warning(
                "the rows of a step are split into other micro-batches: the results are the same but for rounding, "
                "and for the numbers that dropout draws"
            )
        if rounding := sorted(changed & _ROUNDING):
            log.warning("%s changed: the results are the same but for rounding", ", ".join(rounding))
        if wrong := sorted(changed - _ROUNDING):
            name = wrong[0]
            raise ConfigError(
                f"--resume: {self.path} was begun with {name} {_shown(before, name)}, and is {_shown(now, name)} now"
                f"{f', and {len(wrong) - 1} more differ' if wrong[1:] else ''}; give the same options, or begin "
                "another run with --output-dir"
            )

    def recorded_batch_size(self) -> int:
        """Return the rows of a step, over all processes, that the run here was started with."""
        return _rows_per_step(flatten(run_file.read(self.file(layout.RUN))[0]))

    def check_inputs(self, manifest: Mapping[str, Any]) -> None:
        """Raise ConfigError when model or data have other content than at the start of the run.

        Other versions of libraries, plugins or Python, or another device, are reported as a warning.
        """
        before = self.read_json(layout.MANIFEST)
        if before is None:
            log.warning("%s is missing: whether model and data are the same is not known", self.file(layout.MANIFEST))
            return
        now = json.loads(json.dumps(manifest))
        for what in ("model", "data", "eval_data"):
            if _hashes(before.get(what)) != _hashes(now[what]):
                raise ConfigError(
                    f"--resume: {self.path} was begun with another content of {what.replace('_', ' ')}; bring back "
                    "what was there, or begin another run with --output-dir"
                )
        versions, versions_before = _versions(now), _versions(before)
        changed = [
            f"{name} {versions_before.get(name)} -> {version}"
            for name, version in versions.items()
            if versions_before.get(name) != version
        ]
        if changed:
            log.warning("not what this run was begun with: %s; results may differ", ", ".join(changed))

    def finished(self) -> Result | None:
        """Return the result of a run that is complete, None for any other."""
        summary = self.read_json(layout.SUMMARY) if self.resumed else None
        if summary is None or not Path(str(summary.get("artefact"))).is_dir():
            return None
        return Result(self.path, layout.with_new_names(summary))

    def write_start(self, resolved: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Write the run's options and manifest, before its first step. Raises OutputError."""
        run_file.write(dict(resolved), self.file(layout.RUN))
        atomic_files.write_json(self.file(layout.MANIFEST), manifest)

    def complete(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest of a resumed run when it is missing. Raises OutputError."""
        if not self.file(layout.MANIFEST).exists():
            atomic_files.write_json(self.file(layout.MANIFEST), manifest)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks the run as complete. Raises OutputError."""
        atomic_files.write_json(self.file(layout.SUMMARY), summary)

    def claim(self) -> bool:
        """Make and lock the directory. Return False when another process has it. Raises OutputError.

        The lock is flock on the directory itself, which the system releases when the process ends, however it ends.
        The package filelock would need a lock file beside or in the directory, which is left behind.
        """
        if self._lock is not None:
            return True
        import fcntl  # here, as Windows has no such module, and not every command makes a directory

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError as error:
            if self._lock is None or error.errno not in _LOCKS_UNSUPPORTED:
                raise OutputError(f"output_dir {self.path}: cannot be written: {one_line(error)}") from error
            log.warning("%s is on a file system without locks: make sure that only one process writes to it", self.path)
        if self.resumed:
            atomic_files.remove_leftovers(self.path)
        elif _has_files(self.path):
            self.release()
            return False
        return True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the directory of a resumed run before anything in it is read, release it at the end.

        Raises OutputError when another process has it.
        """
        if self.resumed and not self.claim():
            raise OutputError(f"--resume: another process is at work in {self.path}; wait for its end, or stop it")
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in that file, None when there is no such file. Raises OutputError."""
        try:
            values: dict[str, Any] = json.loads(self.file(name).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it is no JSON object")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.file(name)}: cannot be read: {one_line(error)}") from error
        return values


def new(output_dir: str | None, name: str) -> RunDirectory:
    """Return the directory for a new run: `output_dir`, or by default the next free `runs/<name>-<number>`.

    Raises OutputError when `output_dir` has files already.
    """
    if output_dir is None:
        return RunDirectory(Path("runs") / f"{name}-{_last_number(name) + 1}")
    path = _checked(output_dir)
    if _has_files(path):
        is_run = (path / layout.RUN).exists()
        what, hint = ("a run", ", or go on with it: --resume") if is_run else ("files", "")
        raise OutputError(
            f"output_dir {output_dir}: holds {what} already, which is never written over; choose another{hint}"
        )
    return RunDirectory(path)


def resume(output_dir: str | None, name: str) -> RunDirectory:
    """Return the directory of the run that is to go on: `output_dir`, or by default the last `runs/<name>-<number>`.

    When it does not exist or is empty, the run begins there. Raises OutputError when it has files but no run.
    """
    default = Path("runs") / f"{name}-{max(1, _last_number(name))}"
    path = default if output_dir is None else _checked(output_dir)
    if (path / layout.RUN).exists():
        return RunDirectory(path, resumed=True)
    if _has_files(path):
        raise OutputError(f"--resume: {path} holds files and no run; name the directory of the run")
    log.warning("--resume: there is no run in %s yet; it begins", path)
    return RunDirectory(path)


@contextmanager
def reserve(output_dir: str | None, name: str, *, resume_run: bool) -> Iterator[str]:
    """Choose the directory of a run that other processes will start, and restart, with `--output-dir`.

    A default directory is made here, so that no other run takes its number, and removed at the end when it is still
    empty. Raises OutputError.
    """
    while True:
        directory = resume(output_dir, name) if resume_run else new(output_dir, name)
        if output_dir is not None or resume_run:
            yield str(directory.path) if output_dir is None else output_dir
            return
        try:
            directory.path.mkdir(parents=True)
        except FileExistsError:
            continue  # another run has taken it since
        except OSError as error:
            raise OutputError(f"output_dir {directory.path}: cannot be written: {one_line(error)}") from error
        try:
            yield str(directory.path)
        finally:
            with contextlib.suppress(OSError):
                os.removedirs(directory.path)  # refuses to remove what is not empty
        return


def _last_number(name: str) -> int:
    """Return the highest number of the directories `runs/<name>-<number>`, 0 when there is none."""
    pattern = re.compile(re.escape(name) + r"-(\d{1,9})")
    entries = Path("runs").iterdir() if Path("runs").is_dir() else ()
    return max((int(match[1]) for path in entries if (match := pattern.fullmatch(path.name))), default=0)


def _checked(output_dir: str) -> Path:
    """Return the path of a directory that may exist or not. Raises OutputError for a file."""
    try:
        path = Path(output_dir).expanduser()
        is_file = not path.is_dir() and (path.exists() or path.is_symlink())
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"output_dir {output_dir}: cannot be used: {one_line(error)}") from error
    if is_file:
        raise OutputError(f"output_dir {output_dir}: is a file; name a directory that does not exist yet")
    return path


def _has_files(path: Path) -> bool:
    """Return whether the directory holds more than the part of run.yaml that a process killed at its start left."""
    try:
        return path.is_dir() and any(file.name != f".{layout.RUN}.part" for file in path.iterdir())
    except OSError as error:
        raise OutputError(f"output_dir {path}: cannot be used: {one_line(error)}") from error


def _flat_options(values: Mapping[str, Any], observers: Collection[str]) -> dict[str, Any]:
    """Return the options by dotted names, and the plugins' names in the order of their application; no observers."""
    if not isinstance(values.get("plugins"), dict):
        raise OutputError(f"{layout.RUN}: is not what a run has written; begin another one with --output-dir")
    plugins = {name: options for name, options in values["plugins"].items() if name not in observers}
    options = flatten({**values, "plugins": plugins})
    options["plugins"] = list(plugins)
    return options


def _only_observers(plugins: Iterable[Mapping[str, str]]) -> set[str]:
    """Return the names of the plugins in an assembled table that fill no other stage."""
    stages: dict[str, set[str]] = {}
    for line in plugins:
        stages.setdefault(line["plugin"], set()).add(line["stage"])
    return {name for name, filled in stages.items() if filled == {"observer"}}


def _rows_per_step(values: Mapping[str, Any]) -> int:
    """Return the rows of a step from recorded options. sftx 0.1 recorded the two factors alone."""
    recorded = values.get("train.train_batch_size")
    if recorded is not None:
        return int(recorded)
    factors: list[int] = [values[name] for name in _SPLIT if values.get(name) is not None]
    if len(factors) < len(_SPLIT):
        raise OutputError(f"{layout.RUN}: is not what a run has written; begin another one with --output-dir")
    return math.prod(factors)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return shorten(json.dumps(values[name], ensure_ascii=False), 120) if name in values else "not set"


def _hashes(described: Any) -> Any:
    """Return the content hashes in a manifest's entry for the model, or for the sources of data."""
    if isinstance(described, dict):
        return described.get("sha256"), described.get("revision")
    return [source.get("fingerprint") for source in described or ()]


def _versions(manifest: Mapping[str, Any]) -> dict[str, Any]:
    plugins = {f"plugin {plugin['plugin']}": plugin["version"] for plugin in manifest.get("plugins", ())}
    named = {name: manifest.get(name) for name in ("sftx", "python", "device", "num_threads", "dtype")}
    named["processes"] = manifest.get("num_processes", 1)
    return {**named, **manifest.get("libraries", {}), **plugins}
