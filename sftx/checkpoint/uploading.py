"""Copies a run directory to a store while the run trains: in a thread, and again until it has arrived.

The directory on this machine is what counts, and the store is made like it. A checkpoint is complete there when its
`checksums.json` is, which comes last; an older one is removed when the newer ones are complete. What cannot be uploaded
is said once and tried again, with longer and longer pauses; training never waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sftx import atomic_files
from sftx.checkpoint import layout
from sftx.checkpoint.remote_runs import complete_checkpoints, local_checkpoints, open_directory
from sftx.errors import OutputError, counted, one_line
from sftx.phases import phase
from sftx.stores import RemoteDirectory

log = logging.getLogger(__name__)

_LOGS_S = 60.0
"""Seconds after which files that have grown, such as metrics.jsonl, are uploaded between two checkpoints."""
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_RESULTS: Final = (layout.ADAPTER, layout.MODEL)


class UploadError(OutputError):
    """A run is complete on this machine, and not all of it could be uploaded."""

    exit_code = 74  # EX_IOERR: whoever removes this machine at the end of the run should not


class _StoppedError(Exception):
    """Nobody waits for the upload any more."""


class _VanishedError(Exception):
    """A file was removed on this machine before it was uploaded."""


@dataclass
class Upload:
    """Makes the directory in the store like the run directory, one file after the other."""

    remote: RemoteDirectory
    directory: Path
    limit: int | None
    """Checkpoints that are kept in the store, besides the best; None: all."""
    best: int | None = None
    """The step of the best checkpoint so far."""
    busy: int | None = None
    """The step of the checkpoint that is being uploaded, and is not to be removed meanwhile."""
    moved_at: float = field(default_factory=time.monotonic)
    """When something last moved. Pieces of a file that has failed before do not count, so that waiting has an end."""
    has_failed: bool = False
    """Whether something failed since the last file that arrived."""
    is_stopped: bool = False
    """Whether no other file is to be uploaded."""
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size and time of the files that were uploaded by this process, by their names."""
    _complete: dict[int, bytes] | None = None
    """The content of checksums.json of each complete checkpoint in the store; None: not looked at yet."""
    _parts: set[int] = field(default_factory=set)
    """Steps of which the store has any file."""
    _has_summary: bool = False

    def bring_up_to_date(self) -> None:
        """Upload what is missing in the store, and remove what is surplus. Raises what the store's library raises."""
        while self._has_vanished():
            pass

    def _has_vanished(self) -> bool:
        """Go through the run directory once; return whether a checkpoint was removed in it meanwhile."""
        complete, has_vanished = self._look(), False
        summary = self.directory / layout.SUMMARY
        if self._has_summary and not summary.exists():  # the run goes on: its result will be another one
            self.remote.remove([layout.SUMMARY])
            self._has_summary = False
        for name, file in _files(self.directory):
            if name.partition("/")[0] not in (layout.CHECKPOINTS, *_RESULTS) and name != layout.SUMMARY:
                self._send(name, file)
        is_complete = summary.exists()  # before checkpoints are listed: the last one is there then, and is sent first
        kept = list(local_checkpoints(self.directory).items())
        if self.limit is not None:  # one that is surplus here as well was kept as long as it was uploaded
            kept = [(step, path) for step, path in kept if step == self.best or (step, path) in kept[-self.limit :]]
        for step, checkpoint in reversed(kept):
            try:
                self._send_checkpoint(step, checkpoint)
            except _VanishedError:  # as there are newer ones
                has_vanished = True
        self._remove_surplus(complete)
        if is_complete:
            for name, file in _files(self.directory):
                if name.partition("/")[0] in _RESULTS:
                    self._send(name, file)
            self._send(layout.SUMMARY, summary)
            self._has_summary = True
        return has_vanished

    def missing(self) -> list[str]:
        """Return what is not uploaded: checkpoints by their names, and other files as one entry."""
        complete = self._complete or {}
        found = [path.name for step, path in local_checkpoints(self.directory).items() if step not in complete]
        others = [
            name
            for name, file in _files(self.directory)
            if name.partition("/")[0] != layout.CHECKPOINTS and self._sent.get(name) != _state(file)
        ]
        return [*found, *([counted(len(others), "other file" if found else "file")] if others else [])]

    def _look(self) -> dict[int, bytes]:
        if self._complete is None:
            sizes, summary = self.remote.sizes(), self.directory / layout.SUMMARY
            complete = complete_checkpoints(self.remote, sizes)
            self._has_summary = layout.SUMMARY in sizes
            if self._has_summary and summary.exists() and self.remote.read(layout.SUMMARY) == summary.read_bytes():
                results = [(name, file) for name, file in _files(self.directory) if name.partition("/")[0] in _RESULTS]
                self._sent |= {name: _state(file) for name, file in results if sizes.get(name) == file.stat().st_size}
            steps = (layout.step_of(name.rpartition("/")[0]) for name in sizes)
            self._parts = {step for step in steps if step is not None}
            self._complete = complete
            self._arrived()
        return self._complete

    def _send(self, name: str, file: Path) -> None:
        """Upload a file unless this process has uploaded it as it is. What was removed meanwhile is passed over."""
        if self.is_stopped:
            raise _StoppedError
        try:
            state = _state(file)
            if self._sent.get(name) != state:
                self.remote.write(name, file, self._moved)
                self._sent[name] = state
                self._arrived()
        except FileNotFoundError:
            if file.exists():
                raise  # it is the store that says so

    def _send_checkpoint(self, step: int, checkpoint: Path) -> None:
        complete = self._look()
        self.busy = step
        try:
            checksums = checkpoint / atomic_files.CHECKSUMS
            content = checksums.read_bytes() if checksums.exists() else None
            if content is None or complete.get(step) == content:
                return
            place = f"{layout.CHECKPOINTS}/{checkpoint.name}"
            if complete.pop(step, None) is not None:  # of the same step, and other: incomplete from here on
                self.remote.remove([f"{place}/{atomic_files.CHECKSUMS}"])
            self._parts.add(step)
            others = [(name, file) for name, file in _files(checkpoint) if file != checksums]
            for name, file in [*others, (atomic_files.CHECKSUMS, checksums)]:
                self._send(f"{place}/{name}", file)
                if not file.exists():
                    raise _VanishedError
            complete[step] = content
        finally:
            self.busy = None

    def _remove_surplus(self, complete: dict[int, bytes]) -> None:
        """Remove checkpoints from the store beyond the limit, and parts of older ones that will not become complete."""
        surplus = [] if self.limit is None else [step for step in sorted(complete)[: -self.limit] if step != self.best]
        here, newest = local_checkpoints(self.directory), max(complete, default=0)
        parts = [step for step in sorted(self._parts) if step < newest and step not in complete and step not in here]
        for step in [*surplus, *parts]:
            place = f"{layout.CHECKPOINTS}/{layout.checkpoint_path(Path(), step).name}"
            self.remote.remove([f"{place}/{atomic_files.CHECKSUMS}"], [place])
            complete.pop(step, None)
            self._parts.discard(step)
            self._sent = {name: state for name, state in self._sent.items() if not name.startswith(f"{place}/")}
            self._arrived()

    def _moved(self) -> None:
        if not self.has_failed:
            self.moved_at = time.monotonic()

    def _arrived(self) -> None:
        self.has_failed, self.moved_at = False, time.monotonic()


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files below a directory by their names, without those that are being written."""
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory).as_posix()
        if not any(part.startswith(".") for part in name.split("/")) and file.is_file():
            yield name, file


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


class Uploader:
    """Uploads the directory of a run in a thread. Used on rank 0 only."""

    def __init__(self, address: str, limit: int | None) -> None:
        """Raises OutputError for an address that cannot be written to."""
        self.address = address
        self._remote, self._limit = open_directory(address), limit
        self._upload: Upload | None = None
        self._wake = threading.Condition()
        self._asked = self._done = 0
        self._error: str | None = None

    def changed(self, directory: Path, best: int | None) -> None:
        """Ask for the upload of what is new in the run directory, and return at once. Not called after `finish`.

        `best`: the step of the best checkpoint so far.
        """
        if self._upload is None:
            self._upload = Upload(self._remote, directory, self._limit, best)
            threading.Thread(target=self._work, name="upload", daemon=True).start()
        with self._wake:
            self._upload.best = best
            self._asked += 1
            self._wake.notify_all()

    @property
    def has_begun(self) -> bool:
        """Return whether anything was asked for yet."""
        return self._upload is not None

    @property
    def busy(self) -> int | None:
        """The step of the checkpoint that is being uploaded."""
        return None if self._upload is None else self._upload.busy

    def finish(self, timeout: float) -> None:
        """Upload the rest, and wait for it until nothing has moved for `timeout` seconds. Raises UploadError."""
        if (upload := self._upload) is None:
            return
        self.changed(upload.directory, upload.best)
        upload.moved_at = time.monotonic()
        try:
            with phase("uploading", f"the run to {self.address}"), self._wake:
                while self._done < self._asked and (left := upload.moved_at + timeout - time.monotonic()) > 0:
                    self._wake.wait(min(left, 1.0))
        except KeyboardInterrupt:
            log.warning("%s", self._unfinished(upload, "interrupted"))
            raise
        finally:  # the thread ends, unless the store hangs
            upload.is_stopped = True
            with self._wake:
                self._wake.notify_all()
        if self._done < self._asked:
            raise UploadError(self._unfinished(upload, self._error or f"nothing moved for {timeout:g} s"))
        log.info("uploaded to %s", self.address)

    def _unfinished(self, upload: Upload, why: str) -> str:
        missing = ", ".join(upload.missing()) or "the removal of older checkpoints"
        return (
            f"{self.address}: not uploaded: {missing} ({why}); nothing is lost in {upload.directory}, and "
            f"`sftx upload {upload.directory} {self.address}` uploads the rest"
        )

    def _work(self) -> None:
        upload, pause = self._upload, _FIRST_PAUSE_S
        assert upload is not None
        while not upload.is_stopped:
            with self._wake:
                if self._done == self._asked:
                    self._wake.wait(_LOGS_S)
                asked = self._asked
            try:
                upload.bring_up_to_date()
            except _StoppedError:
                return
            except Exception as error:  # each library of a store has its own
                if upload.is_stopped:
                    return
                if self._error is None:
                    log.warning(
                        "%s: cannot be written to: %s: %s; the run goes on, and it is tried again",
                        self.address, type(error).__name__, one_line(error),
                    )  # fmt: skip
                self._error, upload.has_failed = f"{type(error).__name__}: {one_line(error)}", True
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            if self._error is not None:
                log.info("%s: is written to again", self.address)
            self._error, pause = None, _FIRST_PAUSE_S
            with self._wake:
                self._done = asked
                self._wake.notify_all()


def upload_run(directory: Path, address: str) -> None:
    """Upload a run directory of this machine now; nothing is removed. Raises OutputError, UploadError."""
    upload = Upload(open_directory(address), directory, limit=None)
    try:
        with phase("uploading", f"to {address}"):
            upload.bring_up_to_date()
    except Exception as error:  # each library of a store has its own
        raise UploadError(
            f"{address}: not uploaded: {', '.join(upload.missing())} ({type(error).__name__}: {one_line(error)}); "
            "the same command goes on"
        ) from error
