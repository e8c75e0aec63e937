"""A checkpoint resumes in any number of processes, and is a model that transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import pytest
from safetensors import safe_open

from rank_faults import end_after_step_5
from ranked import Starter
from same_run import DDP, FSDP2, compare

LORA: Final = "--plugin lora "
ONWARD: Final = [
    pytest.param(FSDP2, 2, (1, 4), id="fsdp2-2"),
    pytest.param(FSDP2 + LORA, 2, (4,), id="fsdp2-lora-2"),
    pytest.param(DDP, 2, (4,), id="ddp-2", marks=pytest.mark.slow),
    pytest.param(FSDP2, 1, (2,), id="fsdp2-1", marks=pytest.mark.slow),
    pytest.param(FSDP2, 4, (2,), id="fsdp2-4", marks=pytest.mark.slow),
    pytest.param(FSDP2 + LORA, 2, (1,), id="fsdp2-lora-2-to-1", marks=pytest.mark.slow),
]
"""The strategy, the number of processes that write the checkpoint, and the numbers that it goes on in."""


def written_by(starter: Starter, arguments: list[str], size: int) -> Path:
    """Return a directory with a run in `size` processes that was killed after it saved step 5."""
    group = starter.run(arguments, size, prepare=end_after_step_5)
    codes = group.wait()
    assert codes[0] == 137, group.printed()
    assert [path.name for path in (group.out / "checkpoints").iterdir()] == ["step-5"]
    return group.directory


@pytest.mark.parametrize(("mode", "before", "others"), ONWARD)
def test_a_checkpoint_goes_on_in_another_number_of_processes(
    mode: str, before: int, others: tuple[int, ...], starter: Starter, common: str
) -> None:
    arguments = f"{common} {mode} --save-steps 5".split()
    alone = starter.alone(arguments)
    directory = written_by(starter, arguments, before)
    for after in others:
        copy = starter.directory(f"{before}-to-{after}")
        shutil.copytree(directory / "out", copy / "out")
        group = starter.run([*arguments, "--resume"], after, directory=copy)
        out = group.succeed()
        for place in (out, alone):
            shutil.rmtree(place / "checkpoints", ignore_errors=True)  # they have other numbers of files
        compare(out, alone)


def test_a_shared_checkpoint_is_whole_tensors_which_transformers_loads(starter: Starter, common: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from sftx.checkpoint.load_run import load_run

    directory = written_by(starter, f"{common} {FSDP2} --save-steps 5".split(), 2)
    place = directory / "out" / "checkpoints" / "step-5"
    for stem in ("model", "optimizer"):
        index = json.loads((place / f"{stem}.safetensors.index.json").read_text())["weight_map"]
        files = [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
        assert sorted(set(index.values())) == files
        sizes = [(place / file).stat().st_size for file in files]
        assert max(sizes) < 2 * min(sizes)
        for file in files:
            with safe_open(place / file, framework="pt") as tensors:
                assert set(tensors.keys()) == {name for name, at in index.items() if at == file}
    model, report = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    loaded = load_run(place).lm.model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_a_number_of_processes_that_does_not_divide_a_step_is_told_once(starter: Starter, common: str) -> None:
    group = starter.run(common.split(), 3)
    assert group.wait() == [1, 1, 1]
    assert "3 processes cannot divide 8 rows" in group.printed(0)
    assert group.printed().count("cannot divide") == 1
    assert group.printed(1) + group.printed(2) == ""
    assert not group.out.exists()
