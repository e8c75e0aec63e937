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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

from sftx import atomic_files, paths
from sftx.checkpoint import layout
from sftx.config import run_file
from sftx.config.flatten import flatten
from sftx.config.options import OnResume, RunConfig, as_dict, effects_on_resume
from sftx.config.validation import validate
from sftx.errors import ConfigError, OutputError, one_line
from sftx.events import Result
from sftx.model import names

log = logging.getLogger(__name__)

_SPLIT: Final = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
"""The factors of `train.train_batch_size`, which sftx 0.1 did not record."""

_LOSSES: Final = ("loss", "perplexity", "token_accuracy")
"""Held-out metrics for which no row is answered."""

_LOCKS_UNSUPPORTED: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass
class RunDirectory:
    """The directory of one run."""

    path: Path
    resumed: bool = False
    """True when the directory holds a run that is to go on."""
    has_new_length: bool = False
    """True when that run is to train for another number of steps than it was begun with."""
    _unlock: Callable[[], object] | None = None
    """What releases the lock, while this process has it."""

    def file(self, name: str) -> Path:
        return self.path / name

    def check_same(self, resolved: Mapping[str, Any], plugins: Sequence[Mapping[str, Any]]) -> None:
        """Raise ConfigError, which names every difference, when `resolved` would give other weights than the run here.

        `plugins` are the rows of the assembled table. What an option changes stands in its declaration (`OnResume`);
        plugins that only observe change nothing, those that only measure change the answers.
        """
        now: dict[str, Any] = json.loads(json.dumps(resolved))
        before = run_file.read(self.file(layout.RUN))[0]
        if not isinstance(before.get("plugins"), dict):
            raise OutputError(f"{layout.RUN}: is not what a run has written; begin another one with --output-dir")
        before["model"] = names.absolute(str(before.get("model")))  # sftx 0.1 recorded it as it was typed
        tables = ((self.read_json(layout.MANIFEST) or {}).get("plugins", ()), plugins)
        found = _differences(before, now, *map(_stages, tables))
        decides = {*_decisive(before), *_decisive(now)}
        wrong = [text for effect, text in found if effect is None]
        wrong += [f"{text}, which decides the best checkpoint" for effect, text in found if effect in decides]
        if wrong:
            more = f"; and {len(wrong) - 8} more" if wrong[8:] else ""
            raise ConfigError(
                f"--resume: {self.path} was begun with other options: {'; '.join(wrong[:8])}{more}; give the same, or "
                "begin another run with --output-dir"
            )
        effects = [effect for effect, _ in found]
        if texts := [text for effect, text in found if effect is OnResume.LENGTH]:
            self.has_new_length = True
            log.warning("%s: from here on the learning rate is that of a run of the new length", "; ".join(texts))
        if OnResume.SPLIT in effects:
            log.warning(
                "the rows of a step are split into other micro-batches: the results are the same but for rounding, "
                "and for the numbers that dropout draws"
            )
        for effect, meaning in (
            (OnResume.ROUNDING, "the results are the same but for rounding"),
            (OnResume.EVALUATIONS, "the weights are the same"),
            (OnResume.ANSWERS, "the weights are the same"),
        ):
            if texts := [text for changed, text in found if changed is effect]:
                log.warning("%s: %s", "; ".join(texts), meaning)

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
        for what in ("model", "data", "eval_data", "eval_split"):
            if _hashes(before.get(what)) != _hashes(now.get(what)):
                raise ConfigError(
                    f"--resume: {self.path} was begun with another content of {what.replace('_', ' ')}; bring back "
                    "what was there, or begin another run with --output-dir"
                )
        versions, versions_before = _versions(now), _versions(before)
        changed = [
            f"{name} {versions_before.get(name)} -> {version}"
            for name, version in versions.items()
            if versions_before.get(name) != version and (name in versions_before or not name.startswith("plugin "))
        ]
        if changed:
            log.warning("not what this run was begun with: %s; results may differ", ", ".join(changed))

    def finished(self) -> Result | None:
        """Return the result of a run that is complete and has the length that is asked for, None for any other."""
        summary = self.read_json(layout.SUMMARY) if self.resumed and not self.has_new_length else None
        # Written under another path where the directory was moved, or fetched from another machine.
        artefact = self.file(Path(str((summary or {}).get("artefact"))).name)
        if summary is None or not artefact.is_dir():
            return None
        return Result(self.path, {**layout.with_new_names(summary), "artefact": str(artefact)})

    def write_start(self, resolved: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Write the run's options and manifest, before its first step. Raises OutputError."""
        run_file.write(dict(resolved), self.file(layout.RUN))
        atomic_files.write_json(self.file(layout.MANIFEST), manifest)

    def check_extension(self, checkpoint: Path | None) -> None:
        """Raise OutputError when a complete run is to train for longer and has no checkpoint to go on from."""
        if self.has_new_length and checkpoint is None and self.file(layout.SUMMARY).exists():
            raise OutputError(
                f"--resume: {self.path} is complete and kept no checkpoint (train.save_steps), so that it cannot go "
                "on; train on from its result instead, with --model"
            )

    def continue_with(self, resolved: Mapping[str, Any], step: int) -> None:
        """Record the options of a run that goes on after `step` to another length. Raises OutputError.

        The summary marked it as complete, and is removed first: a run that is killed here is incomplete.
        """
        atomic_files.remove(self.file(layout.SUMMARY))
        manifest = self.read_json(layout.MANIFEST)
        if manifest is not None:
            length = {name: resolved["train"][name] for name in ("num_train_epochs", "max_steps")}
            changes = [*manifest.get("length_changes", ()), {"after_step": step, **length}]
            atomic_files.write_json(self.file(layout.MANIFEST), {**manifest, "length_changes": changes})
        run_file.write(dict(resolved), self.file(layout.RUN))

    def complete(self, manifest: Mapping[str, Any], step: int) -> None:
        """Write the manifest of a run that goes on after `step` when it is missing, else what that adds to it.

        These are the plugins that the run did not have before: observers and metrics. Raises OutputError.
        """
        before = self.read_json(layout.MANIFEST)
        if before is None:
            atomic_files.write_json(self.file(layout.MANIFEST), manifest)
            return
        known = [(line.get("stage"), line.get("plugin")) for line in before.get("plugins", ())]
        new = [line for line in manifest["plugins"] if (line["stage"], line["plugin"]) not in known]
        if new:
            plugins = [*before.get("plugins", ()), *({**line, "since_step": step + 1} for line in new)]
            atomic_files.write_json(self.file(layout.MANIFEST), {**before, "plugins": plugins})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks the run as complete. Raises OutputError."""
        atomic_files.write_json(self.file(layout.SUMMARY), summary)

    def claim(self) -> bool:
        """Make and lock the directory. Return False when another process has it. Raises OutputError."""
        if self._unlock is not None:
            return True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._unlock = _lock(self.path)
        except BlockingIOError:
            return False
        except OSError as error:
            raise OutputError(f"output_dir {self.path}: cannot be written: {one_line(error)}") from error
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
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

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


def _lock(path: Path) -> Callable[[], object]:
    """Lock a directory, and return what releases it. Raises BlockingIOError when another process has it, or OSError.

    The lock is flock on the directory itself, which the system releases when the process ends, however it ends. The
    package filelock needs a lock file, which is left behind; it locks one beside the directory where there is no flock.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such module, and opens no directories
        from filelock import FileLock, Timeout

        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError from None
        return lock.release
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _LOCKS_UNSUPPORTED:
            os.close(descriptor)
            raise
        log.warning("%s is on a file system without locks: make sure that only one process writes to it", path)
    return partial(os.close, descriptor)


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


def path_to_resume(output_dir: str | None, name: str) -> Path:
    """Return the path of the run that is to go on: `output_dir`, or by default the last `runs/<name>-<number>`.

    Raises OutputError for a file.
    """
    return Path("runs") / f"{name}-{max(1, _last_number(name))}" if output_dir is None else _checked(output_dir)


def resume(output_dir: str | None, name: str) -> RunDirectory:
    """Return the directory of the run that is to go on (`path_to_resume`).

    When it does not exist or is empty, the run begins there. Raises OutputError when it has files but no run.
    """
    path = path_to_resume(output_dir, name)
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
        is_file = (paths.exists(path) or path.is_symlink()) and not path.is_dir()
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


def _stages(table: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the plugins of each stage of an assembled table, in their order."""
    stages: dict[str, list[str]] = {}
    for line in table:
        stages.setdefault(line["stage"], []).append(line["plugin"])
    return stages


def _decisive(values: Mapping[str, Any]) -> list[OnResume]:
    """Return what may not change as it decides which checkpoint is the best, and with it the weights of the result."""
    train: Mapping[str, Any] = values["train"]
    if not (train.get("load_best_model_at_end") or train.get("early_stopping_patience")):
        return []
    metric = str(train.get("metric_for_best_model") or "loss").removeprefix("eval_")
    return [OnResume.EVALUATIONS] if metric in _LOSSES else [OnResume.EVALUATIONS, OnResume.ANSWERS]


def _completed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recorded run file with the defaults of the options that are newer than it."""
    try:
        return as_dict(validate(RunConfig, values, origins=run_file.Origins()))
    except ConfigError:  # it has options that no longer exist, which are differences
        return values


def _differences(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    stages_before: Mapping[str, Sequence[str]],
    stages_now: Mapping[str, Sequence[str]],
) -> list[tuple[OnResume | None, str]]:
    """Return what differs between two run files with every default written out, and what that changes: None is weights.

    An option that is newer than the run had its default.
    """
    effects = effects_on_resume()
    kinds: dict[str, set[str]] = {}
    for stage, plugins in (*stages_before.items(), *stages_now.items()):
        for name in plugins:
            kinds.setdefault(name, set()).add(stage)

    def effect_of(plugin: str) -> OnResume | None:
        stages = kinds.get(plugin, set())
        if not stages or not stages <= {"observer", "metric"}:
            return None
        return OnResume.ANSWERS if "metric" in stages else OnResume.NOTHING

    # Plugins are compared below, and how a run is started changes nothing in it.
    left_out: dict[str, Any] = {"plugins": {}, "launch": None}
    flat_before, flat_now = (flatten({**values, **left_out}) for values in (_completed(before), now))
    flat_before["train.train_batch_size"] = _rows_per_step(flatten(before))
    found: list[tuple[OnResume | None, str]] = []
    for name in sorted(flat_before.keys() | flat_now.keys()):
        if flat_before.get(name) != flat_now.get(name):
            text = f"{name} was {_shown(flat_before, name)} and is {_shown(flat_now, name)}"
            found.append((effects.get(name), text))
    named_before, named_now = before["plugins"], now["plugins"]
    found += [(effect_of(name), f"{name} was added") for name in named_now if name not in named_before]
    found += [(effect_of(name), f"{name} was removed") for name in named_before if name not in named_now]
    for plugin in [name for name in named_before if name in named_now]:
        old, new = (flatten(values["plugins"][plugin] or {}) for values in (before, now))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                text = f"{plugin}.{name} was {_shown(old, name)} and is {_shown(new, name)}"
                found.append((effect_of(plugin), text))
    for stage in [stage for stage in stages_before if stage in stages_now]:
        old_order = [name for name in stages_before[stage] if name in stages_now[stage]]
        new_order = [name for name in stages_now[stage] if name in stages_before[stage]]
        if old_order != new_order and stage not in ("observer", "metric"):
            found.append((None, f"the order of {stage}s was {', '.join(old_order)} and is {', '.join(new_order)}"))
    return [(effect, text) for effect, text in found if effect is not OnResume.NOTHING]


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
