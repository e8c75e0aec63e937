"""Runs in several processes, started as torchrun starts them: the ranks of a case, or agents of torchrun itself.

A process that imports torch and transformers needs seconds; these are forked from one that has imported them already,
so that a case of four ranks costs what its steps cost. Each rank gets the variables that torchrun would set, and then
does what the command `sftx` does. Tests of restarts and of several hosts run torchrun's own agent, in a process forked
likewise, which forks its workers from the same server.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import killing

Prepare = Callable[[int], None]
"""A function that each rank calls first, with its rank."""
PATIENCE_S = 300.0
"""A run that takes longer than this many seconds is taken to hang."""

_IMPORTED = (
    *killing._IMPORTED,
    "torch._dynamo.backends.debugging",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.nn.parallel.distributed",
    "sftx_plugins.metrics.bleu",
    "sftx_plugins.observers.jsonl",
    "sftx_plugins.metrics.rouge",
)
_SHARED = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@dataclass
class Group:
    """The processes of one run, or the agents that start them. Rank N prints into `directory`/rank-N.txt."""

    directory: Path
    children: list[BaseProcess]
    begun: float = field(default_factory=time.monotonic)

    @property
    def out(self) -> Path:
        """The run directory."""
        return self.directory / "out"

    def wait(self) -> list[int]:
        """Return the exit codes, or minus the signals that ended the processes. Raises TimeoutError when one hangs."""
        for child in self.children:
            child.join(max(0.0, self.begun + PATIENCE_S - time.monotonic()))
        if any(child.exitcode is None for child in self.children):
            self.kill()
            raise TimeoutError(f"still running after {PATIENCE_S:g} s: {self.printed()}")
        return [child.exitcode or 0 for child in self.children]

    def succeed(self) -> Path:
        """Wait, and return the run directory. Raises AssertionError with the output when a process failed."""
        codes = self.wait()
        assert codes == [0] * len(codes), f"ended with {codes}: {self.printed()}"
        return self.out

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until `true()` holds. Raises AssertionError when all processes ended before, and TimeoutError."""
        while not true():
            alive = any(child.is_alive() for child in self.children)
            assert alive or true(), f"all ended before: {self.printed()}"
            if time.monotonic() - self.begun > PATIENCE_S:
                self.kill()
                raise TimeoutError(f"waited over {PATIENCE_S:g} s: {self.printed()}")
            time.sleep(0.002)

    def kill(self) -> None:
        for child in self.children:
            if child.is_alive():
                child.kill()
                child.join()

    def printed(self, rank: int | None = None) -> str:
        """Return what one rank has printed, or all of them."""
        files = sorted(self.directory.glob("*.txt")) if rank is None else [self.directory / f"rank-{rank}.txt"]
        return "".join(file.read_text(encoding="utf-8") for file in files)


class Starter:
    """Starts runs in `root`, which has the rows of `write_rows`, and keeps runs in one process to compare with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_IMPORTED))
        self._alone: dict[tuple[str, ...], Path] = {}
        self._number = 0

    def directory(self, name: str) -> Path:
        self._number += 1
        path = self.root / f"{self._number}-{name}"
        path.mkdir(parents=True)
        return path

    def run(
        self,
        arguments: Sequence[str],
        size: int,
        *,
        directory: Path | None = None,
        prepare: Prepare | None = None,
    ) -> Group:
        """Start `sftx run ARGUMENTS --output-dir out` in `size` processes, the ranks of one run.

        `prepare`: a module's function that each process calls first.
        """
        directory = directory or self.directory(f"{size}-ranks")
        command = ["run", *arguments, "--output-dir", "out"]
        port = free_port()
        children = []
        for rank in range(size):
            environment = _SHARED | (_as_torchrun(rank, size, port) if size > 1 else {})
            children.append(self._start(_sftx, (command, directory, rank, environment, prepare)))
        return Group(directory, children)

    def alone(self, arguments: Sequence[str]) -> Path:
        """Return the directory of the same run in one process, which runs only once."""
        key = tuple(arguments)
        if key not in self._alone:
            self._alone[key] = self.run(arguments, 1, directory=self.directory("alone")).succeed()
        return self._alone[key]

    def torchrun(
        self,
        agents: Sequence[Sequence[str]],
        arguments: Sequence[str],
        *,
        directory: Path | None = None,
        prepare: Prepare | None = None,
    ) -> Group:
        """Start one agent of torchrun for each list of options, all for the same `sftx run`."""
        directory = directory or self.directory("torchrun")
        first = "-" if prepare is None else f"{prepare.__module__}:{prepare.__name__}"
        worker = [__file__, str(directory), first, "run", *arguments, "--output-dir", "out"]
        children = []
        for number, options in enumerate(agents):
            command = ["--start-method", "forkserver", "--run-path", *options, *worker]
            children.append(self._start(_agent, (command, directory, number)))
        return Group(directory, children)

    def _start(self, target: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
        child: BaseProcess = self._context.Process(target=target, args=arguments)
        child.start()
        return child


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _as_torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {name: str(value) for name, value in ranks.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }


def _enter(directory: Path, number: int, environment: Mapping[str, str], who: str = "rank") -> None:
    """Enter the directory, set the variables, and send the output into a file there."""
    os.chdir(directory)
    os.environ.update(environment)
    descriptor = os.open(f"{who}-{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(at), "w", buffering=1) for at in (1, 2))


def _sftx(
    command: Sequence[str], directory: Path, rank: int, environment: Mapping[str, str], prepare: Prepare | None
) -> None:
    _enter(directory, rank, environment)
    import torch

    from sftx.cli import main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank)
    main.main(args=list(command), prog_name="sftx")


def _agent(command: Sequence[str], directory: Path, number: int) -> None:
    _enter(directory, number, _SHARED, who="agent")
    from torch.distributed.run import main

    main(list(command))


def _worker(directory: str, prepare: str, *command: str) -> None:
    """Run a rank that torchrun's agent started."""
    module, _, function = prepare.partition(":")
    first = getattr(importlib.import_module(module), function) if function else None
    _sftx(command, Path(directory), int(os.environ["RANK"]), _SHARED, first)


def write_rows(directory: Path) -> None:
    """Write 27 training rows of very unequal lengths, an epoch of steps of 8 with a last one of 3; and 7 held out.

    The answers repeat one word, so that ten steps teach a model of random weights to get some of them right.
    """
    for name, num in (("train", 27), ("held", 7)):
        rows = []
        for n in range(num):
            words = ["b" if place % 5 == 4 else "a" for place in range(1 + n * n * 7 % 40)]
            rows.append({"prompt": f"{name}: say {n * 5 % 13} words", "completion": " ".join(words)})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def lines(out: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    _worker(*sys.argv[1:])
