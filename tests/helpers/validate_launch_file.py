"""Reads a launch file with the launcher's own code, in an environment that has it: `make launchers` makes one.

    python validate_launch_file.py skypilot|kubernetes FILE

It prints what the launcher has understood, as JSON. Only that environment runs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def skypilot(values: dict[str, Any]) -> dict[str, Any]:
    """SkyPilot checks a task against its schema, and makes a Task of it."""
    import sky  # type: ignore[import-not-found]

    task = sky.Task.from_yaml_config(values, secrets_overrides=[(name, "given") for name in values.get("secrets", ())])
    (resources,) = task.resources
    return {"name": task.name, "nodes": task.num_nodes, "accelerators": resources.accelerators, "run": task.run}


def kubernetes(values: dict[str, Any]) -> dict[str, Any]:
    """The models of Trainer's API leave out what they do not know."""
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import (  # type: ignore[import-not-found]
        TrainerV1alpha1TrainJob,
    )

    job = TrainerV1alpha1TrainJob.from_dict(values)
    understood: dict[str, Any] = json.loads(job.to_json())
    return understood


if __name__ == "__main__":
    read = {"skypilot": skypilot, "kubernetes": kubernetes}[sys.argv[1]]
    print(json.dumps(read(yaml.safe_load(Path(sys.argv[2]).read_text(encoding="utf-8")))))
