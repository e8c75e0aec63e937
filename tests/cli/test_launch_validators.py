"""What `sftx run --launch` writes is accepted by SkyPilot and by the models of Kubeflow Trainer's API themselves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".assets" / "launchers" / "bin" / "python"
COMMON = {
    "gpus_per_node": 8,
    "cpus_per_node": 64,
    "memory_per_node": 256,
    "image": "registry.example.com/sftx:1",
    "env": {"NCCL_DEBUG": "WARN"},
    "secrets": ["HF_TOKEN"],
    "skypilot": {"accelerator": "H100", "infra": "aws", "use_spot": True, "task": {"resources": {"disk_size": 512}}},
    "kubernetes": {"namespace": "team-a", "secret": "tokens", "job": {"suspend": True}},
}
needs_launchers = pytest.mark.skipif(not PYTHON.exists(), reason="needs SkyPilot and Trainer's models: make launchers")


def written(tool: str, suffix: str, directory: Path, launch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that --launch writes for a run."""
    from sftx.cli import main

    monkeypatch.chdir(directory)
    data = {"train": "rows.jsonl"}
    plugins: dict[str, Any] = {"chatml": {}, "lora": {}}
    values = {"model": "sftx:tiny", "data": data, "plugins": plugins, "output_dir": "/runs/mine", "launch": launch}
    (directory / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    (directory / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    CliRunner().invoke(main, ["run", "run.yaml", "--launch", tool], catch_exceptions=False)
    return directory / f"run.{suffix}"


def understood(tool: str, file: Path) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(file.parent), "PATH": "/usr/bin:/bin", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [PYTHON, ROOT / "tests" / "helpers" / "validate_launch_file.py", tool, file]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@needs_launchers
@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot_accepts_a_task(nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = {"/runs": "s3://my-bucket", "/volume": "my-volume"}
    file = written("skypilot", "sky.yaml", tmp_path, COMMON | {"nodes": nodes, "mounts": mounts}, monkeypatch)
    done = understood("skypilot", file)
    assert done.returncode == 0, done.stderr
    task = json.loads(done.stdout.splitlines()[-1])
    run = yaml.safe_load(file.read_text(encoding="utf-8"))["run"]
    assert task == {"name": "sftx-mine", "nodes": nodes, "accelerators": {"H100": 8}, "run": run}
    file.write_text(file.read_text(encoding="utf-8").replace("num_nodes:", "nodes:"), encoding="utf-8")
    assert understood("skypilot", file).returncode != 0, "a key that does not exist is found"


@pytest.mark.slow
@needs_launchers
@pytest.mark.parametrize("nodes", [1, 2])
def test_trainer_knows_every_key_of_a_train_job(nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = COMMON | {"nodes": nodes, "mounts": {"/runs": "runs-claim"}}
    file = written("kubernetes", "trainjob.yaml", tmp_path, launch, monkeypatch)
    done = understood("kubernetes", file)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(file.read_text(encoding="utf-8").replace("numNodes:", "nodes:"), encoding="utf-8")
    assert "numNodes" not in json.loads(understood("kubernetes", file).stdout)["spec"]["trainer"]
