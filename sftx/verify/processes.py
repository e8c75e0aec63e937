"""Processes of their own for the short runs, each of which is killed for good where a check asks for it.

On a CPU they are forked from a process that has imported torch and transformers already, which takes seconds: what such
a process does is what the command `sftx run` does. With a GPU each is started anew, since CUDA does not survive a fork.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

from sftx.errors import SftxError, one_line

Work = Callable[..., Any]
"""A function of a module that a process calls; it returns JSON values."""

_IMPORTED: Final = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "sftx.training",
    "sftx.data.pipeline",
    "sftx.inspection.diagnosis.start_checks",
    "sftx.trainer.self_checks",
    "sftx.trainer.session",
    "sftx_plugins.adapters.lora_layers",
    "sftx_plugins.collators.packed",
    "sftx_plugins.collators.padded",
    "sftx_plugins.losses.masked_ce",
    "sftx_plugins.observers.progress",
)
_MALLOC: Final = "MALLOC_MMAP_THRESHOLD_"
"""The environment variable with which glibc gives freed memory back, as `sftx plan` assumes."""
_SHOWN_LINES: Final = 3
_GRACE_S: Final = 5.0
"""Seconds in which a rank that lost another one ends by itself."""
_LOST_PEER: Final = "another process of the run is gone"
"""The error of a rank that has none of its own."""


class ChildError(Exception):
    """A process failed. The message is that of its error, or says which signal ended it."""


@dataclass
class Child:
    """A process at work, and the files with what it prints and returns."""

    name: str
    process: BaseProcess
    printed: Path
    returned: Path

    def wait(self) -> int:
        """Return the exit code, or minus the signal that ended the process."""
        self.process.join()
        return self.process.exitcode or 0

    def result(self) -> Any:
        """Wait, and return what the work returned. Raises ChildError."""
        code = self.wait()
        try:
            outcome = json.loads(self.returned.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ChildError(f"{_ended(code)}{self._last_lines()}") from None
        if "error" in outcome:
            raise ChildError(outcome["error"])
        return outcome["value"]

    def _last_lines(self) -> str:
        """Return the last lines that the process has printed, for an error."""
        lines = self.printed.read_text(encoding="utf-8", errors="replace").splitlines() if self.printed.exists() else []
        said = " / ".join(line.strip() for line in lines[-_SHOWN_LINES:] if line.strip())
        return f"; it printed: {said}" if said else ""


def _ended(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process was ended by signal {-code}"


class Processes:
    """Starts processes; those that are left at the end of the block are killed."""

    def __init__(self, directory: Path, *, on_gpu: bool) -> None:
        """`directory` gets the files of the processes."""
        self._directory = directory
        self.are_forked = not on_gpu and "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if self.are_forked else "spawn")
        if self.are_forked:
            _start_server(self._context)
        self._children: list[Child] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            if child.process.is_alive():
                child.process.kill()
            child.process.join()

    def start(self, name: str, work: Work, *arguments: Any, environment: Mapping[str, str] | None = None) -> Child:
        """Call `work` with these arguments, which can be pickled, in a process with these variables besides our own."""
        number = len(self._children)
        printed, returned = (self._directory / f"{number}-{name}.{suffix}" for suffix in ("txt", "json"))
        variables = {**os.environ, **(environment or {})}
        process = self._context.Process(
            target=_enter, args=(work, arguments, os.getcwd(), variables, printed, returned), name=f"sftx-{name}"
        )
        process.start()
        child = Child(name, process, printed, returned)
        self._children.append(child)
        return child

    def run(self, name: str, work: Work, *arguments: Any) -> Any:
        """Start a process, wait for its end, and return what the work returned. Raises ChildError."""
        return self.start(name, work, *arguments).result()

    def run_as_ranks(self, name: str, size: int, work: Work, *arguments: Any) -> Any:
        """Run the work in `size` processes, the ranks of one run, and return what rank 0 returned. Raises ChildError.

        When one of them fails, the others are killed.
        """
        port = _free_port()
        ranks = [
            self.start(f"{name}-{rank}", work, *arguments, environment=_rank_environment(rank, size, port))
            for rank in range(size)
        ]
        waiting: dict[Any, Child] = {child.process.sentinel: child for child in ranks}
        failed: list[Child] = []
        while waiting and not failed:
            for sentinel in multiprocessing.connection.wait(list(waiting)):
                child = waiting.pop(sentinel)
                failed += [child] if child.wait() != 0 else []
        for child in waiting.values():
            child.process.join(_GRACE_S)
            child.process.kill()
        errors = []
        for child in failed + [child for child in ranks if child not in failed]:
            try:
                child.result()
            except ChildError as error:
                errors.append(error)
        if errors:
            raise next((error for error in errors if _LOST_PEER not in str(error)), errors[0])
        return ranks[0].result()


@contextlib.contextmanager
def _memory_given_back() -> Iterator[None]:
    """Let glibc, in processes that start within the block, give freed memory back at once."""
    is_ours = platform.libc_ver()[0] == "glibc" and _MALLOC not in os.environ
    if is_ours:
        os.environ[_MALLOC] = "65536"
    try:
        yield
    finally:
        if is_ours:
            del os.environ[_MALLOC]


def _start_server(context: Any) -> None:
    from multiprocessing import forkserver

    context.set_forkserver_preload(list(_IMPORTED))
    with _memory_given_back():
        forkserver.ensure_running()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun gives a rank of one host."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {name: str(value) for name, value in ranks.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }


def _enter(
    work: Work, arguments: tuple[Any, ...], directory: str, variables: Mapping[str, str], printed: Path, returned: Path
) -> None:
    """Do the work in the child process: what it prints goes into a file, and so does what it returns or its error."""
    os.chdir(directory)
    os.environ.update(variables)
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(at), "w", buffering=1) for at in (1, 2))
    try:
        outcome = {"value": work(*arguments)}
    except SftxError as error:
        outcome = {"error": one_line(error, max_chars=2000)}
    except BaseException as error:
        traceback.print_exc()
        outcome = {"error": f"{type(error).__name__}: {one_line(error)}"}
    part = returned.with_suffix(".part")
    part.write_text(json.dumps(outcome), encoding="utf-8")
    part.replace(returned)
    sys.exit(1 if "error" in outcome else 0)
