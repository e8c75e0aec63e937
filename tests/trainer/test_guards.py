"""What a faulty plugin or a damaged model would do in silence is refused, by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from encoding import prepared
from sessions import session_of
from sftx import Batch, Conversation, Message, ModelError, PlainText, PluginError, Tokens, TrainingError
from sftx.assembly.stages.data_stages import CollatorStage, TemplateStage
from sftx.assembly.stages.evaluation_stages import MetricStage
from sftx.assembly.stages.loss_stage import LossStage
from sftx_plugins.collators.padded import Padded
from sftx_plugins.losses.masked_ce import MaskedCE
from trainers import planned


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
    session.trainer.collator = CollatorStage("LosesAnExample", LosesAnExample())
    with pytest.raises(PluginError, match=r"LosesAnExample: collate made a batch of 1 example of 8"):
        session.trainer.micro_batches(planned(session.sampler.epoch(0)[0], session.data.examples))


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (PlansAnEmptyStep(), "a step that is empty or has over 8 rows"),
        (PlansTwice(), "20 planned and 0 carried over of 12"),
    ],
)
def test_a_plan_that_is_no_plan_is_refused(tiny_model_dir: Path, data: Path, collator: Padded, message: str) -> None:
    from sftx.data.sampler import EpochSampler

    session = session_of(tiny_model_dir, data)
    with pytest.raises(PluginError, match=message):
        EpochSampler(session.data.examples, CollatorStage("the collator", collator), session.config.train)


def test_a_loss_whose_denominator_is_not_positive_is_stopped(tiny_model_dir: Path, data: Path) -> None:
    session = session_of(tiny_model_dir, data)

    class Negative(MaskedCE):
        def denominator(self, batch: Batch) -> float:
            return -1.0

    session.trainer.loss = LossStage("Negative", Negative())
    with pytest.raises(PluginError, match=r"Negative: denominator gave \[-1\.0\]"):
        session.trainer.micro_batches(planned(session.sampler.epoch(0)[0], session.data.examples))


def test_a_metric_that_is_not_a_number_is_stopped(tiny_model_dir: Path, data: Path) -> None:
    from sftx.trainer.evaluate import ModelEvaluator
    from sftx.types import Question

    session = session_of(tiny_model_dir, data)
    held_out = dataclasses.replace(session.data, questions=[Question("row", "x", [5, 6], "y")])
    evaluator = ModelEvaluator(
        held_out,
        collator=session.trainer.collator,
        strategy=session.trainer.strategy,
        metrics={"odd": MetricStage("the metric", lambda prediction, reference: float("nan"), "odd")},
        precision=session.trainer.precision,
        stop_ids=(2,),
        batch_size=4,
        generation=dataclasses.replace(session.config.generation, max_new_tokens=2),
    )
    with pytest.raises(PluginError, match="the score of row is nan, expected a finite number"):
        evaluator(session.lm, 0)


def copy_of(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


def test_damaged_weights_are_one_error(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    broken = copy_of(tiny_model_dir, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"broken: its model\.safetensors is damaged"):
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

    session.trainer.train_step = failing  # type: ignore[method-assign]
    with pytest.raises(PluginError):
        session.run()
    assert not (data.parent / "out").exists()


# --- what a loss, a collator or an adapter gives ------------------------------------------------


class Changed(MaskedCE):
    """The loss of a run, whose results `change` may alter."""

    def __init__(self, change: Any, denominator: Any = None) -> None:
        super().__init__()
        object.__setattr__(self, "change", change)
        object.__setattr__(self, "number", denominator)

    def denominator(self, batch: Batch) -> float:
        return super().denominator(batch) if self.number is None else self.number  # type: ignore[attr-defined]

    def __call__(self, lm: Any, batch: Batch) -> Any:
        out = super().__call__(lm, batch)
        self.change(out)  # type: ignore[attr-defined]
        return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: setattr(out, "sum", 3.0), "sum is float, expected a tensor without dimensions"),
        (lambda out: setattr(out, "sum", out.sum[None]), r"sum is a tensor of shape \[1\]"),
        (lambda out: setattr(out, "sum", out.sum.detach()), "sum has no gradient: it is detached, or"),
        (lambda out: out.metrics.update(x=0.5), r"metrics\['x'\] is float"),
        (lambda out: out.metrics.update(loss=out.sum), "has the name 'loss', which the trainer reports itself"),
        (lambda out: out.metrics.update(x=out.sum * float("nan")), r"metrics\['x'\] is nan in step 1"),
        (lambda out: out.metrics.update(x=(out.sum * float("nan"), out.sum)), r"metrics\['x'\] is nan in step 1"),
    ],
)
def test_a_loss_that_is_no_sum_of_scalars_is_stopped(
    tiny_model_dir: Path, data: Path, change: Any, message: str
) -> None:
    session = session_of(tiny_model_dir, data)
    session.trainer.loss = session.trainer.strategy.step.loss = LossStage("the loss", Changed(change))
    with pytest.raises(PluginError, match=message):
        session.trainer.train_step(
            1, 0.1, session.trainer.micro_batches(planned(session.sampler.epoch(0)[0], session.data.examples))
        )


@pytest.mark.parametrize("number", [0.0, -1.0, float("inf"), True])
def test_evaluation_refuses_what_training_refuses(tiny_model_dir: Path, data: Path, number: Any) -> None:
    session = session_of(tiny_model_dir, data, data__eval=[str(data)])
    session.trainer.strategy.step.loss = LossStage("the loss", Changed(lambda out: None, number))
    with pytest.raises(PluginError, match=r"denominator gave"):
        session.evaluator(session.lm, 0)
    other = session_of(tiny_model_dir, data, data__eval=[str(data)])
    other.evaluator._collator = CollatorStage("LosesAnExample", LosesAnExample())
    with pytest.raises(PluginError, match="collate made a batch of 1 example"):
        other.evaluator(other.lm, 0)


@pytest.mark.parametrize("error", [MemoryError("no"), "torch"])
def test_running_out_of_memory_in_evaluation_is_one_line_that_says_what_to_lower(
    tiny_model_dir: Path, data: Path, error: Any
) -> None:
    import torch

    session = session_of(tiny_model_dir, data, data__eval=[str(data)])
    raised = torch.OutOfMemoryError("no") if error == "torch" else error

    def full(*_: Any) -> None:
        raise raised

    session.trainer.strategy.step.loss = LossStage("the loss", Changed(full))
    with pytest.raises(TrainingError, match="lower per_device_eval_batch_size"):
        session.evaluator(session.lm, 0)


def test_an_adapter_that_saves_nothing_is_stopped(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    session = session_of(tiny_model_dir, data)
    session.lm.adapters["lora"].save = lambda directory: None  # type: ignore[method-assign]
    with pytest.raises(PluginError, match=r"wrote no \.safetensors file, so what was trained would be lost"):
        session.save()
    assert not list(session.checkpoints.directory.iterdir())


@pytest.mark.parametrize(
    ("parsed", "message"),
    [
        ("not a tuple of parsed things", "parse returned str, expected a list"),
        ((Tokens((5.7, 6), (True, True)),), "parse gave Tokens"),  # type: ignore[arg-type]
        ((Conversation((Message("user", 5),)),), "parse gave Conversation"),  # type: ignore[arg-type]
        ((PlainText(5),), "parse gave PlainText"),  # type: ignore[arg-type]
    ],
)
def test_a_parser_that_gives_other_types_is_stopped_at_its_row(
    tiny_model_dir: Path, data: Path, parsed: Any, message: str
) -> None:
    from sftx.data.encoder import Encoder

    class Odd:
        fields, samples = "x", ()

        def accepts(self, record: Any) -> bool:
            return True

        def parse(self, record: Any, where: Any) -> Any:
            return parsed

    session = session_of(tiny_model_dir, data)
    with pytest.raises(PluginError, match=rf"rows\.jsonl:1: .*{message}"):
        prepared([str(data)], session.config.data, {"odd": Odd()}, Encoder(session.lm.tokenizer, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"controls": ["<|im_end|>"]}, r"controls is \['<\|im_end\|>'\], expected a frozenset of text"),
        ({"stop": "<|im_end|>"}, "stop is '<.im_end.>', expected a tuple of text"),
        ({"stop": ()}, "`stop` is empty, so a trained model would never end its answer"),
        ({"rewrites_history": "no"}, "rewrites_history is 'no', expected a bool"),
        ({"render": lambda conversation: ["text"]}, "wrote 'text', expected a Segment of text"),
    ],
)
def test_a_template_that_gives_other_types_is_stopped(
    tiny_model_dir: Path, data: Path, change: dict[str, Any], message: str
) -> None:
    from sftx.data.encoder import Encoder
    from sftx_plugins.templates.chatml import ChatML

    session = session_of(tiny_model_dir, data)
    template = type(
        "Odd", (ChatML,), change | {"render": staticmethod(change["render"])} if "render" in change else change
    )()
    with pytest.raises(PluginError, match=message):
        Encoder(session.lm.tokenizer, TemplateStage("the template", template)).encode(
            Conversation((Message("user", "hi"),))
        )
