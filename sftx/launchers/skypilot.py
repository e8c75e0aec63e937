"""Write the task of a run for SkyPilot's managed jobs."""

from __future__ import annotations

from typing import Any, Final

from sftx.config import run_file
from sftx.errors import ConfigError
from sftx.launchers.job import MARK, NOTE, Job, LaunchFile, Rendezvous, given, merged

_PORT: Final = 29500
_RENDEZVOUS: Final = Rendezvous(
    id="$SKYPILOT_TASK_ID", endpoint=f"$SFTX_HEAD:{_PORT}", is_first="$((SKYPILOT_NODE_RANK == 0))"
)
_BUCKETS: Final = ("s3://", "gs://", "r2://", "cos://", "nebius://", "oci://")


def write(job: Job) -> LaunchFile:
    """Return the task. Raises ConfigError.

    The working directory is copied to each node. A managed job that loses its machines gets others, and `run` begins
    again: it goes on with the run on the mounted output directory.
    """
    options, own = job.options, job.options.skypilot
    if options.gpus_per_node and own.accelerator is None:
        raise ConfigError(
            "option 'launch.skypilot.accelerator': is missing; give the name of the GPU, such as H100, or "
            "launch.gpus_per_node: 0"
        )
    job.check_kept("SkyPilot")
    file = job.file
    if file is not None:
        try:
            file = file.resolve().relative_to(job.directory.resolve())
        except ValueError:
            raise ConfigError(
                f"{file}: is not below {job.directory}, which SkyPilot copies to the job; start in the directory of "
                "the run file"
            ) from None
    lines = []
    if options.nodes > 1:
        lines += ['SFTX_HEAD=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)', "export SFTX_HEAD"]
    commands = job.commands(None if file is None else file.as_posix(), _RENDEZVOUS if options.nodes > 1 else None)
    buckets = {at: source for at, source in options.mounts.items() if source.startswith(_BUCKETS)}
    local = {at: source for at, source in options.mounts.items() if source.startswith((".", "/", "~"))}
    volumes = {at: source for at, source in options.mounts.items() if at not in {*buckets, *local}}
    resources = given(
        accelerators=f"{own.accelerator}:{options.gpus_per_node}" if options.gpus_per_node else None,
        infra=own.infra,
        cpus=None if options.cpus_per_node is None else f"{options.cpus_per_node}+",
        memory=None if options.memory_per_node is None else f"{options.memory_per_node}+",
        use_spot=own.use_spot or None,
        image_id=None if options.image is None else f"docker:{options.image}",
    )
    task: dict[str, Any] = given(
        name=job.name,
        workdir=str(job.directory),
        num_nodes=options.nodes,
        resources=resources,
        envs=dict(options.env),
        secrets=dict.fromkeys(options.secrets),
        # Cached: a run renames files and writes to their ends, which a bucket that is mounted without a cache cannot.
        file_mounts={**{at: {"source": source, "mode": "MOUNT_CACHED"} for at, source in buckets.items()}, **local},
        volumes=volumes,
        run="\n".join([*lines, commands]),
    )
    text = run_file.dump(merged(task, own.task))
    paths = [path for path in job.local_paths() if path.startswith(("/", "~", ".."))]
    secrets = [word for name in options.secrets for word in ("--secret", name)]
    return LaunchFile(
        suffix="sky.yaml",
        text=f"# {MARK} skypilot`; {NOTE}\n{text}",
        submit=("sky", "jobs", "launch", "--name", job.name, "--yes", "--detach-run", *secrets),
        state=("sky", "jobs", "queue"),
        output=("sky", "jobs", "logs", "--name", job.name),
        warnings=[
            f"{path} is on this machine and is not copied to the job, which has the files below {job.directory} and "
            "launch.mounts"
            for path in paths
        ],
    )
