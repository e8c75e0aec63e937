"""A store for fsspec that fails on purpose: `faulty://` keeps files in memory, `slow-disk://` on the disk, slowly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem


class FaultyStore(MemoryFileSystem):  # type: ignore[misc]
    """Files in memory, whose writing fails as the test says."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    writes: ClassVar[list[str]] = []
    """The places of all writes in their order, also of those that failed."""
    removals: ClassVar[list[str]] = []
    fault: ClassVar[Callable[[int, str], str]] = staticmethod(lambda number, place: "")
    """What happens to a write, by its number from 1 and its place: raise, tear, truncate, hang, or nothing."""
    released: ClassVar[threading.Event] = threading.Event()
    """Set when what hangs is to end."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("faulty://", "memory://"))

    @classmethod
    def reset(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.writes.clear()
        cls.removals.clear()
        cls.released.clear()
        cls.fault = staticmethod(lambda number, place: "")

    @classmethod
    def names(cls) -> list[str]:
        return sorted(name.removeprefix("/") for name in cls.store)

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **kwargs: Any) -> None:
        place = self._strip_protocol(rpath)
        self.writes.append(place)
        content = Path(lpath).read_bytes()
        what = type(self).fault(len(self.writes), place)
        if what == "raise":
            raise OSError("the store is not there")
        if what == "hang":
            self.released.wait(60)
            raise OSError("it hung")
        self.pipe_file(place, content[: len(content) // 2] if what in ("tear", "truncate") else content)
        if what == "tear":
            raise OSError("the connection broke")
        if callback is not None:
            callback.relative_update(len(content))

    def rm_file(self, path: str) -> None:
        self.removals.append(self._strip_protocol(path))
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self.removals.append(self._strip_protocol(path))
        super().rm(path, recursive, maxdepth)


class SlowDisk(LocalFileSystem):  # type: ignore[misc]
    """Files on the disk, written piece by piece with pauses, so that a process can be killed within each of them."""

    protocol = "slow-disk"
    pause_s: ClassVar[float] = 0.002
    num_pieces: ClassVar[int] = 10

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("slow-disk://"))

    def put_file(self, path1: str, path2: str, callback: Any = None, **kwargs: Any) -> None:
        content = Path(path1).read_bytes()
        target = Path(self._strip_protocol(path2))
        target.parent.mkdir(parents=True, exist_ok=True)
        size = max(1, len(content) // self.num_pieces)
        with target.open("wb", buffering=0) as file:
            for start in range(0, len(content), size):
                time.sleep(self.pause_s)
                file.write(content[start : start + size])


def register() -> None:
    """Let fsspec know the stores."""
    for store in (FaultyStore, SlowDisk):
        fsspec.register_implementation(store.protocol, store, clobber=True)
