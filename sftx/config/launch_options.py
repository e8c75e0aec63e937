"""The options of `launch:`, the section of a run file that says how a scheduler starts the run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field

_MAX_NODES: Final = 100_000
_NAME: Final = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"
_VARIABLE: Final = r"^[A-Za-z_][A-Za-z0-9_]*$"

Variable = Annotated[str, Field(pattern=_VARIABLE)]


def _check_mounts(mounts: dict[str, str]) -> dict[str, str]:
    """Raise ValueError for a place that is no absolute path."""
    if wrong := next((path for path in mounts if not path.startswith("/")), None):
        raise ValueError(f"absolute paths in the job, each with what is mounted there; {wrong!r} is none")
    return mounts


@dataclass(frozen=True)
class SlurmOptions:
    """Options that sbatch alone takes."""

    partition: Annotated[str | None, Field(min_length=1, description="Partition of the cluster.")] = None
    account: Annotated[str | None, Field(min_length=1, description="Account that is charged.")] = None
    time: Annotated[
        str | None,
        Field(
            pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$",
            description="Time limit of one start as hours:minutes:seconds or days-hours:minutes:seconds, in quotes. "
            "Two minutes before it the run saves and stops, and the job is queued again.",
        ),
    ] = None
    options: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], str | int | bool],
        Field(description="More options of sbatch by their long names, such as {constraint: h100, exclusive: true}."),
    ] = field(default_factory=dict)


@dataclass(frozen=True)
class SkyPilotOptions:
    """Options that SkyPilot alone takes."""

    accelerator: Annotated[
        str | None, Field(min_length=1, description="Name of the GPU, such as H100; `sky gpus list` shows them.")
    ] = None
    infra: Annotated[
        str | None,
        Field(min_length=1, description="Where to run, such as aws, gcp/us-central1 or k8s; any by default."),
    ] = None
    use_spot: Annotated[bool, Field(description="Use machines that are cheaper and may be taken away.")] = False
    task: Annotated[
        dict[str, Any],
        Field(description="More keys of the task, such as {resources: {disk_size: 512}}; they replace those of sftx."),
    ] = field(default_factory=dict)


@dataclass(frozen=True)
class KubernetesOptions:
    """Options that a TrainJob of Kubeflow Trainer alone takes."""

    namespace: Annotated[str | None, Field(min_length=1, description="Namespace; that of kubectl by default.")] = None
    runtime: Annotated[str, Field(min_length=1, description="ClusterTrainingRuntime of the job.")] = "torch-distributed"
    secret: Annotated[
        str | None,
        Field(min_length=1, description="Secret of the namespace that has launch.secrets under their names."),
    ] = None
    job: Annotated[
        dict[str, Any],
        Field(description="More keys of the TrainJob's spec, such as {suspend: true}; they replace those of sftx."),
    ] = field(default_factory=dict)


@dataclass(frozen=True)
class LaunchConfig:
    """How a scheduler starts a run: `sftx run --launch` reads it, and nothing else does."""

    name: Annotated[
        str | None,
        Field(
            pattern=_NAME,
            description="Name of the job: lower case letters, digits and dashes; by default from output_dir.",
        ),
    ] = None
    nodes: Annotated[int, Field(ge=1, le=_MAX_NODES, description="Hosts of the run.")] = 1
    gpus_per_node: Annotated[
        int, Field(ge=0, le=1024, description="GPUs of each host, and processes; 0 is one process on the CPU.")
    ] = 1
    cpus_per_node: Annotated[int | None, Field(ge=1, le=65536, description="CPU cores of each host.")] = None
    memory_per_node: Annotated[int | None, Field(ge=1, le=10**6, description="Memory of each host in GiB.")] = None
    image: Annotated[
        str | None,
        Field(min_length=1, description="Container image that has sftx; under Slurm it needs the plugin pyxis."),
    ] = None
    setup: Annotated[
        tuple[str, ...],
        Field(description="Shell commands that each host runs first, such as [source /shared/venv/bin/activate]."),
    ] = ()
    env: Annotated[dict[Variable, str], Field(description="Environment variables of the run.")] = field(
        default_factory=dict
    )
    secrets: Annotated[
        tuple[Variable, ...],
        Field(description="Environment variables whose values are passed on and written nowhere, such as [HF_TOKEN]."),
    ] = ()
    mounts: Annotated[
        dict[str, str],
        AfterValidator(_check_mounts),
        Field(
            description="What the job sees at a path: a bucket, volume or local directory (SkyPilot), a "
            "PersistentVolumeClaim (Kubernetes), a directory of the host (Slurm with an image)."
        ),
    ] = field(default_factory=dict)
    max_restarts: Annotated[
        int,
        Field(ge=0, le=1000, description="How often killed processes are started again before the job has failed."),
    ] = 3
    slurm: SlurmOptions = SlurmOptions()
    skypilot: SkyPilotOptions = SkyPilotOptions()
    kubernetes: KubernetesOptions = KubernetesOptions()


def launch_names() -> list[str]:
    """Return the dotted names of all options of `launch`; of two with the same end the outer one comes last."""
    of_launchers = [
        f"launch.{section.name}.{option.name}"
        for section in dataclasses.fields(LaunchConfig)
        if dataclasses.is_dataclass(section.default)
        for option in dataclasses.fields(section.default)
    ]
    return [*of_launchers, *(f"launch.{option.name}" for option in dataclasses.fields(LaunchConfig))]
