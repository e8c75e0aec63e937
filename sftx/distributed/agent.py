"""The engine of torchrun, which gives the processes of one host their ranks and a store to meet in.

Torch's own agent for a host's processes is replaced by `Agent`: it waits as long as saving takes, does not start again
what can only fail again, leaves no process behind, and writes no logs of its own to a temporary directory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from typing import Any, Final

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from sftx.distributed.launch import Launch, environment
from sftx.errors import ConfigError

_HERE: Final = "localhost"


def run(launch: Launch, num_processes: int) -> None:
    """Runs it as so many ranks, until it is over; how that was is known to `launch`. Raises OSError and Stop."""
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{_HERE}:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr=_HERE,
    )
    spec = WorkerSpec(
        role="sftx",
        local_world_size=num_processes,
        rdzv_handler=get_rendezvous_handler(parameters),
        entrypoint=launch.command[0],
        max_restarts=launch.max_restarts,
        monitor_interval=0.01,  # `Agent` waits by itself
        local_addr=_HERE,
    )
    try:
        with contextlib.suppress(_HopelessError):
            Agent(spec, launch).run()
    finally:
        spec.rdzv_handler.shutdown()


def num_processes(wanted: int | None, *, use_cpu: bool) -> int:
    """`wanted`, or one a GPU. Raises ConfigError when there are too few GPUs for that."""
    num_gpus = 0 if use_cpu else torch.cuda.device_count()
    if wanted is None:
        if num_gpus == 0:
            why = "--use-cpu leaves none" if use_cpu else "torch sees none on this host"
            raise ConfigError(f"--nproc gpu: one process a GPU, but {why}; give a number")
        return num_gpus
    if 0 < num_gpus < wanted:
        raise ConfigError(
            f"--nproc {wanted}: a GPU has one process, and torch sees {num_gpus} on this host; give at most as many, "
            "or --use-cpu"
        )
    return wanted


class _HopelessError(Exception):
    """The ranks have ended with an error, and are not to be started again."""


class Agent(SimpleElasticAgent):
    """Starts the ranks of this host and waits for them, as `Launch` has it; torch's part is who they are."""

    def __init__(self, spec: WorkerSpec, launch: Launch) -> None:
        super().__init__(spec)
        self._launch = launch

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # Torch keeps one store for all starts, in which gloo would find the addresses of processes that are gone.
        self._meeting = TCPStore(_HERE, 0, is_master=True, wait_for_workers=False)
        return self._launch.start([self._environment(worker_group, worker) for worker in worker_group.workers])

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        is_again = self._launch.wait()
        if self._launch.failure is None:
            return RunResult(WorkerState.SUCCEEDED, {worker.global_rank: None for worker in worker_group.workers})
        if not is_again:
            raise _HopelessError
        return RunResult(WorkerState.FAILED)  # torch starts them again, as often as `launch` would

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._launch.kill()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._launch.kill()

    def _environment(self, group: WorkerGroup, worker: Worker) -> dict[str, str]:
        """What torchrun sets, which scripts, libraries and torch itself read."""
        spec = group.spec
        values = {
            "RANK": worker.global_rank,
            "LOCAL_RANK": worker.local_rank,
            "ROLE_RANK": worker.role_rank,
            "GROUP_RANK": group.group_rank,
            "ROLE_NAME": spec.role,
            "WORLD_SIZE": worker.world_size,
            "LOCAL_WORLD_SIZE": spec.local_world_size,
            "ROLE_WORLD_SIZE": worker.role_world_size,
            "GROUP_WORLD_SIZE": group.group_world_size,
            "MASTER_ADDR": self._meeting.host,
            "MASTER_PORT": self._meeting.port,
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_RESTART_COUNT": self._launch.num_restarts,
            "TORCHELASTIC_MAX_RESTARTS": spec.max_restarts,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }
        return environment(spec.local_world_size) | {name: str(value) for name, value in values.items()}
