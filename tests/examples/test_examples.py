"""The example packages as a third party uses them: built, installed from wheels, and used outside the repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from environments import Environment, build_wheel, make_environment

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = {"sftx-alphapo": "alphapo", "sftx-toolcall": "toolcall"}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("wheels")
    return [build_wheel(EXAMPLES / name, directory) for name in PACKAGES]


@pytest.fixture(scope="module")
def environment(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Return a virtual environment with both packages, on top of the packages of this one."""
    made = make_environment(tmp_path_factory.mktemp("environment"))
    made.install(*wheels)
    return made


def test_no_example_is_left_out() -> None:
    assert {path.parent.name for path in EXAMPLES.glob("*/pyproject.toml")} == set(PACKAGES)


def test_both_are_listed_as_plugins_of_their_own_distributions(environment: Environment, tmp_path: Path) -> None:
    done = environment.run("sftx", "plugins", "list", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = [line.split() for line in done.stdout.splitlines()]
    for distribution, plugin in PACKAGES.items():
        assert [plugin, distribution, "0.1.0"] in [words[:3] for words in listed]


def test_their_own_tests_pass(environment: Environment, tmp_path: Path) -> None:
    for name in PACKAGES:
        shutil.copytree(EXAMPLES / name / "tests", tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = environment.run("pytest", "-q", "-W", "error", "--import-mode=importlib", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


def test_alphapo_trains_on_pairs_from_the_command_line(
    environment: Environment, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"Say {word}.", "chosen": word, "rejected": f"I will not say {word}."}
        for word in ("red", "green", "blue", "yellow")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shutil.copytree(tiny_model, tmp_path / "tiny")
    plugins = ("chatml", "lora", "alphapo", "exact-match")
    options = {
        "model": "tiny",
        "data.train": "pairs.jsonl",
        "data.eval_fraction": "0.5",
        "output_dir": "out",
        "train.max_steps": 2,
        "train.per_device_train_batch_size": 2,
        "train.use_cpu": "true",
        "generation.max_new_tokens": 4,
    }
    command = ["sftx", "run", *(word for name in plugins for word in ("--plugin", name))]
    command += [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    done = environment.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sftx-alphapo 0.1.0" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["num_steps"] == 2
    assert {"rewards/accuracies", "exact-match"} < summary["held_out"]["after"].keys()
    assert summary["samples"][0]["reference"] in ("red", "green", "blue", "yellow"), "the chosen answer is asked for"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    filled = {entry["stage"] for entry in manifest["plugins"] if entry["distribution"] == "sftx-alphapo"}
    assert filled == {"parser", "loss"}
