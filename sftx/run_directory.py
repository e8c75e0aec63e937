"""The directory of a run: which one it is, that nobody's work is written over, and whether an old one can go on."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sftx import run_file, whole_files
from sftx.errors import ConfigError, OutputError, one_line
from sftx.reports import Result

log = logging.getLogger(__name__)

_RUN, _MANIFEST, _SUMMARY = "run.yaml", "manifest.json", "summary.json"

_FREE: Final = frozenset(
    {"output_dir", "data.num_proc", "data.cache", "generation.num_samples", "train.logging_steps", "train.save_steps"}
    | {"train.save_minutes", "train.save_total_limit"}
)
"""What a run that goes on may have otherwise than before, without any effect on what it computes."""

_ROUNDING: Final = frozenset(
    {"generation.batch_size", "train.per_device_eval_batch_size", "train.gradient_checkpointing"}
    | {"train.selective_checkpointing", "train.torch_compile", "train.use_cpu"}
)
"""What only changes the order in which numbers are added."""

_SPLIT: Final = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
"""Their product is the rows of a step, which decides the data's order; how it is split does not."""


@dataclass
class RunDirectory:
    """A place for one run. `resumed`: it holds one that is to go on."""

    path: Path
    resumed: bool = False
    _lock: int | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def file(self, name: str) -> Path:
        return self.path / name

    def check_same(self, resolved: Mapping[str, Any]) -> None:
        """Raises ConfigError when the run that is to go on here was another than `resolved`."""
        before = _options(run_file.read(self.file(_RUN))[0])
        now = _options(json.loads(json.dumps(resolved)))
        changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)} - _FREE
        if changed & set(_SPLIT) and _rows_of_a_step(before) == _rows_of_a_step(now):
            changed -= set(_SPLIT)
            log.warning("the rows of a step are split otherwise than before: the same but for rounding")
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
            return
        now = json.loads(json.dumps(manifest))
        for what in ("model", "data", "eval_data"):
            if _content(before[what]) != _content(now[what]):
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

    def write_start(self, resolved: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Writes what a run is before anything of it is done. Raises OutputError."""
        run_file.write(dict(resolved), self.file(_RUN))
        whole_files.write_json(self.file(_MANIFEST), manifest)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes what it came to: the last thing that a run does. Raises OutputError."""
        whole_files.write_json(self.file(_SUMMARY), summary)

    def claim(self) -> bool:
        """Makes the directory and keeps others out; False when another run has it. Raises OutputError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Given up by the system when the process ends, however it ends.
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError as error:
            raise OutputError(f"output_dir {self.path}: cannot be written: {one_line(error)}") from error
        whole_files.sweep(self.path)
        if not self.resumed and _holds(self.path):
            self.release()
            return False
        return True

    def release(self) -> None:
        """Lets others in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in that file; None where there is none. Raises OutputError."""
        try:
            values: dict[str, Any] = json.loads(self.file(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.file(name)}: cannot be read: {one_line(error)}") from error
        return values


def new(wanted: str | None, name: str) -> RunDirectory:
    """Where a new run will lie. Raises OutputError when that holds something already."""
    if wanted is None:
        return RunDirectory(next(path for path in _numbered(name) if not path.exists()))
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


def finished(wanted: str | None, name: str) -> Result | None:
    """The run that would go on, when it has come to its end."""
    directory = RunDirectory(_begun(wanted, name))
    summary = directory.read_json(_SUMMARY)
    return None if summary is None else Result(directory.path, summary)


def _begun(wanted: str | None, name: str) -> Path:
    """The directory of that name, or the last that was numbered, or the first that would be."""
    if wanted is not None:
        return _checked(wanted)
    taken = list(itertools.takewhile(Path.exists, _numbered(name)))
    return taken[-1] if taken else next(_numbered(name))


def _numbered(name: str) -> Iterator[Path]:
    return (Path("runs") / f"{name}-{n}" for n in itertools.count(1))


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
    """Whether anything is in it but what an interrupted write left."""
    try:
        return path.is_dir() and any(not file.name.endswith(".part") for file in path.iterdir())
    except OSError as error:
        raise OutputError(f"output_dir {path}: cannot be used: {one_line(error)}") from error


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted names; and the names of the plugins, whose order is that of their application."""
    options = _flat(values)
    options["plugins"] = list(values["plugins"])
    return options


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def _rows_of_a_step(values: Mapping[str, Any]) -> int:
    size, times = (values[name] for name in _SPLIT)
    return int(size * times)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False) if name in values else "not set"


def _content(described: Any) -> Any:
    """What was hashed of a model, or of sources."""
    if isinstance(described, dict):
        return described.get("sha256")
    return [source.get("fingerprint") for source in described]


def _versions(manifest: Mapping[str, Any]) -> dict[str, Any]:
    plugins = {f"plugin {plugin['plugin']}": plugin["version"] for plugin in manifest["plugins"]}
    named = {name: manifest[name] for name in ("sftx", "python", "device", "dtype")}
    return {**named, **manifest["libraries"], **plugins}
