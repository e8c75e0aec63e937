"""The process group of several ranks: host-side agreement over gloo, gradients over the device's own backend.

Whatever two ranks could decide differently (a clock, a signal, whether a file exists) is decided by one and broadcast.
An error on one rank ends all of them and is printed once.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from sftx.config.options import TrainConfig
from sftx.distributed.process_group import LostPeerError, ProcessGroup, RemoteRankError, env_int, is_lost_peer_error
from sftx.errors import ConfigError, SftxError, TrainingError, one_line

T = TypeVar("T")

# Rank 0 encodes a large dataset, or writes a large file, while the others wait in a collective. A lost peer is noticed
# at once, by its closed connection, and not by this timeout.
_TIMEOUT: Final = timedelta(days=2)

_RENDEZVOUS_TIMEOUT: Final = timedelta(minutes=15)
"""Time for all ranks to import torch and reach the rendezvous."""

_closed: Final[list[Any]] = []
"""The groups of this process that were closed, which live as long as the process.

DistributedDataParallel refers to its group. Were it the last to do so, it would wait, with the interpreter's lock held,
for the group's threads to end, of which one may be waiting for that lock to free a tensor. A group that Python frees
waits without the lock.
"""


class TorchProcessGroup(ProcessGroup):
    """The ranks of one run that torchrun started, on one host or several."""

    is_initialized = True

    def __init__(self, config: TrainConfig) -> None:
        """Wait for the other ranks. Raises ConfigError for more processes than GPUs; TrainingError; LostPeerError."""
        self.rank, self.world_size = env_int("RANK"), env_int("WORLD_SIZE")
        self.local_rank, self.local_world_size = env_int("LOCAL_RANK", 0), env_int("LOCAL_WORLD_SIZE", 1)
        on_cpu = config.use_cpu or not torch.cuda.is_available()
        if not on_cpu:
            num_gpus = torch.cuda.device_count()
            if self.local_rank >= num_gpus:
                raise ConfigError(
                    f"{self.local_world_size} processes on a host with {num_gpus} GPUs: start one a GPU, or --use-cpu"
                )
            torch.cuda.set_device(self.local_rank)
        try:
            store, rank, world_size = next(rendezvous("env://"))
            store = PrefixStore(_unique_prefix(store, rank, world_size), store)
            # Both backends for a GPU: with fsdp_offload the gradients are on the host.
            backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
            self._host_group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        except Exception as error:  # torch has several types for a store, a peer or a network that cannot be reached
            is_lost = isinstance(error, LostPeerError) or is_lost_peer_error(error)
            raise (LostPeerError if is_lost else TrainingError)(
                f"cannot initialise the process group of {self.world_size} processes: {one_line(error)}"
            ) from error

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        outcome = _Outcome.capture(work, self.rank) if self.is_rank0 else None
        sent: list[Any] = [None if outcome is None else outcome.picklable()]
        with self.detect_lost_peers():
            dist.broadcast_object_list(sent, src=0, group=self._host_group)
        return (outcome or sent[0]).result()

    def all_or_raise(self, work: Callable[[], T]) -> T:
        outcome = _Outcome.capture(work, self.rank)
        failure = None if outcome.error is None else outcome.picklable()
        failures = [failure for failure in self.all_gather(failure) if failure is not None]
        if failures and (outcome.error is None or failures[0].rank != self.rank):
            outcome = failures[0]
        return outcome.result()

    def rank0_first(self, work: Callable[[], T]) -> T:
        return self._in_turns(work, turn=0 if self.is_rank0 else 1, num_turns=2)

    def one_rank_at_a_time(self, work: Callable[[], T]) -> T:
        return self._in_turns(work, turn=self.local_rank, num_turns=int(self.all_reduce_max(self.local_world_size)))

    def _in_turns(self, work: Callable[[], T], *, turn: int, num_turns: int) -> T:
        results: list[T] = []
        for current in range(num_turns):
            results += self.all_or_raise((lambda: [work()]) if current == turn else list)
        return results[0]

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, value: float) -> float:
        return self._all_reduce([value], dist.ReduceOp.MAX)[0]

    def _all_reduce(self, values: Sequence[float], op: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        with self.detect_lost_peers():
            dist.all_reduce(tensor, op, group=self._host_group)
        return tensor.tolist()

    def all_gather(self, value: T) -> list[T]:
        gathered: list[Any] = [None] * self.world_size
        with self.detect_lost_peers():
            dist.all_gather_object(gathered, value, group=self._host_group)
        return gathered

    @contextlib.contextmanager
    def detect_lost_peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not is_lost_peer_error(error):
                raise
            raise LostPeerError("another process of the run is gone") from error

    def close(self) -> None:
        if dist.is_initialized():
            _closed.append(dist.group.WORLD)
            dist.destroy_process_group()


def _unique_prefix(store: Any, rank: int, world_size: int) -> str:
    """Agree on a store prefix that only the processes of this start share. Raises LostPeerError after a timeout.

    torchrun's store outlives a restart, and the restarted ranks must not read the addresses of the dead ones. Its
    restart count cannot serve as the prefix: it differs between hosts. So each rank publishes a random name of its own;
    rank 0 answers under that name with the prefix, again and again, until every rank has confirmed it.
    """
    own_name = uuid.uuid4().hex
    if rank:
        store.set(f"sftx/called/{rank}", own_name)
        store.wait([f"sftx/answer/{own_name}"], _RENDEZVOUS_TIMEOUT)
        prefix = str(store.get(f"sftx/answer/{own_name}").decode())
        store.set(f"sftx/confirmed/{prefix}/{rank}", "")
        return prefix
    deadline = time.monotonic() + _RENDEZVOUS_TIMEOUT.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"sftx/confirmed/{own_name}/{other}"]):
                missing.remove(other)
            elif store.check([f"sftx/called/{other}"]):
                store.set(f"sftx/answer/{store.get(f'sftx/called/{other}').decode()}", own_name)
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)))
            raise LostPeerError(f"rank {ranks} did not reach the rendezvous within {_RENDEZVOUS_TIMEOUT}")
        time.sleep(0.02)
    return own_name


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """The result or the error of a piece of work on one rank."""

    rank: int
    value: T | None = None
    error: Exception | None = None
    message: str | None = None
    """Message of an error on another rank."""
    kind: str = ""

    @classmethod
    def capture(cls, work: Callable[[], T], rank: int) -> _Outcome[T]:
        """Run `work` and keep its result or its exception."""
        try:
            return cls(rank, work())
        except Exception as error:  # an SftxError, or whatever a plugin or a library raises
            return cls(rank, error=error)

    def picklable(self) -> _Outcome[T]:
        """Return the outcome without the exception itself, which cannot always be pickled."""
        if self.error is None:
            return self
        kind = type(self.error).__name__
        message = str(self.error) if isinstance(self.error, SftxError) else f"{kind}: {self.error}"
        return _Outcome(self.rank, message=message, kind=kind)

    def result(self) -> T:
        """Return the value, or raise the error: RemoteRankError for that of another rank."""
        if isinstance(self.error, SftxError):
            self.error.is_shared = True
        if self.error is not None:
            raise self.error
        if self.message is not None:
            raise RemoteRankError(self.rank, self.message, self.kind)
        return cast(T, self.value)
