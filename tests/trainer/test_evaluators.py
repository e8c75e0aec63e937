"""Evaluators: what they may ask of the model, compared with transformers, and what a run does with their scores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sftx
from sftx import Conversation, Message, PluginError
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import ConfigError
from sftx.testing.kit import Kit
from sftx.trainer.evaluation import ModelEvaluation

PACKAGE = Path(__file__).parents[1] / "packages" / "sftx-retention" / "sftx_retention" / "__init__.py"
CODE = '''
import random
from dataclasses import dataclass
import sftx
from sftx import hookimpl

@dataclass(frozen=True, eq=False)
class Odd:
    """Does what `how` says."""
    how: str = "scores"
    @hookimpl
    def sftx_evaluator(self):
        return self
    def evaluate(self, evaluation):
        import torch
        random.seed(evaluation.step), torch.manual_seed(evaluation.step), evaluation.lm.train()
        SEEN.append([(row.format, [turn.role for turn in row.messages]) for row in evaluation.rows])
        return {"scores": {"odd": -abs(evaluation.step - 2.0)}, "lists": [1.0], "nan": {"odd": float("nan")},
                "clashes": {"retention": 1.0}}[self.how]

SEEN = []

@dataclass(frozen=True, eq=False)
class Both:
    """A control with a metric that declines rows."""
    decline_all: bool = False
    @hookimpl
    def sftx_metric(self):
        return Declines(self.decline_all)
    @hookimpl
    def sftx_control(self, run):
        return sftx.Control()

class Declines:
    def __init__(self, decline_all):
        self.decline_all = decline_all
    def __call__(self, prediction, reference, row):
        if self.decline_all or not int(reference) % 2:
            return None
        assert row.format == "messages" and row.messages[-1].content == row.prompt == "say " + reference
        return float(reference)
'''
ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}]} for n in range(12)
]


# --- what an evaluator may ask ------------------------------------------------------------------


class Kits:
    kit = Kit(object())
    lm = kit.language_model().eval()


def evaluation(batch_size: int = 4, process_group: ProcessGroup | None = None) -> ModelEvaluation:
    return ModelEvaluation(
        lm=Kits.lm,
        step=0,
        rows=[],
        examples=[],
        encoder=Kits.kit.encoder,
        stop_ids=Kits.kit.encoder.stop_ids,
        batch_size=batch_size,
        generation_batch_size=batch_size,
        max_new_tokens=5,
        process_group=process_group or ProcessGroup(),
    )


def pairs() -> list[tuple[list[int], list[int]]]:
    """Pairs of very different lengths; of the last ones the continuation is the model's own greedy answer."""
    made = [(list(range(5, 6 + 7 * n % 23)), [3 + (n * k) % 50 for k in range(1, 2 + n % 5)]) for n in range(9)]
    asked = [[7, 8, 9], [20, 30]]
    return [*made, ([4], []), *zip(asked, evaluation().answer(asked, stop_ids=()), strict=True)]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_log_likelihoods_are_those_of_transformers(batch_size: int) -> None:
    heads: list[Any] = []
    hook = Kits.lm.model.get_output_embeddings().register_forward_hook(lambda *given: heads.append(given))
    given = pairs()
    heads.clear()
    found = evaluation(batch_size).log_likelihoods(given)
    hook.remove()
    assert heads == [], "the logits of whole rows are never made"
    for (prompt, continuation), (total, is_greedy) in zip(given, found, strict=True):
        with torch.no_grad():
            logits_TV = Kits.lm.model(input_ids=torch.tensor([[*prompt, *continuation]])).logits[0].double()
        logits_TV = logits_TV[len(prompt) - 1 : len(prompt) + len(continuation) - 1]
        expected = sum(
            float(row_V.log_softmax(-1)[token]) for row_V, token in zip(logits_TV, continuation, strict=True)
        )
        assert total == pytest.approx(expected, abs=1e-5)
        assert is_greedy == (logits_TV.argmax(-1).tolist() == continuation)
    assert [is_greedy for _, is_greedy in found[-3:]] == [True] * 3
    assert not all(is_greedy for _, is_greedy in found)


def test_a_prompt_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="the prompt of pair 1 has no token"):
        evaluation().log_likelihoods([([1], [2]), ([], [2])])
    with pytest.raises(ValueError, match="prompt 0 has no token"):
        evaluation().generate([[]])


def test_a_conversation_is_encoded_as_it_is_trained() -> None:
    asked = Conversation((Message("user", "What is 2 + 3?"),))
    prompt, answer = evaluation().encode(asked, "It is 5.")
    whole, mask, _ = Kits.kit.encoder.encode(Conversation((*asked.messages, Message("assistant", "It is 5."))))
    assert [*prompt, *answer] == whole[: len(prompt) + len(answer)]
    assert whole[len(prompt) + len(answer)] in Kits.kit.encoder.stop_ids
    assert mask[len(prompt)]
    assert not any(mask[: len(prompt)])
    text, after = evaluation().encode("The sun", " rises")
    assert Kits.kit.tokenizer.decode([*text, *after]) == "The sun rises"
    assert evaluation().encode(asked) == (prompt, [])


def test_an_answer_ends_at_the_texts_that_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[Any] = ["Say", [5, 6, 7], Conversation((Message("user", "Hi"),))]
    whole = evaluation().generate(prompts, max_new_tokens=12)
    stop = whole[0][2:4]
    assert len(stop) == 2
    decoder, lengths = Kits.lm.model.get_decoder(), list[int]()
    forward = decoder.forward

    def spied(**given: Any) -> Any:
        lengths.append(given["input_ids"].shape[1])
        return forward(**given)

    monkeypatch.setattr(decoder, "forward", spied)
    cut = evaluation(1).generate(prompts, max_new_tokens=12, stop=[stop])
    assert cut == [text.partition(stop)[0] for text in whole]
    assert len(prompts) < len(lengths) < 12 * len(prompts)


class Two(ProcessGroup):
    """One of two ranks that are threads."""

    world_size = 2
    barrier = threading.Barrier(2, timeout=30)
    shared: list[Any] = [None, None]  # noqa: RUF012

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def all_gather(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.barrier.wait()
        gathered = list(self.shared)
        self.barrier.wait()
        return gathered


def on_two(work: Callable[[ModelEvaluation, int], Any]) -> list[Any]:
    results: list[Any] = [None, None]

    def run(rank: int) -> None:
        try:
            results[rank] = work(evaluation(2, Two(rank)), rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_processes_divide_the_work_and_each_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    given = pairs()
    prompts = [prompt for prompt, _ in given]
    expected = evaluation(2).log_likelihoods(given), evaluation(2).generate(prompts)
    rows: list[int] = []
    hidden = Kits.lm.hidden
    monkeypatch.setattr(Kits.lm, "hidden", lambda batch: rows.append(len(batch.row_ids)) or hidden(batch))
    for found in on_two(lambda one, _: (one.log_likelihoods(given), one.generate(prompts))):
        assert found == expected
    assert sum(rows) == len(given), "no row is computed twice"
    errors = on_two(lambda one, rank: one.log_likelihoods(given[rank:]))
    assert all(isinstance(error, PluginError) and "ask for different things" in str(error) for error in errors)


# --- runs with evaluators -----------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, install_plugin: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    install_plugin("sftx-retention", PACKAGE.read_text(encoding="utf-8"), {"retention": "Retention"})
    install_plugin("sftx-odd", CODE, {"odd": "Odd", "both": "Both"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))

    def make(output_dir: str, plugins: dict[str, Any], **options: Any) -> Any:
        given = {"train_batch_size": 4, "max_steps": 4, "eval_steps": 1, "learning_rate": 1e-2, **options}
        plugins = {"chatml": {}, "lora": {"r": 2}, **plugins}
        return sftx.run(
            data=ROWS, plugins=plugins, model="sftx:tiny", add_tokens=True, output_dir=output_dir, use_cpu=True, **given
        )

    return make


def test_a_score_selects_the_best_checkpoint_without_held_out_rows(run: Callable[..., Any]) -> None:
    best = run("best", {"odd": {}}, metric_for_best_model="odd", load_best_model_at_end=True)
    scores = [(line["step"], line["odd"]) for line in best.history if line["event"] == "evaluate"]
    assert scores == [(0, -2), (1, -1), (2, 0), (3, -1), (4, -2), (2, 0)]
    assert best.summary["best"] == {"step": 2, "value": 0}
    assert best.summary["held_out"]["before"] == {"odd": -2}
    saved = "adapter/adapter_model.safetensors"
    kept = next((best.output_dir / "checkpoints" / "step-2").rglob("adapter_model.safetensors"))
    assert (best.output_dir / saved).read_bytes() == kept.read_bytes()
    assert (
        kept.read_bytes()
        != next((best.output_dir / "checkpoints" / "step-4").rglob("adapter_model.safetensors")).read_bytes()
    )
    report = (best.output_dir / "report.html").read_text(encoding="utf-8")
    assert "odd" in report


def test_early_stopping_goes_by_a_score(run: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sftx")
    done = run("out", {"odd": {}}, max_steps=9, metric_for_best_model="odd", early_stopping_patience=2)
    assert done.summary["num_steps"] == 4
    assert "ends after step 4 (early-stopping: odd was no better 2 times in a row)" in caplog.text


def test_a_run_trains_bit_for_bit_as_without_evaluators(run: Callable[..., Any]) -> None:
    """One evaluator seeds random numbers and leaves the model in training mode; dropout is on."""
    options: dict[str, Any] = {"lora": {"r": 2, "lora_dropout": 0.5}}
    with_both = run("with", {**options, "odd": {}, "retention": {}})
    without = run("without", options, eval_steps=None)
    losses = [[line["loss"] for line in one.history if line["event"] == "step"] for one in (with_both, without)]
    assert losses[0] == losses[1]
    saved = "adapter/adapter_model.safetensors"
    assert (with_both.output_dir / saved).read_bytes() == (without.output_dir / saved).read_bytes()


@pytest.mark.parametrize(
    ("plugins", "options", "message"),
    [
        ({"odd": {"how": "raises"}}, {}, r"plugin 'odd' \(sftx-odd 1\.0\): evaluate failed: KeyError: 'raises'"),
        ({"odd": {"how": "lists"}}, {}, r"plugin 'odd' .*: evaluate returned list, expected a mapping"),
        ({"odd": {"how": "nan"}}, {}, r"plugin 'odd' .*: the score 'odd' of the model is nan, expected a finite"),
        ({"retention": {}, "odd": {"how": "clashes"}}, {}, "'odd' .*another value is reported as 'retention' already"),
        ({"odd": {}}, {"metric_for_best_model": "ood"}, "'ood' is not reported; did you mean 'odd'"),
        ({"odd": {}}, {"load_best_model_at_end": True}, "there is no loss; name a score of odd, or give rows"),
        ({"both": {}}, {"metric_for_best_model": "both"}, "'train.metric_for_best_model' needs held-out rows"),
        ({"exact-match": {}}, {"eval_steps": None}, "the metric exact-match needs held-out conversations"),
    ],
)
def test_a_score_that_is_missing_ends_the_run(
    run: Callable[..., Any], plugins: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((PluginError, ConfigError), match=message):
        run("out", plugins, **options)


# --- metrics and rows ---------------------------------------------------------------------------


def scores_of(done: Any, name: str) -> Sequence[float]:
    return [line[name] for line in done.history if line["event"] == "evaluate"]


def test_a_metric_declines_rows_and_may_come_along_without_any(
    run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    held_out: dict[str, Any] = {"eval_data": ROWS[:6], "max_overlap": 1.0, "max_new_tokens": 2}
    assert scores_of(run("some", {"both": {}}, max_steps=1, **held_out), "both") == [(1 + 3 + 5) / 3] * 2
    caplog.clear()
    done = run("none", {"both": {"decline_all": True}}, max_steps=2, **held_out)
    assert "both" not in done.summary["held_out"]["after"]
    assert caplog.text.count("'both' (sftx-odd 1.0): it declined all 6 held-out rows, so it reports nothing") == 1
    caplog.clear()
    run("alone", {"both": {}}, max_steps=1, eval_steps=None)
    assert caplog.text.count("the metric of plugin 'both' (sftx-odd 1.0) is left out: it needs held-out conv") == 1


def test_an_evaluator_sees_the_held_out_rows(run: Callable[..., Any]) -> None:
    import sftx_odd

    sftx_odd.SEEN.clear()
    run("out", {"odd": {}}, max_steps=1, eval_data=ROWS[:2], max_overlap=1.0)
    assert sftx_odd.SEEN == [[("messages", ["user"])] * 2] * 2


NAN = """
import os
from dataclasses import dataclass
from sftx import hookimpl


@dataclass(frozen=True, eq=False)
class Nan:
    @hookimpl
    def sftx_evaluator(self, run):
        return self

    def evaluate(self, evaluation):
        return {"score": float("nan") if evaluation.step == 3 and "NAN_SCORE" in os.environ else 1.0}
"""


def test_a_score_that_ends_a_run_keeps_the_steps_that_are_done(
    tmp_path: Path, install_plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("sftx-nan", NAN, {"nan": "Nan"})
    monkeypatch.chdir(tmp_path)

    def train(output_dir: str) -> Any:
        return sftx.run(
            data=[{"prompt": f"say {n}", "completion": str(n)} for n in range(8)],
            plugins={"chatml": {}, "lora": {}, "nan": {}},
            model="sftx:tiny",
            max_steps=4,
            train_batch_size=2,
            eval_steps=1,
            use_cpu=True,
            output_dir=output_dir,
        )

    monkeypatch.setenv("NAN_SCORE", "1")
    with pytest.raises(PluginError, match="the score 'score' of the model is nan, expected a finite number"):
        train("run")
    assert (tmp_path / "run" / "checkpoints" / "step-3").is_dir()
    monkeypatch.delenv("NAN_SCORE")
    resumed, whole = sftx.resume("run"), train("whole")
    weights = [load_file(run.output_dir / "adapter" / "adapter_model.safetensors") for run in (resumed, whole)]
    assert all(weights[0][name].equal(tensor) for name, tensor in weights[1].items())
