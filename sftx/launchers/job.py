"""The job of a run: its name, its processes, and the shell commands that each of its hosts runs."""

from __future__ import annotations

import copy
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from sftx.config.launch_options import LaunchConfig
from sftx.config.options import RunConfig
from sftx.errors import ConfigError, counted

MARK: Final = "Written by `sftx run --launch"
"""What each file begins with that `--launch` writes, and that it may therefore replace."""
NOTE: Final = "another start writes it again, so change the run file instead."

WARNING_S: Final = 120
"""Seconds in which a run saves and stops before its host is taken away."""
SHUTDOWN_S: Final = 110
"""Seconds that torchrun leaves its processes for that."""
SIGNALS: Final = "TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""The signals that torchrun passes on; SIGUSR1 is not among its own."""
_LONGEST_NAME: Final = 40
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]+://")


@dataclass(frozen=True)
class Rendezvous:
    """How the hosts of a launcher find one another: shell words, which each host expands."""

    id: str
    endpoint: str
    is_first: str
    """1 on the host of the endpoint, 0 on the others."""


@dataclass(frozen=True)
class Job:
    """A run that a scheduler starts."""

    config: RunConfig
    options: LaunchConfig
    file: Path | None
    """The run file."""
    arguments: tuple[str, ...]
    """Of `sftx run`, without the run file and the options of --launch."""
    directory: Path
    """The working directory."""

    @property
    def name(self) -> str:
        if self.options.name is not None:
            return self.options.name
        last = PurePosixPath(str(self.config.output_dir)).name.lower()
        return f"sftx-{re.sub('[^a-z0-9]+', '-', last)}"[:_LONGEST_NAME].strip("-")

    @property
    def num_processes(self) -> int:
        """The processes of one host."""
        return max(1, self.options.gpus_per_node)

    @property
    def size(self) -> str:
        """The hosts and processes in words."""
        options = self.options
        nodes = counted(options.nodes, "node")
        gpus = counted(options.gpus_per_node, "GPU") if options.gpus_per_node else "no GPU"
        processes = counted(options.nodes * self.num_processes, "process", "processes")
        return f"{nodes} with {gpus}{' each' if options.nodes > 1 else ''}, {processes}"

    def commands(self, run_file: str | None, rendezvous: Rendezvous | None) -> str:
        """Return the shell commands of one host: the setup, and the run, which goes on where it was stopped.

        `run_file` is its path on the host. Without a `rendezvous` there is one host, and `sftx run --nproc` starts its
        processes; torchrun does where there are several.
        """
        options = self.options
        arguments = [*([] if run_file is None else [run_file]), *self.arguments, "--resume"]
        restarts = ["--max-restarts", str(options.max_restarts)] if options.max_restarts else []
        lines = ["set -e", *options.setup]
        if rendezvous is None:
            is_plain = self.num_processes == 1 and not restarts
            start = [] if is_plain else ["--nproc", str(self.num_processes), *restarts]
            lines.append(f"exec sftx run {shlex.join([*arguments, *start])}")
        else:
            torchrun = ["--nnodes", str(options.nodes), "--nproc-per-node", str(self.num_processes), *restarts]
            lines += [
                f"export {SIGNALS}",
                f"exec torchrun {shlex.join(torchrun)} --shutdown-timeout {SHUTDOWN_S} \\",
                f'    --rdzv-backend c10d --rdzv-id "{rendezvous.id}" --rdzv-endpoint "{rendezvous.endpoint}" \\',
                f'    --rdzv-conf "is_host={rendezvous.is_first}" \\',
                f"    -m sftx run {shlex.join(arguments)}",
            ]
        return "\n".join(lines) + "\n"

    def check_processes(self) -> None:
        """Raise ConfigError when the processes of all hosts cannot divide the rows of a step."""
        self.config.train.resolve_batch_size(self.options.nodes * self.num_processes)

    def check_kept(self, tool: str) -> None:
        """Raise ConfigError unless the output directory outlives the hosts, so that a job that starts again finds it.

        It does on a path that is mounted, and under a URL.
        """
        output = str(self.config.output_dir)
        if _SCHEME.match(output) or self.is_mounted(output):
            return
        where = ", ".join(self.options.mounts) or "it has none"
        raise ConfigError(
            f"option 'output_dir': {output} is gone with the machine that {tool} gives the job, so that it could not "
            f"go on with its run; name a path below one of launch.mounts ({where})"
        )

    def is_mounted(self, path: str) -> bool:
        return any(PurePosixPath(path).is_relative_to(place) for place in self.options.mounts)

    def local_paths(self) -> list[str]:
        """Return the files and directories of this machine that the run reads and that no mount brings to the job."""
        data = self.config.data
        named = [self.config.model, *(source.address for source in (*data.train, *data.eval))]
        return [
            path
            for path in dict.fromkeys(named)
            if not path.startswith("sftx:") and os.path.exists(os.path.expanduser(path)) and not self.is_mounted(path)
        ]


def merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with those of `more`, which win; lists are replaced."""
    result = copy.deepcopy(dict(values))
    for name, value in more.items():
        before = result.get(name)
        result[name] = merged(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
    return result


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are there: neither None nor empty."""
    return {name: value for name, value in values.items() if value is not None and value not in ((), {}, "")}


@dataclass(frozen=True)
class LaunchFile:
    """The file that a launcher is given, and the commands that use it."""

    suffix: str
    text: str
    submit: Sequence[str]
    """The command that submits the file, whose path follows it."""
    state: Sequence[str]
    output: Sequence[str]
    """The command that shows what the run prints; `JOB_ID` stands for the job's number."""
    warnings: Sequence[str] = ()
