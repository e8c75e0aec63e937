"""The processes of one run: each a rank; what must be the same in all of them is agreed upon here.

A run in one process is `Ranks()`, to which every method is a plain call. Imports no torch.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, TypeVar

from sftx.errors import ConfigError, SftxError

T = TypeVar("T")

TELLS: Final = "SFTX_LAUNCHER_TELLS"
"""Set in the environment of processes whose parent tells which of them ended, and how."""

UNEXPECTED: Final = 70
"""A rank's exit code (EX_SOFTWARE) for what is no error of its user's making, and starting again may help. For the
user it is 1, as of one process."""

_SET_BY_LAUNCHERS: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


_GONE: Final = re.compile(
    r"closed by peer|reset by peer|broken pipe|timed? ?out|connection refused|ncclRemoteError", re.I
)
"""What torch says when a peer does not answer; gloo's errors are RuntimeErrors as all others are."""


class ElsewhereError(SftxError):
    """What another process of this run raised, which tells it; every process ends by it."""

    def __init__(self, rank: int, message: str, kind: str) -> None:
        self.rank = rank
        self.kind = kind
        """The name of its class."""
        self.is_shared = True
        super().__init__(f"rank {rank}: {message}")


class LostError(SftxError):
    """Another process of this run is gone: killed, or its host is. What ended it is told there, if at all."""

    exit_code = 75  # EX_TEMPFAIL: to start again may help


class Ranks:
    """One process that is alone. Methods that several processes would enter together are plain calls here."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this host: the number of its GPU."""
    local_size: int = 1
    met: bool = False
    """Whether there is a process group: of several processes, or of one that torchrun started."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives in the main process, which alone does it; what it raises there is raised everywhere."""
        return work()

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives here; raises in every process when it raised in one."""
        return work()

    def main_first(self, work: Callable[[], T]) -> T:
        """The same, once the main process is through: the others find what it left in the cache."""
        return work()

    def in_turn(self, work: Callable[[], T]) -> T:
        """The same, by one process of each host after another."""
        return work()

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each added up over all processes, in fp64."""
        return list(values)

    def largest(self, value: float) -> float:
        """The largest of all processes."""
        return value

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        return [value]

    def names(self, own: Iterable[str]) -> list[str]:
        """All that any process has, in one order: what the loss counts may differ from batch to batch."""
        return sorted({name for names in self.gathered(list(own)) for name in names})

    def watching(self) -> AbstractContextManager[None]:
        """Within it, where another process is gone, that is a LostError."""
        return nullcontext()

    def close(self) -> None:
        """Leaves the others."""


def is_launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process as one of a run."""
    return all(name in os.environ for name in _SET_BY_LAUNCHERS)


def is_lost(error: BaseException) -> bool:
    """Whether torch says by it that another process does not answer."""
    distributed = sys.modules.get("torch.distributed")  # which nothing here imports
    known = distributed is not None and isinstance(error, distributed.DistNetworkError)
    return is_launched() and (known or (isinstance(error, RuntimeError) and bool(_GONE.search(str(error)))))


def is_main() -> bool:
    """As `Ranks.is_main`, for what comes before the processes have met."""
    return not is_launched() or os.environ["RANK"] == "0"


def number(name: str, default: int | None = None) -> int:
    """A variable that a launcher sets. Raises ConfigError when it is no number."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"the environment has {name}={text!r}, expected a number; start with torchrun or --nproc")
    return int(text)


def check_environment() -> None:
    """Raises ConfigError for variables that no launcher sets like that."""
    if is_launched():
        rank, size = number("RANK"), number("WORLD_SIZE")
        if rank >= size:
            raise ConfigError(f"the environment has RANK={rank} and WORLD_SIZE={size}; ranks count from 0 to below it")
        for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"):
            number(name, 0)
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ and number("WORLD_SIZE") > 1:
        missing = [name for name in _SET_BY_LAUNCHERS if name not in os.environ]
        raise ConfigError(
            f"the environment has RANK and WORLD_SIZE but not {' and '.join(missing)}: this process would train alone; "
            "start with torchrun or --nproc, or take the two out"
        )
