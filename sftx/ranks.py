"""The processes of one run: each a rank; what must be the same in all of them is agreed upon here.

A run in one process is `Ranks()`, to which every method is a plain call. Imports no torch.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, TypeVar

from sftx.errors import SftxError

T = TypeVar("T")

UNEXPECTED: Final = 70
"""A rank's exit code (EX_SOFTWARE) for what is no error of its user's making, and starting again may help. For the
user it is 1, as of one process."""

_SET_BY_LAUNCHERS: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


_GONE: Final = re.compile(r"gloo|NCCL|closed by peer|reset by peer|[Bb]roken pipe|[Ss]ocket [Tt]imeout")
"""What torch's messages have in common when a peer does not answer: most are RuntimeErrors as all others are."""


class ElsewhereError(SftxError):
    """What another process of this run raised, which tells it; every process ends by it."""

    def __init__(self, rank: int, message: str) -> None:
        self.rank = rank
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
    known = distributed is not None and isinstance(error, distributed.DistError)
    return is_launched() and (known or (isinstance(error, RuntimeError) and bool(_GONE.search(str(error)))))


def is_main() -> bool:
    """As `Ranks.is_main`, for what comes before the processes have met."""
    return not is_launched() or os.environ["RANK"] == "0"
