"""Run directories in stores: where a run with a remote output works, and what another machine fetches of one.

A remote run directory has the files of a local one. `checksums.json` is the last file of a checkpoint that is uploaded:
a checkpoint without it, or without a file that it names, is not complete and is not read. `summary.json` follows the
result in the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftx import atomic_files, stores
from sftx.checkpoint import layout
from sftx.checkpoint.run_directory import RunDirectory
from sftx.config import run_file
from sftx.config.flatten import flatten
from sftx.config.options import RunConfig, effects_on_resume
from sftx.errors import ConfigError, ModelError, OutputError, SftxError, one_line
from sftx.paths import cache_dir
from sftx.stores import RemoteDirectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputPlace:
    """The directory that a run writes to, and the address to which that is uploaded."""

    directory: str | None
    """None: the default output directory."""
    address: str | None
    is_staged: bool = False
    """Whether the directory is one in the cache, since output_dir itself is an address."""


def output_place(config: RunConfig) -> OutputPlace:
    """Return the places of a run. One whose output_dir is an address works in the cache. Raises ConfigError."""
    out, address = config.output_dir, config.upload_to
    if out is None or not stores.is_address(out):
        return OutputPlace(out, address)
    if address is not None:
        raise ConfigError("option 'upload_to': output_dir is an address in a store already; leave one of them out")
    name = out.rstrip("/").rpartition("/")[2]
    digest = hashlib.sha256(out.rstrip("/").encode()).hexdigest()[:12]
    return OutputPlace(str(cache_dir() / "runs" / f"{name}-{digest}"), out, is_staged=True)


def open_directory(address: str) -> RemoteDirectory:
    """Return the directory in the store. Raises OutputError."""
    try:
        return RemoteDirectory(address)
    except SftxError as error:
        raise OutputError(str(error)) from error


def check_new(address: str) -> None:
    """Check that nothing is there yet, and that it can be written to. Raises OutputError."""
    try:
        sizes = RemoteDirectory(address).check()
    except SftxError as error:
        raise OutputError(str(error)) from error
    if sizes:
        is_run = layout.RUN in sizes
        what, hint = ("a run", ", or go on with it: --resume") if is_run else ("files", "")
        raise OutputError(f"{address}: holds {what} already, which is never written over; choose another{hint}")


def fetch_newer(address: str, path: Path) -> None:
    """Make the run directory `path` what the store has, where that is further than what is here.

    These are its files, its newest complete checkpoint and the best one, and of a complete run the result. When the
    store cannot be reached, a run that is here goes on from here. Raises OutputError.
    """
    if path.is_dir() and any(path.iterdir()) and not (path / layout.RUN).exists():
        return  # run_directory.resume refuses it
    directory = RunDirectory(path, resumed=True)
    with directory.held():
        _fetch_newer(address, directory)
    with contextlib.suppress(OSError):
        path.rmdir()  # where nothing was fetched; it refuses to remove what is not empty


def _fetch_newer(address: str, directory: RunDirectory) -> None:
    is_here, remote = directory.file(layout.RUN).exists(), open_directory(address)
    try:
        sizes = remote.look()
        if layout.RUN not in sizes:
            if sizes:
                raise OutputError(f"--resume: {address} holds files and no run; name the directory of the run")
            if not is_here:
                check_new(address)
            return
        if is_here:
            _check_same_run(remote, directory)
        complete = complete_checkpoints(remote, sizes)
        is_ended = remote.read(layout.SUMMARY) is not None and not directory.file(layout.SUMMARY).exists()
        newest, newest_here = max(complete, default=0), max(local_checkpoints(directory.path), default=0)
        if is_here and (newest < newest_here or (newest == newest_here and not is_ended)):
            return
        log.info("%s: fetched from %s", directory.path, f"step {newest} of {address}" if complete else address)
        _fetch(remote, sizes, directory.path, complete)
    except OutputError:
        raise
    except Exception as error:  # each library of a store has its own
        said = str(error) if isinstance(error, SftxError) else f"{address}: cannot be read: {one_line(error)}"
        if not is_here:
            raise OutputError(said) from error
        log.warning("%s; the run goes on from what is in %s", said, directory.path)


def _check_same_run(remote: RemoteDirectory, directory: RunDirectory) -> None:
    """Raise OutputError when what is in the store is another run than the one that is here."""
    content = remote.read(layout.RUN)
    values, _ = run_file.parse((content or b"").decode(errors="replace"), f"{remote.address}/{layout.RUN}")
    mine, _ = run_file.read(directory.file(layout.RUN))
    effects = effects_on_resume()
    theirs, ours = flatten(values if isinstance(values, dict) else {}), flatten(mine)
    changed = sorted(
        name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name) and name not in effects
    )
    if changed:
        raise OutputError(
            f"--resume: {remote.address} holds another run than {directory.path} ({', '.join(changed[:3])} differ); "
            "choose another place with --upload-to"
        )


def local_checkpoints(directory: Path) -> dict[int, Path]:
    """Return the complete checkpoints of a run directory of this machine by step, oldest first."""
    found = layout.find_checkpoints(directory / layout.CHECKPOINTS)
    return {step: path for step, path in found.items() if (path / atomic_files.CHECKSUMS).is_file()}


def complete_checkpoints(remote: RemoteDirectory, sizes: Mapping[str, int]) -> dict[int, bytes]:
    """Return the content of checksums.json of each checkpoint in the store that is complete, by step, oldest first.

    `sizes`: the files of the run. Raises what the store's library raises.
    """
    complete: dict[int, bytes] = {}
    for name in sizes:
        place, _, last = name.rpartition("/")
        step = layout.step_of(place)
        if last == atomic_files.CHECKSUMS and step is not None:
            content = remote.read(name)
            written = _checksums(content)
            if content and written and all(sizes.get(f"{place}/{file}") == size for file, size in written.items()):
                complete[step] = content
    return dict(sorted(complete.items()))


def _checksums(content: bytes | None) -> dict[str, int]:
    """Return the sizes that a checksums.json lists; none for what is no such file, or a part of one."""
    try:
        values = json.loads(content or b"")
        return {str(name): int(entry["bytes"]) for name, entry in values.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _fetch(remote: RemoteDirectory, sizes: Mapping[str, int], directory: Path, complete: Mapping[int, bytes]) -> None:
    """Copy a run to this machine. run.yaml comes first and summary.json last: what is killed here is fetched again."""
    files = {name: size for name, size in sizes.items() if name.partition("/")[0] not in _PARTS}
    is_ended = files.pop(layout.SUMMARY, None) is not None
    for name in sorted(files, key=lambda name: name != layout.RUN):
        remote.download(name, directory / name, files[name])
    if not is_ended:
        atomic_files.remove(directory / layout.SUMMARY)
    for step in sorted(complete, reverse=True):
        if (best := _fetch_checkpoint(remote, complete[step], directory, step)) is None:
            continue
        if best != step and best in complete:
            _fetch_checkpoint(remote, complete[best], directory, best)
        break
    if is_ended:
        for result in (layout.ADAPTER, layout.MODEL):
            if names := [name for name in sizes if name.startswith(f"{result}/")]:
                with atomic_files.atomic_directory(directory / result) as part:
                    for name in names:
                        remote.download(name, part / name.partition("/")[2], sizes[name])
        remote.download(layout.SUMMARY, directory / layout.SUMMARY, sizes[layout.SUMMARY])


_PARTS = (layout.CHECKPOINTS, layout.ADAPTER, layout.MODEL, layout.EXPORT, layout.MERGED)
"""Directories of a run that are not fetched with its files."""


def _fetch_checkpoint(remote: RemoteDirectory, checksums: bytes, directory: Path, step: int) -> int | None:
    """Copy a checkpoint; return the step of the best one, or its own. None: what came is not what was written."""
    place = layout.checkpoint_path(directory / layout.CHECKPOINTS, step)
    if atomic_files.find_damage(place) is None:
        return _best_step(place) or step
    name = f"{layout.CHECKPOINTS}/{place.name}"
    with atomic_files.atomic_directory(place) as part:
        for file, size in _checksums(checksums).items():
            remote.download(f"{name}/{file}", part / file, size)
        (part / atomic_files.CHECKSUMS).write_bytes(checksums)
    damage = atomic_files.find_damage(place)
    if damage is None:
        return _best_step(place) or step
    log.warning("%s/%s is damaged: %s", remote.address, name, damage)
    atomic_files.remove(place)
    return None


def _best_step(place: Path) -> int | None:
    state: Any = json.loads((place / layout.RUN_STATE).read_text(encoding="utf-8"))
    best = state.get("run", {}).get("best_step")
    return None if best is None else int(best)


# --- finished runs --------------------------------------------------------------------------------


def local_copy(address: str, *, result: bool = True) -> Path:
    """Return a copy of a run, of its result or one of its checkpoints, or of another adapter or model in a store.

    `result`: the result of a run is needed. Raises ModelError.
    """
    try:
        return _local_copy(address.rstrip("/"), result=result)
    except ModelError:
        raise
    except SftxError as error:
        raise ModelError(str(error)) from error


def _local_copy(address: str, *, result: bool) -> Path:
    root, inner = _run_and_part(address)
    found = stores.find(root)
    if found.kind != "directory" or layout.RUN not in found.names:
        return stores.model_directory(root)
    parts: tuple[str, ...] = (inner,) if inner else (layout.ADAPTER, layout.MODEL) if result else ()
    if layout.step_of(inner) is None and parts and layout.SUMMARY not in found.names:
        complete = _complete_places(root, found.names)
        hint = f", or load its last checkpoint, {root}/{complete[-1]}" if complete else ""
        raise ModelError(f"{address}: this run has no result yet; finish it with sftx run --resume{hint}")
    if layout.step_of(inner) is not None and inner not in _complete_places(root, found.names):
        raise ModelError(f"{address}: this checkpoint is not complete; take another one")
    copy = stores.fetch(root, lambda name: "/" not in name or name.startswith(tuple(f"{part}/" for part in parts)))
    if layout.step_of(inner) is not None and (damage := atomic_files.find_damage(copy / inner)) is not None:
        raise ModelError(f"{address}: is damaged: {damage}; take another checkpoint")
    return copy / inner


def _complete_places(root: str, names: Collection[str]) -> list[str]:
    """Return the complete checkpoints of a run in a store, oldest first, as `checkpoints/step-N`."""
    last = f"/{atomic_files.CHECKSUMS}"
    listed = [name.removesuffix(last) for name in names if name.endswith(last)]
    steps = {place: step for place in listed if (step := layout.step_of(place)) is not None}
    places = sorted(steps, key=lambda place: steps[place])
    copy = stores.fetch(root, lambda name: name.removesuffix(last) in places)
    written = {place: _checksums((copy / f"{place}{last}").read_bytes()) for place in places}
    return [place for place in places if written[place] and all(f"{place}/{file}" in names for file in written[place])]


def _run_and_part(address: str) -> tuple[str, str]:
    """Return the directory of the run that an address is in, and what of it is named: the empty string for all."""
    parent, _, name = address.rpartition("/")
    grandparent, _, of = parent.rpartition("/")
    if layout.step_of(f"{of}/{name}") is not None:
        return grandparent, f"{of}/{name}"
    if name in (layout.ADAPTER, layout.MODEL):
        try:
            if layout.RUN in stores.find(parent).names:
                return parent, name
        except SftxError:
            pass  # a directory of that name, in a place that is not a directory
    return address, ""
