"""Extras reach the model: a projector in front of the embedding trains, answers, is resumed, shared and loaded.

The package sftx-features asks which of four letters a one-hot vector names. The vector is in no row's text.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ranked import Starter
from same_run import DDP, FSDP2, of_kind
from sessions import session_of
from sftx import ConfigError, Conversation, DataError, Example, Location, PluginError, load_run, pad
from sftx.cli import main
from sftx.distributed.process_group import ProcessGroup
from sftx.model.language_model import CausalLM
from sftx.trainer.evaluation import ModelEvaluation
from sftx.trainer.session import Session
from sftx.verify.run_differences import differences

PACKAGE = Path(__file__).parents[1] / "packages" / "sftx-features"
LETTERS = "abcd"
TRAINED = "--plugin lora --set lora.modules_to_save=[embed_tokens,lm_head] --learning-rate 5e-3 "


def row(rng: random.Random, asked: str) -> dict[str, Any]:
    """Return a row; `asked` stands in its question. The vector has noise, so that no held-out row is trained on."""
    letter = rng.randrange(4)
    features = [float(n == letter) + round(rng.uniform(-0.1, 0.1), 4) for n in range(4)]
    return {"features": features, "question": asked, "answer": LETTERS[letter]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = random.Random(0)
    for name, num in (("train", 64), ("held", 12)):
        lines = [json.dumps(row(rng, "?")) + "\n" for _ in range(num)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    lines = [json.dumps(row(rng, "which " * n + "?")) + "\n" for n in range(8)]
    (tmp_path / "uneven.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def plugin(install_plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugins `features`, and `no-projector`, which has its parser and collator and leaves the model as it is."""
    monkeypatch.syspath_prepend(PACKAGE)
    code = """
from dataclasses import dataclass
from sftx import hookimpl
from sftx_features import Features

@dataclass(frozen=True, eq=False)
class NoProjector:
    @hookimpl
    def sftx_parser(self):
        return Features()

    @hookimpl
    def sftx_collator(self):
        return Features()
"""
    install_plugin("features-here", code, {"features": "Features", "no-projector": "NoProjector"})


def run(data: Path, arguments: str, *, fails: bool = False) -> str:
    command = (
        f"run --model sftx:tiny --plugin chatml --data {data}/train.jsonl --train-batch-size 16 --use-cpu "
        f"--max-new-tokens 3 --lr-scheduler-type constant --output-dir {data}/out " + arguments
    )
    done = CliRunner().invoke(main, command.split())
    assert (done.exit_code != 0) == fails, done.output
    return done.output


def means(data: Path) -> dict[str, float]:
    summary = json.loads((data / "out" / "summary.json").read_text(encoding="utf-8"))
    after: dict[str, float] = summary["held_out"]["after"]
    return after


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["padded", "packed"])
def test_the_contract(packed: bool) -> None:
    from sftx_features import Features  # type: ignore[import-not-found]

    from sftx.testing import check_adapter, check_collator, check_parser

    plugin = Features(packed=packed)
    check_adapter(plugin)
    check_collator(plugin)
    check_parser(plugin)


# --- it learns ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("options", ["", "--set features.packed=true --gradient-checkpointing"])
def test_what_only_the_extras_say_is_learnt_and_answered(data: Path, options: str) -> None:
    held = f"--eval-data {data}/held.jsonl --plugin exact-match --max-steps 250 "
    run(data, TRAINED + held + "--plugin features --per-device-train-batch-size 16 " + options)
    assert means(data)["loss"] < 0.05
    assert means(data)["exact-match"] == 1

    loaded = load_run(data / "out", device="cpu")
    records = [json.loads(line) for line in (data / "held.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [question(record) for record in records]
    prompts = [loaded.prompt(conversation) for conversation in asked]
    extras = [conversation.extras for conversation in asked]
    answers = loaded.answer(prompts, max_new_tokens=3, batch_size=5, extras=extras)
    assert [loaded.tokenizer.decode(ids) for ids in answers] == [record["answer"] for record in records]
    with pytest.raises(DataError, match="1 placeholders and no numbers, expected 1 and 4"):
        loaded.answer(prompts, max_new_tokens=3)


def question(record: Any) -> Conversation:
    """Return a row's conversation without its answer."""
    from sftx_features import Features

    (conversation,) = Features().parse(record, Location("here", 1))
    return dataclasses.replace(conversation, messages=conversation.messages[:-1])


@pytest.mark.slow
@pytest.mark.usefixtures("plugin")
def test_without_the_projector_it_cannot_be_learnt(data: Path) -> None:
    """The best that can be said without the numbers is one of four, for one of the three trained tokens."""
    held = f"--eval-data {data}/held.jsonl --plugin exact-match --max-steps 250 "
    run(data, TRAINED + held + "--plugin no-projector --per-device-train-batch-size 16")
    assert means(data)["loss"] > 0.4
    assert means(data)["exact-match"] < 0.6


# --- it computes the same however a step is split ----------------------------------------------


@pytest.fixture
def session(data: Path, tiny_model: Path, plugin: None) -> Callable[..., Session]:
    def make(**options: Any) -> Session:
        options = {"train__use_cpu": True, "train__train_batch_size": 8} | options
        session = session_of(tiny_model, data / "uneven.jsonl", "features", **options)
        with torch.no_grad():  # all of the vector matters, and every layer of lora
            for name, parameter in session.lm.named_parameters():
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return session

    return make


def gradients(session: Session) -> tuple[float, dict[str, torch.Tensor]]:
    trainer = session.trainer
    micro_batches = trainer.micro_batches(next(iter(session.sampler)))
    loss, _ = trainer.accumulate(micro_batches, sum(one.denominator for one in micro_batches), 0)
    return loss.item(), {n: p.grad.clone() for n, p in session.lm.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_padded_packed_split_and_recomputed(session: Callable[..., Session]) -> None:
    size = "train__per_device_train_batch_size"
    loss, expected = gradients(session(**{size: 8}))
    assert {"model.feature_projector.weight", "model.feature_projector.bias"} <= expected.keys()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    variants: list[dict[str, Any]] = [{size: 4}, {size: 1}, {size: 8, "features.packed": True}]
    variants += [{size: 2, "features.packed": True}, {size: 4, "train.gradient_checkpointing": True}]
    for options in variants:
        other_loss, found = gradients(session(**options))
        assert other_loss == pytest.approx(loss, rel=1e-5), options
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=f"{options} {name}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # see test_compile.py
def test_gradients_are_the_same_compiled(session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.trainer import layers

    monkeypatch.setitem(layers.compile_layers.__kwdefaults__, "backend", "eager")
    size = "train__per_device_train_batch_size"
    loss, expected = gradients(session(**{size: 4}))
    other_loss, found = gradients(session(**{size: 4}, train__torch_compile=True))
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_the_reference_of_a_preference_loss_has_no_extras(session: Callable[..., Session]) -> None:
    made = session(train__per_device_train_batch_size=8)
    (micro_batch,) = made.trainer.micro_batches(next(iter(made.sampler)))
    batch, lm = micro_batch.batch, made.lm
    lm.eval()
    with torch.no_grad(), lm.without_adapters():
        reference_BTD = lm.hidden(batch).hidden_BTD
    from transformers import AutoModelForCausalLM

    base = CausalLM(AutoModelForCausalLM.from_pretrained(made.config.model), lm.tokenizer).eval()
    batch.extras.clear()
    with torch.no_grad():
        torch.testing.assert_close(reference_BTD, base.hidden(batch).hidden_BTD)


@torch.no_grad()
def test_what_an_evaluator_asks_is_text(session: Callable[..., Session]) -> None:
    lm = session(train__per_device_train_batch_size=8).lm.eval()
    evaluation = ModelEvaluation(lm, 0, (), (), None, (), 2, 2, 3, ProcessGroup())
    ((said, _),) = evaluation.log_likelihoods([([10, 11, 12], [13])])
    with lm.ignoring_extras():
        probabilities_V = lm.logits(lm.hidden(pad([Example([10, 11, 12], [0] * 3, "", 0)])).hidden_BTD)[0, -1]  # type: ignore[arg-type]
    assert said == pytest.approx(probabilities_V.log_softmax(0)[13].item(), rel=1e-5)
    assert len(evaluation.answer([[10, 11, 12]])) == 1


# --- resumed, shared, planned --------------------------------------------------------------------


@pytest.mark.usefixtures("plugin")
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(data: Path) -> None:
    from sftx.trainer.trainer import Trainer

    steps = f"{TRAINED} --plugin features --max-steps 6 --save-steps 2 --eval-data {data}/held.jsonl "
    train_step = Trainer.train_step

    def copying(trainer: Trainer, number: int, *rest: Any) -> Any:
        if number == 5:
            shutil.copytree(data / "out", data / "interrupted")
        return train_step(trainer, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", copying)
        run(data, steps)
    (data / "out").rename(data / "whole")
    (data / "interrupted").rename(data / "out")
    run(data, steps + "--resume")
    assert differences(data / "out", data / "whole") == []


def _with_plugin(paths: list[str], rank: int) -> None:
    sys.path[:0] = paths


@pytest.mark.slow
@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("strategy", [DDP, FSDP2])
def test_two_processes_train_and_answer_as_one(data: Path, tmp_path: Path, strategy: str) -> None:
    from sftx.model.tiny import model_dir

    starter = Starter(tmp_path / "ranks")
    arguments = (
        f"--model {model_dir()} --plugin chatml {TRAINED} --plugin features --plugin exact-match --max-steps 4 "
        f"--data {data}/uneven.jsonl --eval-data {data}/held.jsonl --train-batch-size 8 --max-new-tokens 3 "
        "--per-device-train-batch-size 2 --generation-batch-size 4 "
    )
    prepare = partial(_with_plugin, [str(PACKAGE), str(tmp_path / "site-packages")])
    alone = starter.run(arguments.split(), 1, prepare=prepare).succeed()
    shared = starter.run((arguments + strategy).split(), 2, prepare=prepare).succeed()
    for one, other in zip(of_kind(shared, "step"), of_kind(alone, "step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0, abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    answers = "generated_predictions.jsonl"
    assert (shared / answers).read_text() == (alone / answers).read_text()


@pytest.mark.usefixtures("plugin")
def test_a_plan_counts_the_projector(data: Path) -> None:
    done = CliRunner().invoke(
        main,
        f"plan --model sftx:tiny --plugin chatml --plugin features --data {data}/train.jsonl --max-steps 4".split(),
    )
    assert done.exit_code == 0, done.output


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plugin")
def test_a_row_that_the_collator_cannot_take_is_named(data: Path) -> None:
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    wrong = json.loads(lines[0]) | {"features": [1, 2, 3]}
    (data / "train.jsonl").write_text("".join(f"{json.dumps(wrong)}\n" for _ in range(2)), encoding="utf-8")
    output = run(data, "--plugin features --max-steps 1", fails=True)
    assert "train.jsonl:" in output
    assert "1 placeholders and 3 numbers, expected 1 and 4" in output


def test_a_collator_that_makes_no_such_extras_is_named(session: Callable[..., Session]) -> None:
    made = session(train__per_device_train_batch_size=8)
    (micro_batch,) = made.trainer.micro_batches(next(iter(made.sampler)))
    micro_batch.batch.extras = {"scores": torch.ones(2)}
    message = r"features-here.*embed reads batch\.extras\['features'\], and the collator of this run makes scores; name"
    with pytest.raises(PluginError, match=message):
        made.lm.hidden(micro_batch.batch)


def test_what_embed_returns_is_checked(session: Callable[..., Session]) -> None:
    made = session(train__per_device_train_batch_size=8)
    (micro_batch,) = made.trainer.micro_batches(next(iter(made.sampler)))
    own: Any = made.lm.adapters["features"]
    for wrong, found in ((lambda b, e: e[:, :-1], r"torch.float32 \[8, "), (lambda b, e: None, "NoneType")):
        own._adapter.embed = wrong
        with pytest.raises(PluginError, match=f"embed returned {found}.*, expected torch.float32"):
            made.lm.hidden(micro_batch.batch)


def test_extras_for_a_model_that_reads_none_are_refused(data: Path) -> None:
    rows = '{"prompt": "Hello?", "completion": "yes"}\n'
    (data / "train.jsonl").write_text(rows * 2, encoding="utf-8")
    run(data, "--plugin lora --max-steps 1 --learning-rate 1e-3")
    loaded = load_run(data / "out", device="cpu")
    with pytest.raises(ConfigError, match="no adapter of it embeds extras"):
        loaded.answer([[1, 2, 3]], max_new_tokens=1, extras=[{}])


@pytest.mark.usefixtures("plugin")
def test_a_run_that_embeds_extras_is_not_exported_without_them(data: Path) -> None:
    run(data, "--plugin features --max-steps 1")
    done = CliRunner().invoke(main, ["export", str(data / "out"), "--to", "safetensors"])
    assert done.exit_code == 1
    assert "an adapter of this run embeds extras of a row, which it cannot fold into" in done.stderr
    assert not (data / "out" / "export" / "safetensors").exists()


@pytest.mark.usefixtures("plugin")
def test_rows_that_differ_in_their_extras_alone_are_different_rows(data: Path) -> None:
    """All rows of one letter have the same text; only rows with the same numbers as well are duplicates."""
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (data / "train.jsonl").write_text("".join(f"{line}\n" for line in [*lines[:6], lines[0]]), encoding="utf-8")
    output = run(data, "--plugin features --max-steps 1 --set data.filters.duplicates=drop --eval-fraction 2")
    manifest = json.loads((data / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["eval_split"]["num_held_out"] == 2, output
    ledger = [json.loads(line) for line in (data / "out" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum("duplicate" in entry["reason"] for entry in ledger) <= 1
