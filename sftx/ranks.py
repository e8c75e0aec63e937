"""The processes of one run: each a rank; what must be the same in all of them is agreed upon here.

A run in one process is `Ranks()`, to which every method is a plain call. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

T = TypeVar("T")

_SET_BY_LAUNCHERS: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """One process that is alone. Methods that several processes would enter together are plain calls here."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this host: the number of its GPU."""

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

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each added up over all processes, in fp64."""
        return list(values)

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        return [value]

    def close(self) -> None:
        """Leaves the others."""


def is_launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process as one of a run."""
    return all(name in os.environ for name in _SET_BY_LAUNCHERS)


def is_main() -> bool:
    """As `Ranks.is_main`, for what comes before the processes have met."""
    return not is_launched() or os.environ["RANK"] == "0"
