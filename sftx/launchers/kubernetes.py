"""Write the TrainJob of a run for Kubeflow Trainer."""

from __future__ import annotations

import re
import shlex
from typing import Any, Final

from sftx.config import run_file
from sftx.errors import ConfigError, OutputError, one_line
from sftx.launchers.job import MARK, NOTE, SHUTDOWN_S, SIGNALS, WARNING_S, Job, LaunchFile, given, merged

_GPU: Final = "nvidia.com/gpu"
_NODE: Final = "node"
"""The name of the runtime's job that trains, and of its container: Trainer has fixed both."""
_RUN_FILE: Final = "/tmp/sftx-run.yaml"


def write(job: Job) -> LaunchFile:
    """Return the TrainJob, which has the text of the run file in it. Raises ConfigError.

    Trainer gives torchrun its nodes and their first one in variables (PET_...). A pod that fails is started again by
    its Job, and goes on with the run on the mounted output directory.
    """
    options, own = job.options, job.options.kubernetes
    if options.secrets and own.secret is None:
        raise ConfigError(
            "option 'launch.kubernetes.secret': is missing; name the Secret of the namespace that has "
            f"{', '.join(options.secrets)}, made by kubectl create secret generic"
        )
    job.check_kept("Kubernetes")
    environment: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in options.env.items()]
    environment += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": own.secret, "key": name}}} for name in options.secrets
    ]
    volumes: list[dict[str, Any]] = [
        {"name": f"mount-{n}", "persistentVolumeClaim": {"claimName": claim}}
        for n, claim in enumerate(options.mounts.values())
    ]
    mounts = [{"name": f"mount-{n}", "mountPath": at} for n, at in enumerate(options.mounts)]
    # NCCL needs more shared memory between processes than the 64 MB that a container has.
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    pod = {
        "terminationGracePeriodSeconds": WARNING_S,
        "volumes": volumes,
        "containers": [{"name": _NODE, "volumeMounts": mounts}],
    }
    nodes = {"name": _NODE, "template": {"spec": {"template": {"spec": pod}}}}
    patched = {"template": {"spec": {"replicatedJobs": [nodes]}}}
    amounts = given(
        cpu=None if options.cpus_per_node is None else str(options.cpus_per_node),
        memory=None if options.memory_per_node is None else f"{options.memory_per_node}Gi",
    )
    limits = {**amounts, **({_GPU: str(options.gpus_per_node)} if options.gpus_per_node else {})}
    trainer = given(
        image=options.image,
        numNodes=options.nodes,
        numProcPerNode=job.num_processes,
        command=["bash", "-c"],
        args=[re.sub(r"\$(?=[$(])", "$$", _commands(job))],  # Kubernetes replaces $(NAME), and $$ is a $ to it
        env=environment,
        resourcesPerNode=given(requests=amounts, limits=limits),
    )
    spec = {
        "runtimeRef": {"name": own.runtime},
        "trainer": trainer,
        "runtimePatches": [{"manager": "sftx", "trainingRuntimeSpec": patched}],
    }
    manifest = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": given(name=job.name, namespace=own.namespace),
        "spec": merged(spec, own.job),
    }
    namespace = [] if own.namespace is None else [f"--namespace={own.namespace}"]
    pods = f"jobset.sigs.k8s.io/jobset-name={job.name},batch.kubernetes.io/job-completion-index=0"
    return LaunchFile(
        suffix="trainjob.yaml",
        text=f"# {MARK} kubernetes`; {NOTE}\n{run_file.dump(manifest)}",
        submit=("kubectl", "create", "--filename"),
        state=("kubectl", "get", "trainjob", job.name, *namespace),
        output=("kubectl", "logs", "--follow", f"--selector={pods}", f"--container={_NODE}", *namespace),
        warnings=[
            f"{path} is on this machine, and the job does not see it unless its image has it: put it on a volume of "
            "launch.mounts, and name its path there"
            for path in job.local_paths()
        ],
    )


def _commands(job: Job) -> str:
    """Return what each pod runs: it writes the run file, and starts torchrun, which reads Trainer's variables."""
    lines = ["set -e", *job.options.setup]
    arguments = list(job.arguments)
    if job.file is not None:
        try:
            text = job.file.read_text(encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{job.file}: cannot be read: {one_line(error)}") from error
        end = "RUN_FILE"
        while end in text.splitlines():
            end += "_"
        lines += [f"cat > {_RUN_FILE} <<'{end}'", text.rstrip("\n"), end]
        arguments = [_RUN_FILE, *arguments]
    lines += [
        f"export {SIGNALS}",
        f"exec torchrun --shutdown-timeout {SHUTDOWN_S} -m sftx run {shlex.join([*arguments, '--resume'])}",
    ]
    return "\n".join(lines) + "\n"
