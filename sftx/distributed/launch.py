"""`sftx run --nproc N`: torchrun's elastic agent gives N processes of this host their ranks and a rendezvous store.

torch.distributed.launcher.elastic_launch would start the processes as well, but it kills them 30 s after a signal, and
saving a large model takes longer. `Agent` therefore leaves processes to `Supervisor`, which waits as long as a save
takes, does not restart after an error that would occur again, leaves no process behind and writes no log files.
"""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Sequence
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

from sftx.distributed import process_group
from sftx.distributed.process_group import LAUNCHER_REPORTS
from sftx.distributed.supervisor import Supervisor
from sftx.errors import ConfigError

_HOST: Final = "localhost"


def launch(command: Sequence[str], *, nproc: int | None, max_restarts: int = 0, use_cpu: bool = False) -> int:
    """Run `command` as `nproc` ranks, None for one per GPU; return the exit code that one process would have.

    Raises ConfigError, before any process is started, when there are too few GPUs or this process is a rank already;
    OSError when a process cannot be started; Stop when a signal arrived before that.
    """
    if process_group.is_launched():
        raise ConfigError("--nproc: torchrun has started this process already; give one or the other")
    num = num_processes(nproc, use_cpu=use_cpu)
    supervisor = Supervisor(command, max_restarts)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{_HOST}:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr=_HOST,
    )
    with supervisor.install_handlers(), contextlib.ExitStack() as cleanup:
        cleanup.callback(supervisor.kill)
        spec = WorkerSpec(
            role="sftx",
            local_world_size=num,
            rdzv_handler=get_rendezvous_handler(parameters),
            entrypoint=supervisor.command[0],
            max_restarts=max_restarts,
            monitor_interval=0.01,  # `Agent._monitor_workers` waits itself
            local_addr=_HOST,
        )
        cleanup.callback(spec.rdzv_handler.shutdown)
        with contextlib.suppress(_FinalError):
            Agent(spec, supervisor).run()
    return supervisor.finish()


def num_processes(nproc: int | None, *, use_cpu: bool) -> int:
    """Return `nproc`, or the number of GPUs when it is None. Raises ConfigError when there are too few GPUs."""
    num_gpus = 0 if use_cpu else torch.cuda.device_count()
    if nproc is None:
        if num_gpus == 0:
            why = "--use-cpu leaves none" if use_cpu else "torch sees none on this host"
            raise ConfigError(f"--nproc gpu: one process a GPU, but {why}; give a number")
        return num_gpus
    if 0 < num_gpus < nproc:
        raise ConfigError(
            f"--nproc {nproc}: a GPU has one process, and torch sees {num_gpus} on this host; give at most as many, "
            "or --use-cpu"
        )
    return nproc


def rank_environment(num_processes: int) -> dict[str, str]:
    """Return the variables that every rank gets besides torchrun's: who reports a killed rank, and OMP_NUM_THREADS.

    Each rank gets an equal part of the CPU cores, unless the user has set the variable.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return {LAUNCHER_REPORTS: "1"}
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {LAUNCHER_REPORTS: "1", "OMP_NUM_THREADS": str(max(1, num_cores // num_processes))}


class _FinalError(Exception):
    """The ranks have failed and are not to be started again."""


class Agent(SimpleElasticAgent):
    """torchrun's agent, which assigns ranks, with a Supervisor in the place of its process handling."""

    def __init__(self, spec: WorkerSpec, supervisor: Supervisor) -> None:
        super().__init__(spec)
        self._supervisor = supervisor

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # A new store for every start: in torch's single one gloo would find the addresses of the previous processes.
        self._ranks_store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        return self._supervisor.start([self._environment(worker_group, worker) for worker in worker_group.workers])

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        restart = self._supervisor.wait()
        if self._supervisor.failure is None:
            return RunResult(WorkerState.SUCCEEDED, {worker.global_rank: None for worker in worker_group.workers})
        if not restart:
            raise _FinalError
        return RunResult(WorkerState.FAILED)  # the agent then starts the ranks again

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._supervisor.kill()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._supervisor.kill()

    def _environment(self, group: WorkerGroup, worker: Worker) -> dict[str, str]:
        """Return the variables that torchrun sets, and that scripts, libraries and torch itself read."""
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
            "MASTER_ADDR": self._ranks_store.host,
            "MASTER_PORT": self._ranks_store.port,
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_RESTART_COUNT": self._supervisor.num_restarts,
            "TORCHELASTIC_MAX_RESTARTS": spec.max_restarts,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }
        return rank_environment(spec.local_world_size) | {name: str(value) for name, value in values.items()}
