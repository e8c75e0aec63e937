"""A run that would train nothing, or something else than was meant, is refused instead of saved."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizing import learning_rates, schedule_stage
from sessions import session_of
from sftx import ConfigError, DataError, TrainingError
from sftx.config.loading import load
from sftx.config.options import TrainConfig
from sftx.model import tiny
from sftx.trainer.schedule import num_steps_at_zero
from sftx.trainer.session import Session
from sftx.training import assemble
from sftx_plugins.adapters import token_rows
from sftx_plugins.losses.masked_ce import MaskedCE
from trainers import planned


def write_rows(path: Path, weight: float = 1.0) -> Path:
    question = {"role": "user", "content": "How many legs has a spider?"}
    row = {"messages": [question, {"role": "assistant", "content": "Eight.", "weight": weight}]}
    path.write_text((json.dumps(row) + "\n") * 8)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def first_step(session: Session) -> Any:
    batches = session.trainer.micro_batches(planned(session.sampler.epoch(0)[0], session.data.examples))
    return session.trainer.train_step(1, 0.1, batches)


@pytest.mark.parametrize("options", [{"train__warmup_steps": 0.1}, {"train__warmup_steps": 5, "train__max_steps": 1}])
def test_a_run_whose_only_step_has_rate_0_is_refused(data: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"would be trained.*is 0 in the only step.* (1|5) warm up from 0"):
        session_of(tiny.model_dir(), data, **options)


def test_the_number_of_steps_at_rate_0_is_said(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sftx"):
        session_of(tiny.model_dir(), data, train__warmup_steps=2, train__max_steps=2)
    assert "the learning rate is 0 in 1 of 2 steps" in caplog.text
    assert "all 2 steps warm up (warmup_steps 2): the peak rate is never reached" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{}, {"warmup_steps": 3}, {"warmup_steps": 9}, {"lr_scheduler_type": "polynomial", "lr_power": 400.0},
     {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2, "min_lr_ratio": 0.1}],
)  # fmt: skip
@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_steps_at_rate_0_are_counted(options: dict[str, Any], num_steps: int) -> None:
    config = TrainConfig(**options)
    rates = learning_rates(config, num_steps)
    assert num_steps_at_zero(schedule_stage(config, num_steps), config, num_steps) == rates.count(0)


def test_answers_of_weight_0_are_rows_without_a_trained_token(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="8 of 8 rows train nothing"):
        session_of(tiny.model_dir(), write_rows(tmp_path / "rows.jsonl", weight=0.0))


def test_an_adapter_without_gradients_is_refused(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    session = session_of(tiny.model_dir(), data)
    with torch.no_grad():
        for name, parameter in session.lm.named_parameters():
            if "lora_A" in name:
                parameter.zero_()  # lora_B is 0 as well
    with pytest.raises(TrainingError, match=r"the gradient of all \d+ trained tensors is 0, so nothing would be"):
        first_step(session)
    partly = session_of(tiny.model_dir(), data)
    partly.lm.model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
    with caplog.at_level(logging.WARNING, "sftx"):
        first_step(partly)
    assert "1 of 29 trained tensors get no gradient and stay as they are (first: model.unused)" in caplog.text


def test_an_adapter_that_ignores_added_tokens_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "attach", lambda model, token_ids: {})
    values = {"model": str(tiny.model_dir()), "data.train": str(data), "add_tokens": True}
    loaded = load(None, add=["llama3", "lora"], assignments=[(name, value, name) for name, value in values.items()])
    with pytest.raises(ConfigError, match=r"plugin 'lora'.* added tokens untrained in embedding and output head"):
        assemble(loaded)


def test_a_loss_that_compares_answers_trains_no_prompts(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskedCE, "answers_only", True, raising=False)
    session_of(tiny.model_dir(), data)
    with pytest.raises(ConfigError, match=r"option 'data.train_on_prompt': plugin 'masked-ce'.* compares answers"):
        session_of(tiny.model_dir(), data, data__train_on_prompt=True)
