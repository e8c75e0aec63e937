"""The processes that torchrun started meet: what they agree upon goes over gloo, gradients over the device's own way.

What two of them would decide differently (a clock, a signal, a file that is there or not) is decided by one and told
to the others; what goes wrong in one of them ends all, and is told once.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from sftx.config import TrainConfig
from sftx.errors import ConfigError, SftxError, TrainingError, one_line
from sftx.ranks import ElsewhereError, LostError, Ranks, is_lost, number

T = TypeVar("T")

# The main process encodes a large set, or writes a large file, while the others wait. That one of them is gone is seen
# at once, from its closed connections, and not by this.
_PATIENCE: Final = timedelta(days=2)

_MEETING: Final = timedelta(minutes=15)
"""For all processes to have imported torch and to be there."""


class Processes(Ranks):
    """The processes of one run that torchrun started, on one host or several."""

    met = True

    def __init__(self, config: TrainConfig) -> None:
        """Waits for the others. Raises ConfigError when there are more processes than GPUs; LostError."""
        self.rank, self.size = number("RANK"), number("WORLD_SIZE")
        self.local_rank, self.local_size = number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1)
        on_cpu = config.use_cpu or not torch.cuda.is_available()
        if not on_cpu:
            num_gpus = torch.cuda.device_count()
            if self.local_rank >= num_gpus:
                raise ConfigError(
                    f"{self.local_size} processes on a host with {num_gpus} GPUs: start one a GPU, or --use-cpu"
                )
            torch.cuda.set_device(self.local_rank)
        try:
            store, rank, size = next(rendezvous("env://"))
            store = PrefixStore(_session(store, rank, size), store)
            # Both for a GPU: fsdp_offload has its gradients on the host.
            backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            self._host = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except Exception as error:  # torch has several for a store, a peer, or a network that is not to be reached
            kind = LostError if is_lost(error) or isinstance(error, LostError) else TrainingError
            raise kind(f"the {self.size} processes of the run did not meet: {one_line(error)}") from error

    def on_main(self, work: Callable[[], T]) -> T:
        outcome = _Outcome.of(work, self.rank) if self.is_main else None
        told: list[Any] = [None if outcome is None else outcome.told()]
        with self.watching():
            dist.broadcast_object_list(told, src=0, group=self._host)
        return (outcome or told[0]).result()

    def together(self, work: Callable[[], T]) -> T:
        outcome = _Outcome.of(work, self.rank)
        failed = [one for one in self.gathered(outcome.failure()) if one is not None]
        if failed and (outcome.error is None or failed[0].rank != self.rank):
            outcome = failed[0]
        return outcome.result()

    def main_first(self, work: Callable[[], T]) -> T:
        return self._in_turn(work, 0 if self.is_main else 1, 2)

    def in_turn(self, work: Callable[[], T]) -> T:
        return self._in_turn(work, self.local_rank, int(self.largest(self.local_size)))

    def _in_turn(self, work: Callable[[], T], turn: int, num_turns: int) -> T:
        done: list[T] = []
        for now in range(num_turns):
            done += self.together(partial(_once, work) if now == turn else list)
        return done[0]

    def sums(self, values: Sequence[float]) -> list[float]:
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        return self._reduced([value], dist.ReduceOp.MAX)[0]

    def gathered(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with self.watching():
            dist.all_gather_object(found, value, group=self._host)
        return found

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise LostError("another process of the run is gone") from error

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        with self.watching():
            dist.all_reduce(tensor, how, group=self._host)
        return tensor.tolist()


def _session(store: Any, rank: int, size: int) -> str:
    """A name that the processes of this start alone have. Raises LostError when they do not all come.

    torchrun's store outlives the processes that it starts again, and must not give them the addresses of the dead. Its
    own count of restarts is another one on each host. So each process calls itself by a name of its own, under which
    the main process answers; it asks until all have confirmed.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"sftx/called/{rank}", own)
        store.wait([f"sftx/answer/{own}"], _MEETING)
        name = str(store.get(f"sftx/answer/{own}").decode())
        store.set(f"sftx/confirmed/{name}/{rank}", "")
        return name
    until = time.monotonic() + _MEETING.total_seconds()
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"sftx/confirmed/{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"sftx/called/{other}"]):
                store.set(f"sftx/answer/{store.get(f'sftx/called/{other}').decode()}", own)
        if time.monotonic() > until:
            raise LostError(f"rank {', '.join(map(str, sorted(missing)))} did not come within {_MEETING}")
        time.sleep(0.02)
    return own


def _once(work: Callable[[], T]) -> list[T]:
    return [work()]


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What came of a piece of work in one process, in a form that the others can be told."""

    rank: int
    value: T | None = None
    error: Exception | None = None
    message: str | None = None
    """Of an error elsewhere."""
    kind: str = ""

    @classmethod
    def of(cls, work: Callable[[], T], rank: int) -> _Outcome[T]:
        try:
            return cls(rank, work())
        except Exception as error:  # an SftxError, or whatever a plugin or a library raises
            return cls(rank, error=error)

    def told(self) -> _Outcome[T]:
        """The same without the exception itself, which cannot always be pickled."""
        if self.error is None:
            return self
        kind = type(self.error).__name__
        message = str(self.error) if isinstance(self.error, SftxError) else f"{kind}: {self.error}"
        return _Outcome(self.rank, message=message, kind=kind)

    def failure(self) -> _Outcome[T] | None:
        return None if self.error is None else self.told()

    def result(self) -> T:
        if isinstance(self.error, SftxError):
            self.error.is_shared = True
        if self.error is not None:
            raise self.error
        if self.message is not None:
            raise ElsewhereError(self.rank, self.message, self.kind)
        return cast(T, self.value)
