"""Write the batch script of a run for Slurm's sbatch."""

from __future__ import annotations

import shlex
from typing import Final

from sftx.errors import ConfigError
from sftx.launchers.job import MARK, NOTE, WARNING_S, Job, LaunchFile, Rendezvous

_RENDEZVOUS: Final = Rendezvous(
    id="$SLURM_JOB_ID",
    endpoint="$SFTX_HEAD:$((20000 + SLURM_JOB_ID % 10000))",
    is_first="$((SLURM_NODEID == 0))",
)
_END: Final = "COMMANDS_OF_A_NODE"


def write(job: Job) -> LaunchFile:
    """Return the batch script. Raises ConfigError.

    One task a node, which starts the processes of its node. Before the time limit the batch shell gets SIGUSR1, passes
    it on to the tasks, which save and stop, and queues the job again; an error ends the job.
    """
    options = job.options
    if options.mounts and options.image is None:
        raise ConfigError(
            "option 'launch.mounts': a job of Slurm sees the file systems of its nodes; give an image, or leave it out"
        )
    log = f"{job.name}-%j.log"
    settings: dict[str, str | int | bool | None] = {
        "job-name": job.name,
        "partition": options.slurm.partition,
        "account": options.slurm.account,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_node,
        "mem": None if options.memory_per_node is None else f"{options.memory_per_node}G",
        "time": options.slurm.time,
        "chdir": str(job.directory),
        "output": log,
        "open-mode": "append",
        "requeue": True,
        "signal": f"B:USR1@{WARNING_S}",
        **options.slurm.options,
    }
    for name, value in settings.items():
        if not str(value).isprintable():
            raise ConfigError(
                f"option 'launch.slurm': {name} is {value!r}, and what follows a line break would be a line of the "
                "script"
            )
    head = [f"#SBATCH --{name}" + ("" if value is True else f"={value}") for name, value in settings.items() if value]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in options.env.items()]
    exports += [f': "${{{name}:?export it before sbatch, which passes it on}}"' for name in options.secrets]
    rendezvous = None
    if options.nodes > 1:
        rendezvous = _RENDEZVOUS
        exports.append('SFTX_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)')
        exports.append("export SFTX_HEAD")
    commands = job.commands(None if job.file is None else str(job.file), rendezvous)
    srun = ["srun", "--kill-on-bad-exit=1"]
    if options.cpus_per_node is not None:
        srun.append(f"--cpus-per-task={options.cpus_per_node}")  # srun does not take it from sbatch
    if options.image is not None:
        places = {str(job.directory): str(job.directory), **{source: at for at, source in options.mounts.items()}}
        mounts = ",".join(f"{source}:{at}" for source, at in places.items())
        srun += [f"--container-image={options.image}", f"--container-mounts={mounts}"]
        srun.append(f"--container-workdir={job.directory}")
    text = "\n".join(
        [
            "#!/bin/bash",
            f"# {MARK} slurm`; {NOTE}",
            *head,
            "",
            *exports,
            *([""] if exports else []),
            "# What each node runs. --resume begins the run, and goes on with it when the job starts again.",
            f"commands=$(cat <<'{_END}'",
            commands.rstrip("\n"),
            _END,
            ")",
            "",
            "# SIGUSR1 comes before the time limit: the run saves and stops, and the job is queued again.",
            "stopped=",
            "trap 'stopped=1; kill -USR1 \"$step\"' USR1",
            "trap 'kill -TERM \"$step\"' TERM",
            f'{shlex.join(srun)} bash -c "$commands" &',
            "step=$!",
            "while :; do",
            '    wait "$step"',
            "    code=$?",
            '    kill -0 "$step" 2> /dev/null || break',
            "done",
            'if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then',
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
            "",
        ]
    )
    return LaunchFile(
        suffix="sbatch",
        text=text,
        submit=("sbatch",),
        state=("squeue", "--me", f"--name={job.name}"),
        output=("tail", "-F", log.replace("%j", "JOB_ID")),
    )
