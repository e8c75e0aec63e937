"""What preference losses need of a run: references of three kinds, steps split anyhow, rows that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pair_rows import pair_rows, write_pair_rows
from sftx import ConfigError, DataError
from sftx.config.loading import load
from sftx.model import tiny
from sftx.trainer.session import Session
from sftx.training import assemble, run

Steps = list[dict[str, Any]]


def options_of(tmp_path: Path, name: str, **more: Any) -> list[tuple[str, Any, str]]:
    given = {
        "model": str(tiny.model_dir()),
        "data.train": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / name),
        "train.train_batch_size": 4,
        "train.per_device_train_batch_size": 2,
        "train.max_steps": 4,
        "train.learning_rate": 1e-3,
        "train.use_cpu": True,
        **more,
    }
    return [(key, value, key) for key, value in given.items()]


def steps_of(tmp_path: Path, name: str, *plugins: str, **more: Any) -> Steps:
    """Run, and return the lines of the steps and of the evaluations."""
    run(load(None, add=["chatml", *plugins], assignments=options_of(tmp_path, name, **more)))
    lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in map(json.loads, lines) if line["event"] in ("step", "evaluate")]
    return [{k: v for k, v in line.items() if k in ("loss", "grad_norm", "kl") or "/" in k} for line in kept]


def assert_same(ours: Steps, theirs: Steps) -> None:
    assert len(ours) == len(theirs) > 3
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("loss", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_a_reference_is_the_same_by_adapters_computed_once_and_as_another_model(tmp_path: Path, loss: str) -> None:
    write_pair_rows(tmp_path / "rows.jsonl", 12, labelled=loss == "kto")
    write_pair_rows(tmp_path / "held.jsonl", 4, labelled=loss == "kto", seed="held out")
    held_out = {"data.eval": str(tmp_path / "held.jsonl")}
    shutil.copytree(tiny.model_dir(), tmp_path / "copy")
    by_adapters = steps_of(tmp_path, "adapters", "lora", loss, **held_out)
    once = {f"{loss}.reference": "precompute"}
    assert_same(steps_of(tmp_path, "once", "lora", loss, **held_out, **once), by_adapters)
    copy = {f"{loss}.reference_model": str(tmp_path / "copy")}
    assert_same(steps_of(tmp_path, "copy-run", "lora", loss, **held_out, **copy), by_adapters)
    assert by_adapters[1]["loss"] == pytest.approx(0.5 if loss == "kto" else 0.6931, abs=1e-3)
    assert by_adapters[-1] != pytest.approx(by_adapters[0], rel=1e-3)


@pytest.mark.parametrize("loss", ["kto", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_step_is_the_same_however_it_is_split_and_laid_out(tmp_path: Path, loss: str) -> None:
    """KTO's distance to the reference is that of the step, whatever a micro-batch has of it."""
    write_pair_rows(tmp_path / "rows.jsonl", 16, labelled=loss == "kto")
    size = "train.per_device_train_batch_size"
    eight = {"train.train_batch_size": 8, "train.learning_rate": 1e-2}
    whole = steps_of(tmp_path, "8", "lora", loss, **eight, **{size: 8})
    for micro_batch in (4, 1):
        assert_same(steps_of(tmp_path, f"{micro_batch}", "lora", loss, **eight, **{size: micro_batch}), whole)
    free = {**eight, size: 2, "padded.padding_free": True}
    assert_same(steps_of(tmp_path, "free", "lora", loss, "padded", **free), whole)
    if loss == "kto":
        assert max(step["kl"] for step in whole) > 0


@pytest.mark.parametrize(
    "loss", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("orpo", "simpo", "kto"))]
)
def test_the_answers_of_a_pair_share_the_forward_of_their_prompt(tmp_path: Path, loss: str) -> None:
    write_pair_rows(tmp_path / "rows.jsonl", 16, labelled=False)
    padded = steps_of(tmp_path, "padded", "lora", loss)
    free = {"padded.padding_free": True}
    assert_same(steps_of(tmp_path, "shared", "lora", "padded", loss, **free), padded)
    session = assemble(
        load(None, add=["chatml", "lora", "padded", loss], assignments=options_of(tmp_path, "never", **free))
    )
    for one in session.trainer.micro_batches(next(iter(session.sampler))):
        assert one.batch.input_ids_BT.numel() < 0.8 * one.batch.num_input_tokens


def test_kto_takes_pairs_as_two_answers(tmp_path: Path) -> None:
    write_pair_rows(tmp_path / "rows.jsonl", 8, labelled=False)
    steps = steps_of(tmp_path, "pairs", "lora", "kto")
    assert all({"rewards/chosen", "rewards/rejected", "rewards/margins"} <= step.keys() for step in steps)
    assert steps[-1]["rewards/margins"] == pytest.approx(
        steps[-1]["rewards/chosen"] - steps[-1]["rewards/rejected"], abs=1e-5
    )


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., Session]:
    """Return a function that assembles a run on these rows."""

    def start(rows: list[dict[str, Any]], *plugins: str, **more: Any) -> Session:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
        return assemble(load(None, add=["chatml", *plugins], assignments=options_of(tmp_path, "never", **more)))

    return start


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("dpo", "is not a preference pair, and dpo trains on nothing else"),
        ("orpo", "is not a preference pair, and orpo trains on nothing else"),
        ("kto", "does not say whether its answer is good or bad"),
    ],
)
def test_a_row_of_another_format_is_named_before_the_model_is_loaded(
    started: Callable[..., Session], loss: str, message: str
) -> None:
    rows = [
        *pair_rows(4, labelled=False),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    with pytest.raises(DataError, match=rf"rows\.jsonl:5: {message}"):
        started(rows, "lora", loss, model="sftx:tiny")


def test_options_that_contradict_are_refused(started: Callable[..., Session]) -> None:
    rows = pair_rows(4, labelled=False)
    with pytest.raises(ConfigError, match="reference_model='x' is another model"):
        started(rows, "lora", "dpo", **{"dpo.reference": "adapters", "dpo.reference_model": "x"})
    with pytest.raises(ConfigError, match="label_smoothing is for loss_type sigmoid and robust"):
        started(rows, "lora", "dpo", **{"dpo.loss_type": "ipo", "dpo.label_smoothing": 0.1})
    with pytest.raises(ConfigError, match=r"without its adapters.*--plugin lora"):
        started(rows, "dpo", **{"dpo.reference": "adapters"})
    with pytest.raises(ConfigError, match=r"answers.*prompts"):
        started(rows, "lora", "dpo", **{"data.train_on_prompt": True})
    with pytest.raises(ConfigError, match=r"data\.streaming.*before the first step"):
        started(rows, "dpo", **{"data.streaming": True})


def test_a_stream_of_pairs_is_trained_with_the_adapters_reference(tmp_path: Path) -> None:
    write_pair_rows(tmp_path / "rows.jsonl", 16, labelled=False)
    steps = steps_of(tmp_path, "stream", "lora", "dpo", **{"data.streaming": True})
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
