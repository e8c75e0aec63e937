"""`sftx run --launch`: the files for Slurm, SkyPilot and Kubernetes, and what their commands are given."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from sftx.checkpoint import run_directory
from sftx.config.loading import load
from sftx.config.options import as_dict

# The long options in the manual page of sbatch 22.05 that a script of ours may have.
SBATCH = {
    *("account", "array", "begin", "chdir", "comment", "constraint", "container", "cpus-per-gpu", "cpus-per-task"),
    *("deadline", "dependency", "error", "exclude", "exclusive", "export", "gpus", "gpus-per-node", "gpus-per-task"),
    *(
        "gres",
        "hint",
        "job-name",
        "licenses",
        "mail-type",
        "mail-user",
        "mem",
        "mem-per-cpu",
        "mem-per-gpu",
        "nodelist",
    ),
    *("nodes", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "partition", "priority", "qos"),
    *("requeue", "reservation", "signal", "switches", "time", "time-min", "tmp", "wckey"),
}
RUN: dict[str, Any] = {
    "model": "sftx:tiny",
    "data": {"train": "rows.jsonl"},
    "plugins": {"chatml": {}, "lora": {}},
    "train": {"train_batch_size": 16, "max_steps": 2},
}
LAUNCH: dict[str, Any] = {
    "nodes": 2,
    "gpus_per_node": 8,
    "cpus_per_node": 64,
    "memory_per_node": 256,
    "setup": ["source '/shared/my venv/bin/activate'", 'echo "$(hostname) $$"'],
    "env": {"NCCL_DEBUG": "WARN", "GREETING": "it's $HOME"},
    "secrets": ["HF_TOKEN"],
    "mounts": {"/runs": "runs-claim"},
    "max_restarts": 5,
    "slurm": {"partition": "gpu", "time": "1-00:00:00", "options": {"constraint": "h100", "exclusive": True}},
    "skypilot": {"accelerator": "H100", "infra": "aws", "use_spot": True, "task": {"resources": {"disk_size": 512}}},
    "kubernetes": {"namespace": "team-a", "secret": "tokens", "job": {"suspend": True}},
}


@pytest.fixture(autouse=True)
def _in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 16, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def write_run(launch: dict[str, Any] | None, output_dir: str | None = "/runs/mine", name: str = "run.yaml") -> None:
    values = RUN | ({} if launch is None else {"launch": launch})
    values |= {} if output_dir is None else {"output_dir": output_dir}
    Path(name).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def sftx(*arguments: str) -> Result:
    from sftx.cli import main

    return CliRunner().invoke(main, ["run", *arguments], catch_exceptions=False)


def stub(directory: Path, name: str, code: str) -> None:
    """An executable `name` on the path, which writes its arguments to `name.given` and then runs `code`."""
    path = directory / "bin" / name
    path.parent.mkdir(exist_ok=True)
    record = f"import json, sys\njson.dump(sys.argv[1:], open({str(directory / f'{name}.given')!r}, 'w'))\n"
    path.write_text(f"#!{sys.executable}\n{record}{code}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def sbatch_options(script: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE)
    assert len(found) == script.count("#SBATCH")
    return dict(found)


def test_a_batch_script_for_several_nodes(tmp_path: Path) -> None:
    write_run(LAUNCH | {"image": "nvcr.io/sftx:1"}, "runs/mine")
    done = sftx("run.yaml", "--launch", "slurm", "--learning-rate", "1e-3", "--set", "lora.r=4")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "wrote run.sbatch: 2 nodes with 8 GPUs each, 16 processes",
        "to submit it:   sbatch run.sbatch",
        "to see its state:   squeue --me --name=sftx-mine",
        "to see what it prints:   tail -F sftx-mine-JOB_ID.log",
    ]
    script = Path("run.sbatch").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", "run.sbatch"], check=False).returncode == 0
    options = sbatch_options(script)
    assert set(options) <= SBATCH
    given = {"nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8", "cpus-per-task": "64", "mem": "256G"}
    given |= {"partition": "gpu", "time": "1-00:00:00", "constraint": "h100", "exclusive": "", "requeue": ""}
    assert options.items() >= given.items()
    assert options["chdir"] == str(tmp_path)
    assert script.index("#SBATCH --exclusive") < script.index("\nexport "), "sbatch reads no option after a command"
    assert "--container-image=nvcr.io/sftx:1" in script
    assert f"--container-mounts={tmp_path}:{tmp_path},runs-claim:/runs" in script
    warned = int(options["signal"].partition("@")[2])
    assert int(re.search(r"--shutdown-timeout (\d+)", script).group(1)) < warned  # type: ignore[union-attr]
    assert "-m sftx run run.yaml --learning-rate 1e-3 --set lora.r=4 --resume\n" in script


# What a job of Slurm finds, in place of a cluster: srun runs a task and passes SIGUSR1 on to it.
JOB = """
scontrol() { echo "scontrol $*" >> said; echo node-a; echo node-b; }
export SLURM_JOB_ID=10000042 SLURM_JOB_NODELIST=node-[a-b] SLURM_NODEID=1 BATCH_SHELL=$$ PATH=$PWD/bin:$PATH
"""
SRUN = """
import signal, subprocess
task = subprocess.Popen(sys.argv[sys.argv.index("bash"):])
signal.signal(signal.SIGUSR1, lambda *_: task.send_signal(signal.SIGUSR1))
sys.exit(task.wait())
"""
SIGNALLED = """
import os, signal, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
os.kill(int(os.environ["BATCH_SHELL"]), signal.SIGUSR1)
time.sleep(30)
"""


@pytest.mark.parametrize(
    ("code", "requeued", "exit_code"),
    [("", False, 0), ("sys.exit(3)", False, 3), (SIGNALLED, True, 138)],
    ids=["complete", "error", "time limit"],
)
def test_a_batch_script_runs_and_is_queued_again_when_its_time_is_over(
    code: str, requeued: bool, exit_code: int, tmp_path: Path
) -> None:
    write_run(LAUNCH | {"mounts": {}, "setup": ["export FROM_SETUP=yes"]}, "runs/mine")
    assert sftx("run.yaml", "--launch", "slurm").exit_code == 0
    environment = "json.dump(dict(os.environ), open('environment', 'w'))"
    stub(tmp_path, "torchrun", f"import os\n{environment}\n{code}")
    stub(tmp_path, "srun", SRUN)
    environ = {**os.environ, "HF_TOKEN": "hf_1"}
    command = ["bash", "-c", f"{JOB}source run.sbatch"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == exit_code, done.stderr
    said = Path("said").read_text(encoding="utf-8").splitlines()
    assert said == ["scontrol show hostnames node-[a-b]", *(["scontrol requeue 10000042"] if requeued else [])]
    given = json.loads(Path("torchrun.given").read_text(encoding="utf-8"))
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "10000042", "--rdzv-endpoint", "node-a:20042"]
    assert given[: given.index("-m")] == [
        "--nnodes", "2", "--nproc-per-node", "8", "--max-restarts", "5", "--shutdown-timeout", "110",
        *rendezvous, "--rdzv-conf", "is_host=0",
    ]  # fmt: skip
    assert given[given.index("-m") :] == ["-m", "sftx", "run", "run.yaml", "--resume"]
    got = json.loads(Path("environment").read_text(encoding="utf-8"))
    assert got["GREETING"] == "it's $HOME"
    assert (got["HF_TOKEN"], got["FROM_SETUP"]) == ("hf_1", "yes")
    assert "SIGUSR1" in got["TORCHELASTIC_SIGNALS_TO_HANDLE"]


def test_a_secret_that_is_not_passed_on_ends_a_batch_script_with_its_name() -> None:
    write_run({"secrets": ["HF_TOKEN"]}, "runs/mine")
    assert sftx("run.yaml", "--launch", "slurm").exit_code == 0
    done = subprocess.run(["bash", "run.sbatch"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "HF_TOKEN: export it before sbatch" in done.stderr


def test_a_job_of_one_node_needs_no_rendezvous() -> None:
    write_run({"gpus_per_node": 4, "max_restarts": 2}, "runs/mine")
    assert sftx("run.yaml", "--launch", "slurm").exit_code == 0
    script = Path("run.sbatch").read_text(encoding="utf-8")
    assert "exec sftx run run.yaml --resume --nproc 4 --max-restarts 2\n" in script
    assert "torchrun" not in script
    assert sbatch_options(script)["gpus-per-node"] == "4"
    write_run({"gpus_per_node": 0, "max_restarts": 0}, "runs/mine")
    assert sftx("run.yaml", "--launch", "slurm").exit_code == 0
    script = Path("run.sbatch").read_text(encoding="utf-8")
    assert "exec sftx run run.yaml --resume\n" in script
    assert "gpus-per-node" not in sbatch_options(script)


def test_a_task_of_skypilot(tmp_path: Path) -> None:
    mounts = {"/runs": "s3://my-bucket", "/more": "~/more", "/volume": "my-volume"}
    write_run(LAUNCH | {"image": "sftx:1", "mounts": mounts})
    done = sftx("run.yaml", "--launch", "skypilot", "--data", "rows.jsonl")
    assert done.exit_code == 0, done.output
    task = yaml.safe_load(Path("run.sky.yaml").read_text(encoding="utf-8"))
    assert task["resources"] == {
        "accelerators": "H100:8", "infra": "aws", "cpus": "64+", "memory": "256+", "use_spot": True,
        "image_id": "docker:sftx:1", "disk_size": 512,
    }  # fmt: skip
    assert (task["name"], task["num_nodes"], task["workdir"]) == ("sftx-mine", 2, str(tmp_path))
    assert (task["envs"], task["secrets"]) == (LAUNCH["env"], {"HF_TOKEN": None})
    assert task["file_mounts"] == {"/runs": {"source": "s3://my-bucket", "mode": "MOUNT_CACHED"}, "/more": "~/more"}
    assert task["volumes"] == {"/volume": "my-volume"}
    stub(tmp_path, "torchrun", "")
    node = (
        "source() { :; }; export SKYPILOT_NODE_IPS=$'10.0.0.1\\n10.0.0.2' SKYPILOT_NODE_RANK=0 SKYPILOT_TASK_ID=sky-1"
    )
    run = f"{node} PATH=$PWD/bin:$PATH\n{task['run']}"
    assert subprocess.run(["bash", "-c", run], capture_output=True, check=False).returncode == 0
    given = json.loads(Path("torchrun.given").read_text(encoding="utf-8"))
    assert given[given.index("--rdzv-id") :] == [
        "--rdzv-id", "sky-1", "--rdzv-endpoint", "10.0.0.1:29500", "--rdzv-conf", "is_host=1",
        "-m", "sftx", "run", "run.yaml", "--data", "rows.jsonl", "--resume",
    ]  # fmt: skip


def expanded(text: str, environment: dict[str, str]) -> str:
    """What Kubernetes makes of an argument: $(NAME) is replaced where NAME is known, and $$ is a $."""
    return re.sub(r"\$(\$)|\$\((\w+)\)", lambda m: "$" if m[1] else environment.get(m[2], m[0]), text)


def test_a_train_job_brings_its_run_file(tmp_path: Path) -> None:
    write_run(LAUNCH | {"image": "sftx:1"}, name="mine.yaml")
    text = Path("mine.yaml").read_text(encoding="utf-8") + "# $(HF_TOKEN) costs 5 $$\n"
    Path("mine.yaml").write_text(text, encoding="utf-8")
    done = sftx("mine.yaml", "--launch", "kubernetes", "--resume")
    assert done.exit_code == 0, done.output
    assert "rows.jsonl is on this machine, and the job does not see it" in done.stderr
    manifest = yaml.safe_load(Path("mine.trainjob.yaml").read_text(encoding="utf-8"))
    spec, trainer = manifest["spec"], manifest["spec"]["trainer"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert manifest["metadata"] == {"name": "sftx-mine", "namespace": "team-a"}
    assert (spec["runtimeRef"], spec["suspend"]) == ({"name": "torch-distributed"}, True)
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("sftx:1", 2, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "64", "memory": "256Gi", "nvidia.com/gpu": "8"}
    secret = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "tokens", "key": "HF_TOKEN"}}}
    assert secret in trainer["env"]
    (patch,) = spec["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {"name": "mount-0", "persistentVolumeClaim": {"claimName": "runs-claim"}} in pod["volumes"]
    assert {"name": "mount-0", "mountPath": "/runs"} in container["volumeMounts"]
    (script,) = trainer["args"]
    stub(tmp_path, "torchrun", "")
    script = expanded(script, {"HF_TOKEN": "hf_1"}).replace("/tmp/sftx-run.yaml", "written.yaml")
    command = [*trainer["command"], f"source() {{ :; }}; PATH=$PWD/bin:$PATH\n{script}"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert Path("written.yaml").read_text(encoding="utf-8") == text
    given = json.loads(Path("torchrun.given").read_text(encoding="utf-8"))
    assert given == ["--shutdown-timeout", "110", "-m", "sftx", "run", "written.yaml", "--resume"]


@pytest.mark.parametrize(
    ("tool", "program", "says", "submitted", "printed"),
    [
        ("slurm", "sbatch", "Submitted batch job 42", ["run.sbatch"], "tail -F sftx-mine-42.log"),
        ("skypilot", "sky", "Job submitted, ID: 7",
         ["jobs", "launch", "--name", "sftx-mine", "--yes", "--detach-run", "--secret", "HF_TOKEN", "run.sky.yaml"],
         "sky jobs logs --name sftx-mine"),
        ("kubernetes", "kubectl", "trainjob.trainer.kubeflow.org/sftx-mine created",
         ["create", "--filename", "run.trainjob.yaml"], "kubectl get trainjob sftx-mine --namespace=team-a"),
    ],
)  # fmt: skip
def test_submit_calls_the_launchers_own_command(
    tool: str, program: str, says: str, submitted: list[str], printed: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_run(LAUNCH | {"image": "i"})
    stub(tmp_path, program, f"print({says!r})")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HF_TOKEN", "hf_1")
    done = sftx("run.yaml", "--launch", tool, "--submit")
    assert done.exit_code == 0, done.output
    assert json.loads(Path(f"{program}.given").read_text(encoding="utf-8")) == submitted
    assert says in done.stdout
    assert printed in done.stdout
    assert "hf_1" not in done.output + Path(submitted[-1]).read_text(encoding="utf-8")
    stub(tmp_path, program, "sys.exit('error: invalid\\npartition')")
    failed = sftx("run.yaml", "--launch", tool, "--submit")
    assert failed.exit_code == 1
    command = shlex.join([program, *submitted])
    assert failed.stderr.endswith(f"sftx: error: {command}: failed with exit code 1: error: invalid partition\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--set", "launch.partition=gpu"], "did you mean 'launch.slurm.partition'?"),
        (["--set", "launch.nodse=2"], "did you mean 'nodes'?"),
        (["--set", "launch.slurm.acount=x"], "did you mean 'account'?"),
        (["--set", "launch.env={A B: x}"], "option 'launch.env.A B'"),
        (["--set", "launch.mounts={runs: x}"], "absolute paths in the job, each with what is mounted there"),
        (["--set", "launch.slurm.time=1200"], "got 1200, expected a valid string; put it in quotes"),
        (["--set", 'launch.slurm.partition="a\\nrm -rf /"'], "partition is 'a\\nrm -rf /', and what follows a line"),
        (["--set", "launch.nodes=3"], "24 processes cannot divide 16 rows evenly"),
        (["--set", "lora.r=0"], "got 0, expected a number greater than or equal to 1"),
        (["--submit"], "sbatch is not on the path; install it, or leave --submit out"),
        (["--nproc", "2"], "--launch and --nproc exclude each other"),
        (["--dry-run"], "--launch and --dry-run exclude each other"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_nothing_is_written(
    arguments: list[str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(LAUNCH | {"image": "i"})
    monkeypatch.setenv("PATH", "/nowhere")
    done = sftx("run.yaml", "--launch", "slurm", *arguments)
    assert done.exit_code in (1, 2)
    assert error in done.output
    assert sorted(path.name for path in Path().iterdir()) == ["rows.jsonl", "run.yaml"]


def test_what_a_launcher_lacks_is_named() -> None:
    write_run({"mounts": {"/runs": "x"}, "secrets": ["HF_TOKEN"]}, None)
    assert "give one with output_dir" in sftx("run.yaml", "--launch", "slurm").stderr
    write_run({"mounts": {"/runs": "x"}, "secrets": ["HF_TOKEN"]})
    assert "'launch.mounts': a job of Slurm sees" in sftx("run.yaml", "--launch", "slurm").stderr
    assert "give the name of the GPU, such as H100" in sftx("run.yaml", "--launch", "skypilot").stderr
    assert "name the Secret of the namespace that has HF_TOKEN" in sftx("run.yaml", "--launch", "kubernetes").stderr
    for tool in ("skypilot", "kubernetes"):
        more = ["--set", "launch.gpus_per_node=0", "--set", "launch.kubernetes.secret=tokens"]
        done = sftx("run.yaml", "--launch", tool, *more, "--output-dir", "here")
        assert "'output_dir': here is gone with the machine" in done.stderr
    Path("run.sbatch").write_text("#!/bin/bash\n", encoding="utf-8")
    write_run({}, "here")
    assert "holds something else and is not overwritten" in sftx("run.yaml", "--launch", "slurm").stderr


def test_how_a_run_is_started_does_not_keep_it_from_going_on(tmp_path: Path) -> None:
    write_run({"nodes": 2}, "here")
    before = as_dict(load(Path("run.yaml")).config)
    before["train"] |= {"train_batch_size": 16, "per_device_train_batch_size": 8}
    now = {**before, "launch": None}
    directory = run_directory.RunDirectory(tmp_path / "here", resumed=True)
    directory.path.mkdir()
    directory.write_start(before, {"plugins": []})
    directory.check_same(now, [])
    assert not directory.has_new_length
