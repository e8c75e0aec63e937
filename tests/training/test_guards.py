"""What a faulty plugin or a damaged model would do in silence is refused, by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sessions import session_of
from sftx import Batch, ModelError, PluginError
from sftx_plugins.masked_ce import MaskedCE
from sftx_plugins.padded import Padded


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} plus one", "completion": f"{n + 1}"} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class LosesAnExample(Padded):
    def collate(self, examples: Any) -> Batch:
        return super().collate(examples[:1])


class PlansAnEmptyStep(Padded):
    def plan(self, *args: Any, **options: Any) -> Any:
        steps, carried = super().plan(*args, **options)
        return [(), *steps], carried


class PlansTwice(Padded):
    def plan(self, *args: Any, **options: Any) -> Any:
        steps, carried = super().plan(*args, **options)
        return [*steps, steps[0]], carried


def test_a_collator_that_loses_an_example_is_stopped(tiny_model_dir: Path, data: Path) -> None:
    session = session_of(tiny_model_dir, data)
    session.trainer.collator = LosesAnExample()
    with pytest.raises(PluginError, match=r"LosesAnExample.*: collate made a batch of 1 examples of 8"):
        session.trainer.micro_batches(session.plan.epoch(0)[0], session.data.examples)


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (PlansAnEmptyStep(), "a step that is empty or has over 8 rows"),
        (PlansTwice(), "20 planned and 0 carried over of 12"),
    ],
)
def test_a_plan_that_is_no_plan_is_refused(tiny_model_dir: Path, data: Path, collator: Padded, message: str) -> None:
    from sftx.training.loop import Plan

    session = session_of(tiny_model_dir, data)
    with pytest.raises(PluginError, match=message):
        Plan(session.data.examples, collator, session.config.train)


def test_a_loss_whose_denominator_is_not_positive_is_stopped(tiny_model_dir: Path, data: Path) -> None:
    session = session_of(tiny_model_dir, data)

    class Negative(MaskedCE):
        def denominator(self, batch: Batch) -> float:
            return -1.0

    session.trainer.loss = Negative()
    batches = session.trainer.micro_batches(session.plan.epoch(0)[0], session.data.examples)
    with pytest.raises(PluginError, match=r"Negative.*: denominator gave \[-1\.0\]"):
        session.trainer.accumulate(batches, 0)


def test_a_metric_that_is_not_a_number_is_stopped(tiny_model_dir: Path, data: Path) -> None:
    from sftx.data.encode import Question
    from sftx.training.evaluate import Evaluator

    session = session_of(tiny_model_dir, data)
    held_out = dataclasses.replace(session.data, questions=[Question("row", "x", [5, 6], "y")])
    evaluator = Evaluator(
        held_out,
        collator=session.trainer.collator,
        loss=session.trainer.loss,
        metrics={"odd": lambda prediction, reference: float("nan")},
        precision=session.trainer.precision,
        stop_ids=(2,),
        batch_size=4,
        generation=dataclasses.replace(session.config.generation, max_new_tokens=2),
    )
    with pytest.raises(PluginError, match="the metric odd gave a score that is not finite"):
        evaluator(session.lm, 0)


def copy_of(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


def test_damaged_weights_are_one_error(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    broken = copy_of(tiny_model_dir, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="broken: cannot load its weights"):
        session_of(broken, data)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    small = copy_of(tiny_model_dir, tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(small)
    model.resize_token_embeddings(40)
    model.save_pretrained(small)
    with pytest.raises(ModelError, match="its embedding has 40 rows; they do not belong together"):
        session_of(small, data)


def test_tensors_that_the_model_has_no_place_for_are_told(
    tiny_model_dir: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shallow = copy_of(tiny_model_dir, tmp_path / "shallow")
    config = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    session_of(shallow, data)
    assert "9 tensors of its files are not in the model (first: model.layers.1." in caplog.text


def test_a_run_that_fails_before_its_first_step_leaves_no_directory(tiny_model_dir: Path, data: Path) -> None:
    session = session_of(tiny_model_dir, data, output_dir=str(data.parent / "out"))

    def failing(*args: Any) -> Any:
        raise PluginError("no")

    session.trainer.step = failing  # type: ignore[method-assign]
    with pytest.raises(PluginError):
        session.run(0.0)
    assert not (data.parent / "out").exists()
