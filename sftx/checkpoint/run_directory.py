"""The directory of a run: which one it is, that nobody's work is written over, and whether an old one can go on."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

from sftx import atomic_files
from sftx.config import run_file
from sftx.config.flatten import flatten
from sftx.errors import ConfigError, OutputError, one_line
from sftx.events import Result

log = logging.getLogger(__name__)

_RUN, _MANIFEST, _SUMMARY = "run.yaml", "manifest.json", "summary.json"

_FREE: Final = frozenset(
    {"output_dir", "data.num_proc", "data.cache", "train.logging_steps"}
    | {"train.save_steps", "train.save_minutes", "train.save_total_limit"}
)
"""What a run that goes on may have otherwise than before, without any effect on what it computes."""

_ROUNDING: Final = frozenset(
    {"generation.batch_size", "train.per_device_eval_batch_size", "train.gradient_checkpointing"}
    | {"train.selective_checkpointing", "train.torch_compile", "train.use_cpu"}
    | {"train.distributed", "train.fsdp_offload"}
)
"""What only changes the order in which numbers are added."""

_NO_LOCKS: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

_SPLIT: Final = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
"""Their product is the rows of a step, which decides the data's order; how it is split does not."""


@dataclass
class RunDirectory:
    """A place for one run. `resumed`: it holds one that is to go on."""

    path: Path
    resumed: bool = False
    _lock: int | None = None

    def file(self, name: str) -> Path:
        return self.path / name

    def check_same(self, resolved: Mapping[str, Any], plugins: Sequence[Mapping[str, Any]]) -> None:
        """Raises ConfigError when the run that is to go on here was another than `resolved`.

        Of `plugins`, the lines of its assembled table, those that only observe may be others than they were: they
        change nothing.
        """
        observers = _observers(plugins) | _observers((self.read_json(_MANIFEST) or {}).get("plugins", ()))
        before = _options(run_file.read(self.file(_RUN))[0], observers)
        now = _options(json.loads(json.dumps(resolved)), observers)
        changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)} - _FREE
        if changed & set(_SPLIT) and _rows_of_a_step(before) == _rows_of_a_step(now):
            changed -= set(_SPLIT)
            log.warning("the rows of a step are split otherwise: the same but for rounding, and other dropout if any")
        if rounding := sorted(changed & _ROUNDING):
            log.warning("%s changed: the results are the same but for rounding", ", ".join(rounding))
        if wrong := sorted(changed - _ROUNDING):
            name = wrong[0]
            raise ConfigError(
                f"--resume: {self.path} was begun with {name} {_shown(before, name)}, and is {_shown(now, name)} now"
                f"{f', and {len(wrong) - 1} more differ' if wrong[1:] else ''}; give the same options, or begin "
                "another run with --output-dir"
            )

    def check_inputs(self, manifest: Mapping[str, Any]) -> None:
        """Raises ConfigError when model or data are not those of the manifest; notes other versions."""
        before = self.read_json(_MANIFEST)
        if before is None:
            log.warning("%s is missing: whether model and data are the same is not known", self.file(_MANIFEST))
            return
        now = json.loads(json.dumps(manifest))
        for what in ("model", "data", "eval_data"):
            if _content(before.get(what)) != _content(now[what]):
                raise ConfigError(
                    f"--resume: {self.path} was begun with another content of {what.replace('_', ' ')}; bring back "
                    "what was there, or begin another run with --output-dir"
                )
        versions, others = _versions(now), _versions(before)
        changed = [
            f"{name} {others.get(name)} -> {version}"
            for name, version in versions.items()
            if others.get(name) != version
        ]
        if changed:
            log.warning("not what this run was begun with: %s; results may differ", ", ".join(changed))

    def finished(self) -> Result | None:
        """What the run here came to, when it has come to its end."""
        summary = self.read_json(_SUMMARY) if self.resumed else None
        is_there = summary is not None and Path(str(summary.get("artefact"))).is_dir()
        return Result(self.path, summary) if summary is not None and is_there else None

    def write_start(self, resolved: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Writes what a run is before anything of it is done. Raises OutputError."""
        run_file.write(dict(resolved), self.file(_RUN))
        atomic_files.write_json(self.file(_MANIFEST), manifest)

    def complete(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest of a run that goes on, where it is missing. Raises OutputError."""
        if not self.file(_MANIFEST).exists():
            atomic_files.write_json(self.file(_MANIFEST), manifest)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes what it came to: the last thing that a run does. Raises OutputError."""
        atomic_files.write_json(self.file(_SUMMARY), summary)

    def claim(self) -> bool:
        """Makes the directory and keeps others out; False when another process has it. Raises OutputError."""
        if self._lock is not None:
            return True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Given up by the system when the process ends, however it ends.
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError as error:
            if self._lock is None or error.errno not in _NO_LOCKS:
                raise OutputError(f"output_dir {self.path}: cannot be written: {one_line(error)}") from error
            log.warning("%s lies on a file system without locks: see to it that one process works in it", self.path)
        if self.resumed:
            atomic_files.remove_leftovers(self.path)
        elif _holds(self.path):
            self.release()
            return False
        return True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps others out of a run that goes on, from before anything of it is read. Raises OutputError."""
        if self.resumed and not self.claim():
            raise OutputError(f"--resume: another process is at work in {self.path}; wait for its end, or stop it")
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Lets others in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in that file; None where there is none. Raises OutputError."""
        try:
            values: dict[str, Any] = json.loads(self.file(name).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it is no JSON object")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.file(name)}: cannot be read: {one_line(error)}") from error
        return values


def new(wanted: str | None, name: str) -> RunDirectory:
    """Where a new run will lie. Raises OutputError when that holds something already."""
    if wanted is None:
        return RunDirectory(_numbered(name, 1 + _last_number(name)))
    path = _checked(wanted)
    if _holds(path):
        is_run = (path / _RUN).exists()
        what, hint = ("a run", ", or go on with it: --resume") if is_run else ("files", "")
        raise OutputError(
            f"output_dir {wanted}: holds {what} already, which is never written over; choose another{hint}"
        )
    return RunDirectory(path)


def resume(wanted: str | None, name: str) -> RunDirectory:
    """Where the run lies that is to go on, or would have begun. Raises OutputError when there are other files."""
    path = _begun(wanted, name)
    if (path / _RUN).exists():
        return RunDirectory(path, resumed=True)
    if _holds(path):
        raise OutputError(f"--resume: {path} holds files and no run; name the directory of the run")
    log.warning("--resume: there is no run in %s yet; it begins", path)
    return RunDirectory(path)


def _begun(wanted: str | None, name: str) -> Path:
    """The directory of that name, or the last that was numbered, or the first that would be."""
    if wanted is not None:
        return _checked(wanted)
    return _numbered(name, max(1, _last_number(name)))


def _numbered(name: str, number: int) -> Path:
    return Path("runs") / f"{name}-{number}"


def _last_number(name: str) -> int:
    """Of the runs of that name; 0 when there is none."""
    pattern = re.compile(re.escape(name) + r"-(\d{1,9})")
    entries = Path("runs").iterdir() if Path("runs").is_dir() else ()
    return max((int(match[1]) for path in entries if (match := pattern.fullmatch(path.name))), default=0)


def _checked(wanted: str) -> Path:
    """The directory of that name, there or not. Raises OutputError for a file."""
    try:
        path = Path(wanted).expanduser()
        is_file = not path.is_dir() and (path.exists() or path.is_symlink())
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"output_dir {wanted}: cannot be used: {one_line(error)}") from error
    if is_file:
        raise OutputError(f"output_dir {wanted}: is a file; name a directory that does not exist yet")
    return path


def _holds(path: Path) -> bool:
    """Whether anything is in it but what a process that was killed at its very beginning left."""
    try:
        return path.is_dir() and any(file.name != f".{_RUN}.part" for file in path.iterdir())
    except OSError as error:
        raise OutputError(f"output_dir {path}: cannot be used: {one_line(error)}") from error


def _options(values: Mapping[str, Any], observers: Collection[str]) -> dict[str, Any]:
    """By dotted names; and the names of the plugins, whose order is that of their application. No observers."""
    if not isinstance(values.get("plugins"), dict):
        raise OutputError(f"{_RUN}: is not what a run has written; begin another one with --output-dir")
    plugins = {name: options for name, options in values["plugins"].items() if name not in observers}
    options = flatten({**values, "plugins": plugins})
    options["plugins"] = list(plugins)
    return options


def _observers(plugins: Iterable[Mapping[str, str]]) -> set[str]:
    """The names of those that fill no other stage, of the lines of an assembled table."""
    stages: dict[str, set[str]] = {}
    for line in plugins:
        stages.setdefault(line["plugin"], set()).add(line["stage"])
    return {name for name, filled in stages.items() if filled == {"observer"}}


def _rows_of_a_step(values: Mapping[str, Any]) -> int:
    size, times = (values[name] for name in _SPLIT)
    return int(size * times)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return shorten(json.dumps(values[name], ensure_ascii=False), 120) if name in values else "not set"


def _content(described: Any) -> Any:
    """What was hashed of a model, or of sources."""
    if isinstance(described, dict):
        return described.get("sha256"), described.get("revision")
    return [source.get("fingerprint") for source in described or ()]


def _versions(manifest: Mapping[str, Any]) -> dict[str, Any]:
    plugins = {f"plugin {plugin['plugin']}": plugin["version"] for plugin in manifest.get("plugins", ())}
    named = {name: manifest.get(name) for name in ("sftx", "python", "device", "num_threads", "dtype")}
    named["processes"] = manifest.get("num_processes", 1)
    return {**named, **manifest.get("libraries", {}), **plugins}
