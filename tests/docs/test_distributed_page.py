"""The commands in docs/distributed.md run, its options exist, and its manifests are well formed."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from sftx.config.options import TrainConfig

PAGE = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)
    for line in re.sub(r" \\\n\s+", " ", block).splitlines()
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def documents() -> list[dict[str, Any]]:
    return [document for block in blocks("yaml") for document in yaml.safe_load_all(block)]


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def test_the_page_has_the_commands_of_one_host_and_of_several() -> None:
    assert [words(command)[0] for command in COMMANDS] == ["sftx", "torchrun", "sftx", "torchrun", "torchrun"]


def test_every_option_of_torchrun_exists() -> None:
    from torch.distributed.run import get_args_parser

    known = get_args_parser()._option_string_actions
    script = blocks("bash")[0].replace("\\\n", " ")
    (srun,) = re.findall(r"^srun .*", script, re.MULTILINE)
    lines = [words(command) for command in COMMANDS if command.startswith("torchrun")]
    lines.append(words(srun)[words(srun).index("torchrun") :])
    lines += [command_of(document) for document in documents() if "kind" in document and command_of(document)]
    assert len(lines) == 3 + 1 + 3
    for line in lines:
        options = [word.partition("=")[0] for word in line[1 : line.index("-m")] if word.startswith("--")]
        assert set(options) <= set(known), line


def command_of(document: dict[str, Any]) -> list[str]:
    """Return the command that the container of a manifest runs."""
    spec = document["spec"]
    if document["kind"] == "TrainJob":
        return [*spec["trainer"]["command"], *spec["trainer"]["args"]]
    spec = spec.get("pytorchReplicaSpecs", {}).get("Worker", spec)
    return spec["template"]["spec"]["containers"][0]["command"] if "template" in spec else []


def test_every_option_of_sftx_run_exists() -> None:
    from sftx.cli.run import command

    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    text = "\n".join(re.findall(r"sftx run (.*)", re.sub(r" \\\n\s+", " ", PAGE)))
    given = set(re.findall(r"--[a-z-]+", text))
    for document in documents():
        if "kind" in document and (line := command_of(document)):
            given |= {word.partition("=")[0] for word in line[line.index("sftx") :] if word.startswith("--")}
    assert {"--nproc", "--max-restarts", "--output-dir", "--resume"} <= given <= known


def test_every_option_of_a_run_file_exists() -> None:
    options = {field.name for field in dataclasses.fields(TrainConfig)}
    (example,) = (document for document in documents() if "kind" not in document)
    assert set(example["train"]) <= options
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", PAGE)) - {"output_dir"}
    assert named <= options
    modes = get_args(get_type_hints(TrainConfig)["distributed"])
    assert all(f"| `{mode}`" in PAGE for mode in modes)


def test_manifests_are_those_of_kubernetes() -> None:
    """Names fit together: what is mounted is there, and the pods' names are those of the rendezvous."""
    kinds = {document["kind"]: document for document in documents() if "kind" in document}
    assert set(kinds) == {"Service", "Job", "TrainJob", "PyTorchJob"}
    assert all({"apiVersion", "kind", "metadata", "spec"} <= set(document) for document in kinds.values())
    job, service = kinds["Job"]["spec"], kinds["Service"]
    pod = job["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": kinds["Job"]["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    endpoint = f"{kinds['Job']['metadata']['name']}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}"
    line = command_of(kinds["Job"])
    assert f"--rdzv-endpoint={endpoint}" in line
    assert f"--nnodes={job['completions']}" in line
    assert job["completions"] == job["parallelism"]
    (waits,) = (int(word.partition("=")[2]) for word in line if word.startswith("--shutdown-timeout"))
    assert waits < pod["terminationGracePeriodSeconds"]
    for spec in (pod, kinds["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]):
        mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_the_script_for_slurm_is_one_for_bash() -> None:
    (script,) = blocks("bash")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    warned = int(re.search(r"--signal=USR1@(\d+)", script).group(1))  # type: ignore[union-attr]
    assert int(re.search(r"--shutdown-timeout (\d+)", script).group(1)) < warned  # type: ignore[union-attr]
    from sftx.distributed import signals

    handled = re.search(r"SIGNALS_TO_HANDLE=(\S+)", script).group(1).split(",")  # type: ignore[union-attr]
    assert {number.name for number in signals.SIGNALS} <= set(handled)


@pytest.mark.parametrize(
    "command",
    [pytest.param(COMMANDS[0], id="sftx"), pytest.param(COMMANDS[1], id="torchrun", marks=pytest.mark.slow)],
)
def test_the_commands_of_one_host_train(command: str, tmp_path: Path) -> None:
    """The commands run as on the page, but with two processes for eight, and a run file of the tiny model."""
    from sftx.model.tiny import model_dir

    rows = '{"prompt": "a", "completion": "b"}\n' * 16
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    train = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "use_cpu": True}
    run_file = {"model": str(model_dir()), "data": {"train": "rows.jsonl"}, "plugins": {"chatml": {}}, "train": train}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_file), encoding="utf-8")
    line = [word.replace("8", "2") for word in words(command)]
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        line, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "runs" / "run-1"
    assert (out / "model" / "model.safetensors").exists()
    assert done.stdout.count("step 3/3") == 1
    assert '"num_processes": 2' in (out / "manifest.json").read_text()
