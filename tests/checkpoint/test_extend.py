"""A run that is complete is extended: with more epochs or steps it goes on from its last step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sftx.config.loading import load
from sftx.errors import ConfigError, OutputError
from sftx.events import Result
from sftx.training import run


def train(directory: Path, *plugins: str, resume: bool = False, **settings: Any) -> Result:
    values = {
        "model": "sftx:tiny",
        "data.train": "sftx:demo/train.jsonl",
        "output_dir": str(directory),
        "train.lr_scheduler_type": "constant",
        "train.use_cpu": True,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    given = [(name, value, f"--set {name}") for name, value in values.items()]
    return run(load(None, add=["chatml", *plugins], assignments=given), resume=resume)


def weights(result: Result) -> dict[str, Any]:
    return load_file(next(Path(result.summary["artefact"]).glob("*.safetensors")))


def test_an_extended_run_is_the_longer_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "extended", "lora", train__max_steps=3)
    extended = train(tmp_path / "extended", "lora", train__max_steps=5, resume=True)
    assert "train.max_steps was 3 and is 5: from here on the learning rate is that of a run of the new" in caplog.text
    whole = train(tmp_path / "whole", "lora", train__max_steps=5)
    assert extended.summary["num_steps"] == 5
    ours, theirs = weights(extended), weights(whole)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    manifest = json.loads((extended.output_dir / "manifest.json").read_text())
    assert [change["after_step"] for change in manifest["length_changes"]] == [3]
    # It is complete again, and repeats from its own run file.
    again = run(load(extended.output_dir / "run.yaml"), resume=True)
    assert again.summary["num_steps"] == 5


def test_a_run_is_not_shortened_below_what_is_done(tmp_path: Path) -> None:
    train(tmp_path / "run", "lora", train__max_steps=3)
    with pytest.raises(ConfigError, match="has done 3 steps, and would end after 2; ask for more steps or epochs"):
        train(tmp_path / "run", "lora", train__max_steps=2, resume=True)
    assert train(tmp_path / "run", "lora", train__max_steps=3, resume=True).summary["num_steps"] == 3


def test_a_complete_run_without_a_checkpoint_is_not_begun_anew(tmp_path: Path) -> None:
    train(tmp_path / "run", train__max_steps=2)
    assert not (tmp_path / "run" / "checkpoints").exists()  # of a full model it would be large
    with pytest.raises(OutputError, match=r"complete and kept no checkpoint \(train\.save_steps\)"):
        train(tmp_path / "run", train__max_steps=4, resume=True)
