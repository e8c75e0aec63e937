"""The process group of a run: which rank this process is, and the collectives by which ranks agree. Imports no torch.

`ProcessGroup` is a run in one process, for which every collective is a plain call. `TorchProcessGroup`
(`torch_process_group.py`) is a run that torchrun, or `sftx run --nproc`, started as several.
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

LAUNCHER_REPORTS: Final = "SFTX_LAUNCHER_TELLS"
"""The environment variable that `sftx run --nproc` sets for its ranks: it prints by itself which of them was killed."""

UNEXPECTED: Final = 70
"""Exit code of a rank (EX_SOFTWARE) after an unexpected exception, which a restart may cure."""

_SET_BY_LAUNCHERS: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# gloo raises a plain RuntimeError when a peer does not answer; only its text tells that apart from other errors.
_PEER_LOST: Final = re.compile(
    r"closed by peer|reset by peer|broken pipe|timed? ?out|connection refused|ncclRemoteError", re.I
)


class RemoteRankError(SftxError):
    """Another rank raised an error. That rank prints it, and every rank ends because of it."""

    def __init__(self, rank: int, message: str, kind: str) -> None:
        self.rank = rank
        self.kind = kind
        """Class name of the error."""
        self.is_shared = True
        super().__init__(f"rank {rank}: {message}")


class LostPeerError(SftxError):
    """Another rank no longer answers: its process or its host was killed. The cause is printed there, if anywhere."""

    exit_code = 75  # EX_TEMPFAIL: a restart may cure it
    is_shared = True  # every rank notices by itself


class ProcessGroup:
    """A run in one process. `TorchProcessGroup` overrides the collectives, which every rank must call together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes of this host; the index of its GPU."""
    local_world_size: int = 1
    is_initialized: bool = False
    """True when torch.distributed is initialised: several processes, or a single one that torchrun started."""

    @property
    def is_rank0(self) -> bool:
        """Rank 0 is the one that prints and writes."""
        return self.rank == 0

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 only and broadcast its result; an exception is raised on every rank."""
        return work()

    def all_or_raise(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return the local result; raise on every rank when it raised on any."""
        return work()

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0, then on the others, which find its results in the cache. Raises as all_or_raise."""
        return work()

    def one_rank_at_a_time(self, work: Callable[[], T]) -> T:
        """Run `work` on one rank of each host after the other. Raises as all_or_raise."""
        return work()

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over all ranks, in fp64."""
        return list(values)

    def all_reduce_max(self, value: float) -> float:
        """Return the maximum over all ranks."""
        return value

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of ranks. The value must be picklable."""
        return [value]

    def all_gather_names(self, names: Iterable[str]) -> list[str]:
        """Return the sorted union of the names of all ranks: a loss may report other metrics on other batches."""
        return sorted({name for gathered in self.all_gather(list(names)) for name in gathered})

    def detect_lost_peers(self) -> AbstractContextManager[None]:
        """Return a context that turns torch's errors about peers that do not answer into LostPeerError."""
        return nullcontext()

    def close(self) -> None:
        """Destroy the process group."""


def is_launched() -> bool:
    """Return whether torchrun, or a launcher that sets the same variables, started this process as a rank."""
    return all(name in os.environ for name in _SET_BY_LAUNCHERS)


def is_rank0() -> bool:
    """Return the same as `ProcessGroup.is_rank0`, from the environment: usable before the group is initialised."""
    return not is_launched() or os.environ["RANK"] == "0"


def is_lost_peer_error(error: BaseException) -> bool:
    """Return whether torch says by this error that another rank does not answer."""
    distributed = sys.modules.get("torch.distributed")  # not imported here, which would take seconds
    is_network_error = distributed is not None and isinstance(error, distributed.DistNetworkError)
    says_so = isinstance(error, RuntimeError) and bool(_PEER_LOST.search(str(error)))
    return is_launched() and (is_network_error or says_so)


def env_int(name: str, default: int | None = None) -> int:
    """Read an integer that a launcher sets in the environment. Raises ConfigError when it is no integer."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"the environment has {name}={text!r}, expected a number; start with torchrun or --nproc")
    return int(text)


def check_environment() -> None:
    """Raise ConfigError when RANK, WORLD_SIZE and the like are set as no launcher sets them."""
    if is_launched():
        rank, world_size = env_int("RANK"), env_int("WORLD_SIZE")
        if rank >= world_size:
            raise ConfigError(
                f"the environment has RANK={rank} and WORLD_SIZE={world_size}; ranks count from 0 to below it"
            )
        for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"):
            env_int(name, 0)
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ and env_int("WORLD_SIZE") > 1:
        missing = [name for name in _SET_BY_LAUNCHERS if name not in os.environ]
        raise ConfigError(
            f"the environment has RANK and WORLD_SIZE but not {' and '.join(missing)}: this process would train alone; "
            "start with torchrun or --nproc, or unset the two"
        )
