"""Evaluation: exact means however rows are batched, memory of one batch, answers, and what is written of them."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sessions import session_of
from sftx.assembly.stages.evaluation_stages import MetricStage
from sftx.assembly.stages.loss_stage import LossStage
from sftx.config.options import GenerationConfig
from sftx.errors import OutputError, PluginError, TrainingError
from sftx.events import Sample
from sftx.model.decoding import Decoder
from sftx.trainer.evaluate import ModelEvaluator, write_predictions
from sftx.trainer.parallel import ParallelStrategy, TrainStep
from sftx.trainer.session import Session
from sftx.types import Question
from trainers import answers_in_order

ROWS = 23


@pytest.fixture(scope="module")
def session(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A run whose held-out rows have very different lengths; nothing of it is trained."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": "add " + "one " * (n * 7 % 40), "completion": f"{n} " * (1 + n * 5 % 17)} for n in range(ROWS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = session_of(tiny_model_dir, data, "exact-match", data__eval=[str(data)], generation__max_new_tokens=3)
    for name, parameter in made.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def stages(metrics: dict[str, Any]) -> dict[str, MetricStage]:
    return {name: MetricStage(name, metric, name) for name, metric in metrics.items()}


def evaluator(session: Session, batch_size: int, **changed: Any) -> ModelEvaluator:
    given: dict[str, Any] = {
        "collator": session.trainer.collator,
        "strategy": session.trainer.strategy,
        "metrics": {},
        "precision": session.trainer.precision,
        "stop_ids": (2,),
        "generation": GenerationConfig(max_new_tokens=3),
    }
    return ModelEvaluator(session.eval_data, batch_size=batch_size, **given | changed)


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_means_are_those_of_the_whole_set_however_it_is_batched(session: Session, batch_size: int) -> None:
    lm = session.lm.eval()
    nll, right, count = 0.0, 0, 0
    for example in session.eval_data.examples:
        ids = torch.from_numpy(example.token_ids[None]).long()
        with torch.no_grad():
            logits_TV = lm.model(input_ids=ids).logits[0].double()
        for at, trained in enumerate(example.loss_mask[1:]):
            if trained:
                token = example.token_ids[at + 1]
                nll -= float(logits_TV[at].log_softmax(-1)[token])
                right += int(logits_TV[at].argmax()) == token
                count += 1
    report = evaluator(session, batch_size)(lm, 7)
    assert report.step == 7
    assert report.metrics["loss"] == pytest.approx(nll / count, rel=1e-6)
    assert report.metrics["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert report.metrics["token_accuracy"] == pytest.approx(right / count, abs=1e-9)
    assert len({len(example.token_ids) for example in session.eval_data.examples}) > 15, "or the means could not differ"


class Growth:
    """How many bytes of tensors there are more in the last batches than in the second."""

    def __init__(self) -> None:
        self.calls, self.bytes = 0, [0, 0]

    def __call__(self) -> None:
        self.calls += 1
        if self.calls in (2, ROWS):
            tensors = [value for value in gc.get_objects() if type(value) is torch.Tensor]
            storages = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}  # a view shares that of its base
            self.bytes[self.calls == ROWS] = sum(storages.values())

    @property
    def per_batch(self) -> float:
        return (self.bytes[1] - self.bytes[0]) / (ROWS - 2)


class Keeps:
    """A loss that keeps the logits of one token of each batch."""

    def __init__(self, loss: Any) -> None:
        self.denominator, self.loss, self.kept = loss.denominator, loss, []

    def __call__(self, lm: Any, batch: Any) -> Any:
        self.kept.append(lm.logits(lm.hidden(batch).hidden_BTD[:, :1]))
        return self.loss(lm, batch)


def test_nothing_is_kept_from_batch_to_batch(session: Session) -> None:
    growth, of_keeping = Growth(), Growth()
    evaluator(session, 1, check_stop=growth)(session.lm, 0)
    keeps = ParallelStrategy(TrainStep(session.lm, LossStage("the loss", Keeps(session.trainer.loss))))
    evaluator(session, 1, check_stop=of_keeping, strategy=keeps)(session.lm, 0)
    assert growth.calls == ROWS
    logits_bytes = 4 * session.lm.head_weight.shape[0]
    assert of_keeping.per_batch == pytest.approx(logits_bytes, rel=0.01), "it would be seen"
    assert abs(growth.per_batch) < logits_bytes / 100


# --- answers ------------------------------------------------------------------------------------


def exact(prediction: str, reference: str) -> float:
    return float(prediction == reference)


def test_rows_are_answered_in_batches_of_their_own_size(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decoder = session.lm.model.get_decoder()
    forward = decoder.forward

    def spied(**given: Any) -> Any:
        if given.get("use_cache"):
            sizes.append(len(given["input_ids"]))
        return forward(**given)

    monkeypatch.setattr(decoder, "forward", spied)
    by_default = evaluator(session, 8, metrics=stages({"exact": exact}))(session.lm, 0)
    assert sizes == [8, 8, 8, 8, 8, 8, 7, 7, 7], "each row has three tokens"
    sizes.clear()
    generation = GenerationConfig(max_new_tokens=3, batch_size=20, max_rows=21)
    report = evaluator(session, 8, metrics=stages({"exact": exact}), generation=generation)(session.lm, 0)
    assert sizes == [20, 20, 20, 1, 1, 1]
    known = {sample.row_id: sample for sample in by_default.samples}
    assert all(known[sample.row_id] == sample for sample in report.samples)
    assert [sample.row_id for sample in by_default.samples] == [q.row_id for q in session.eval_data.questions]


def test_names_of_scores_stand_beside_the_loss(session: Session) -> None:
    class Several:
        def __call__(self, prediction: str, reference: str) -> Any:
            return {"first": 1.0, "second": len(reference)}

        def corpus(self, predictions: list[str], references: list[str]) -> Any:
            return {"rows": len(predictions), "longest": max(map(len, references))}

    several = Several()
    report = evaluator(session, 8, metrics=stages({"a": several, "b": exact}))(session.lm, 0)
    assert list(report.metrics) == ["loss", "token_accuracy", "perplexity", "rows", "longest", "b"]
    assert report.metrics["rows"] == ROWS
    assert report.metrics["longest"] == max(len(question.reference) for question in session.eval_data.questions)
    with pytest.raises(PluginError, match="reported as 'token_accuracy' already"):
        evaluator(session, 8, metrics=stages({"token_accuracy": exact}))(session.lm, 0)


class StopError(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 2, 5, 8])
def test_a_stop_is_asked_for_between_batches_and_tokens(session: Session, calls: int) -> None:
    left = iter(range(calls))

    def check_stop() -> None:
        if next(left, None) is None:
            raise StopError

    session.lm.train()
    with pytest.raises(StopError):
        evaluator(session, 8, metrics=stages({"exact": exact}), check_stop=check_stop)(session.lm, 0)
    assert session.lm.training, "an evaluation that was stopped leaves the model as it found it"


@pytest.mark.parametrize(
    ("where", "batch_size", "message"),
    [
        (
            "hidden",
            8,
            r"step 3: to evaluate 8 rows at once, cpu has .*; lower per_device_eval_batch_size to 4 \(now 8\)",
        ),
        ("hidden", 1, "step 3: to evaluate 1 row at once, cpu has not enough memory; lower data.max_length"),
        ("step", 8, r"step 3: to answer 5 rows at once, cpu has .*; lower generation.batch_size to 2 \(now 5\)"),
    ],
)
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_says_what_to_lower(
    session: Session, where: str, batch_size: int, message: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **given: Any) -> None:
        raise error

    monkeypatch.setattr(session.lm if where == "hidden" else Decoder, where, fail)
    given = {"metrics": {"exact": exact}, "generation": GenerationConfig(max_new_tokens=3, batch_size=5)}
    with pytest.raises(TrainingError, match=message):
        evaluator(session, batch_size, **given)(session.lm, 3)


# --- generated_predictions.jsonl ----------------------------------------------------------------


def test_predictions_are_written_in_llama_factory_s_form(session: Session, tmp_path: Path) -> None:
    report = evaluator(session, 8, metrics=stages({"exact": exact}))(session.lm, 0)
    path = tmp_path / "generated_predictions.jsonl"
    path.write_text("what was there before")
    write_predictions(path, report.samples)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == ROWS
    for row, question, sample in zip(rows, session.eval_data.questions, report.samples, strict=True):
        assert list(row) == ["prompt", "predict", "label"]
        assert row["prompt"] == f"<|im_start|>user\n{question.prompt}<|im_end|>\n<|im_start|>assistant\n"
        assert row["label"] == question.reference
        assert row["predict"] == sample.prediction


def test_predictions_keep_any_text_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "generated_predictions.jsonl"
    write_predictions(path, [Sample("row", "?", "北京\n\u2028\x00", 'say "hi"\r\n', "<|im_start|>é")])
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") == 1
    assert "北京" in text, "as they are read, not as escapes"
    assert json.loads(text) == {"prompt": "<|im_start|>é", "predict": 'say "hi"\r\n', "label": "北京\n\u2028\x00"}
    with pytest.raises(OutputError, match=r"nowhere/generated_predictions\.jsonl: cannot be written"):
        write_predictions(tmp_path / "nowhere" / path.name, [])


def test_a_prompt_is_written_with_its_control_tokens_and_an_answer_without(session: Session) -> None:
    tokenizer: Any = session.lm.tokenizer
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    held_out = type(session.eval_data)(session.eval_data.examples, questions=[Question("row", "Hi", ids, "Ho")])
    asked = ModelEvaluator(
        held_out,
        collator=session.trainer.collator,
        strategy=session.trainer.strategy,
        metrics=stages({"exact": exact}),
        precision=session.trainer.precision,
        stop_ids=(),
        batch_size=4,
        generation=GenerationConfig(max_new_tokens=3),
    )
    (sample,) = asked(session.lm, 0).samples
    assert sample.full_prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    answer = answers_in_order(session.lm, [ids], max_new_tokens=3, stop_ids=(), batch_size=1)[0]
    assert sample.prediction == tokenizer.decode(answer, skip_special_tokens=True)
