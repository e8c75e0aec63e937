"""Gradient checkpointing is chosen where a step would not fit into the free memory, and nowhere else."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3nTextConfig

from architectures import MIXTURES, write_model
from sessions import session_of
from sftx.config.loading import load
from sftx.inspection.memory_plan import checkpointing
from sftx.inspection.memory_plan.planner import Planner
from sftx.inspection.memory_plan.target_device import CPU
from sftx.model import tiny


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer " * 40}]}
    file.write_text(f"{json.dumps(row)}\n" * 8, encoding="utf-8")
    return file


def is_on(data: Path, **options: Any) -> bool:
    """Assemble a run of one micro-batch of 8 rows; return whether its layers are computed again in the backward."""
    session = session_of(tiny.model_dir(), data, train__per_device_train_batch_size=8, **options)
    layers = [module for module in session.lm.model.modules() if type(module).__name__.endswith("DecoderLayer")]
    assert layers
    chosen = {"forward" in vars(layer) for layer in layers}  # of its own, and not that of its class
    assert chosen == {session.config.train.gradient_checkpointing}
    return chosen.pop()


def needs(data: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Return the bytes that a step is planned to need without checkpointing and with it."""
    totals: list[int] = []
    needed = checkpointing._needed

    def recorded(*arguments: Any, **options: Any) -> int:
        totals.append(needed(*arguments, **options))
        return totals[-1]

    with monkeypatch.context() as patched:
        patched.setattr(checkpointing, "_needed", recorded)
        patched.setattr(checkpointing, "free_bytes", lambda _: 1)
        is_on(data)
    without, with_it = totals
    return without, with_it


def test_it_is_on_where_a_step_fits_with_it_alone(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without, with_it = needs(data, monkeypatch)
    assert with_it < without
    monkeypatch.setattr(checkpointing, "_ROOMY", 0.0)  # always plan a step
    monkeypatch.setattr(checkpointing, "free_bytes", lambda _: int(without / 0.9) - 1000)
    with caplog.at_level(logging.INFO):
        assert is_on(data)
        assert any("gradient checkpointing: on" in line for line in caplog.messages)
        caplog.clear()
        assert not is_on(data, train__gradient_checkpointing=False)
        monkeypatch.setattr(checkpointing, "free_bytes", lambda _: int(without / 0.9) + 1000)
        assert not is_on(data)
    assert not any("gradient checkpointing" in line for line in caplog.messages)


def test_where_there_is_room_enough_no_step_is_planned(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "estimate", lambda *_, **__: pytest.fail("a step was planned"))
    monkeypatch.setattr(checkpointing, "free_bytes", lambda _: 10**12)
    assert not is_on(data)
    monkeypatch.setattr(checkpointing, "free_bytes", lambda _: None)
    assert not is_on(data)
    assert is_on(data, train__gradient_checkpointing=True)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("rows", [1, 64])
def test_the_bound_is_more_than_what_is_planned(name: str, rows: int, tmp_path: Path) -> None:
    model = write_model(MIXTURES[name](), tmp_path / "model")
    values = {"model": str(model), "data.train": "none.jsonl", "train.per_device_train_batch_size": rows}
    for plugins in ([], ["lora"]):
        loaded = load(None, add=plugins, assignments=[(option, value, option) for option, value in values.items()])
        planned = checkpointing._needed(Planner(loaded, CPU), rows=rows, max_length=128)
        assert planned < checkpointing._generous_bound(loaded.config, rows * 128)


def test_the_bound_knows_sizes_that_differ_by_layer(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3nTextConfig(**shape, num_hidden_layers=2, intermediate_size=[32, 64], vocab_size_per_layer_input=8)
    config.save_pretrained(tmp_path)
    loaded = load(None, assignments=[("model", str(tmp_path), "model"), ("data.train", "none.jsonl", "data.train")])
    assert 0 < checkpointing._generous_bound(loaded.config, 128) < 10**12


def test_processes_of_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = checkpointing.free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = checkpointing.free_bytes(torch.device("cpu"))
    if alone is not None:
        assert shared == pytest.approx(alone / 4, rel=0.2)


def test_the_free_memory_of_this_host_is_known() -> None:
    free = checkpointing.free_bytes(torch.device("cpu"))
    if Path("/proc/meminfo").exists():
        assert free is not None
        assert 10**6 < free < 10**14
    assert checkpointing.free_bytes(torch.device("meta")) is None
