"""The plugin lm-eval against the harness's own model class, on the same saved model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sftx.distributed.process_group import ProcessGroup
from sftx.testing import check_evaluator
from sftx.testing.kit import Kit, built_in
from sftx.testing.runs import run_tiny
from sftx.trainer.evaluation import ModelEvaluation

QUESTIONS = [
    ("What is 2 + 3?", ["4", "5", "six or seven"], 1),
    ("What is the capital of France?", ["Paris", "Rome"], 0),
    ("Which is the largest planet of the sun? " * 3, ["the moon", "Jupiter", "Mars", "a star"], 1),
    ("Say yes", ["no", "yes"], 1),
    ("北京是中国的首都吗？", ["是的", "不"], 0),
]
CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""


def test_a_missing_library_is_one_line_before_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx import ConfigError

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"plugin 'lm-eval' .*needs the library lm_eval; install it with pip"):
        run_tiny(["lora", "lm-eval"], tmp_path, settings={"lm-eval.tasks": ["arc_easy"]})


@pytest.fixture(scope="module")
def harness() -> Any:
    """The library, which `make setup` installs."""
    return pytest.importorskip("lm_eval.evaluator")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    data = tmp_path / "data.jsonl"
    rows = [{"question": question, "choices": choices, "answer": right} for question, choices, right in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory = tmp_path / "tasks"
    directory.mkdir()
    (directory / "colours.yaml").write_text(CHOICE.format(data=data))
    (directory / "rolling.yaml").write_text(ROLLING.format(data=data))
    return directory


def by_hflm(harness: Any, model: Path, tasks: Path, names: list[str], num_fewshot: int | None) -> dict[str, float]:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    results = harness.simple_evaluate(
        HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=2),
        tasks=names,
        num_fewshot=num_fewshot,
        task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
    )["results"]
    return {
        f"{task}/{key.partition(',')[0]}": value
        for task, values in results.items()
        for key, value in values.items()
        if key.endswith(",none") and "stderr" not in key
    }


@pytest.mark.slow
@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_scores_are_those_of_the_harness_s_own_model(
    harness: Any, tasks: Path, tmp_path: Path, num_fewshot: int | None
) -> None:
    names = ["colours", "rolling"]
    settings = {"lm-eval.tasks": names, "lm-eval.include_path": str(tasks), "train.learning_rate": 1e-2}
    if num_fewshot is not None:
        settings["lm-eval.num_fewshot"] = num_fewshot
    result = run_tiny(["masked-ce", "lm-eval"], tmp_path / "run", settings=settings)
    after = {name: value for name, value in result.summary["held_out"]["after"].items() if "/" in name}
    expected = by_hflm(harness, result.output_dir / "model", tasks, names, num_fewshot)
    assert after.keys() == expected.keys() >= {"colours/acc", "colours/acc_norm", "rolling/word_perplexity"}
    assert after == pytest.approx(expected, rel=1e-5)
    before = {name: value for name, value in result.summary["held_out"]["before"].items() if "/" in name}
    assert before != pytest.approx(expected, rel=1e-3), "or training would not be seen"


@pytest.mark.slow
def test_answers_and_long_texts_are_those_of_the_harness_s_own_model(harness: Any, tiny_model_dir: Path) -> None:
    """A context that is longer than the model is cut as the harness cuts it; a rolling one is scored in windows."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from sftx_plugins.evaluators._lm_eval_model import RunModel

    kit = Kit(object(), tiny_model_dir)
    lm = kit.language_model().eval()
    evaluation = ModelEvaluation(
        lm=lm,
        step=0,
        rows=[],
        examples=[],
        encoder=kit.encoder,
        stop_ids=kit.encoder.stop_ids,
        batch_size=2,
        generation_batch_size=2,
        max_new_tokens=4,
        process_group=ProcessGroup(),
    )
    ours, theirs = RunModel(evaluation), HFLM(pretrained=str(tiny_model_dir), device="cpu", dtype="float32")
    assert ours._max_length == theirs.max_length
    for model in (ours, theirs):
        model._max_length = 40

    def requests(kind: str, *given: tuple[Any, ...]) -> list[Any]:
        return [Instance(kind, {}, arguments, index) for index, arguments in enumerate(given)]

    texts = [question for question, *_ in QUESTIONS]
    whole = {"until": [], "max_gen_toks": 12}
    answers = ours.generate_until(requests("generate_until", *((text, whole) for text in texts)))
    cut = {"until": [answers[0][3:5], "<|im_end|>"], "max_gen_toks": 12}
    for settings in (whole, cut):
        asked = requests("generate_until", *((text, dict(settings)) for text in texts))
        again = requests("generate_until", *((text, dict(settings)) for text in texts))
        assert ours.generate_until(asked) == theirs.generate_until(again, disable_tqdm=True)
    pairs = requests("loglikelihood", ("", "Paris"), *((text, " yes") for text in texts), ("a b c " * 30, "ends here"))
    for one, two in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True), strict=True):
        assert one == (pytest.approx(two[0], rel=1e-5), two[1])
    rolled = requests("loglikelihood_rolling", *((text,) for text in texts), ("one two three " * 40,))
    assert ours.loglikelihood_rolling(rolled) == pytest.approx(theirs.loglikelihood_rolling(rolled), rel=1e-5)


@pytest.mark.slow
def test_it_keeps_the_contract_and_names_a_task_that_does_not_exist(harness: Any, tasks: Path) -> None:
    from sftx.testing import ContractError

    check_evaluator(built_in("lm-eval", tasks=["colours"], include_path=str(tasks)))
    with pytest.raises(ContractError, match="the tasks nothing cannot be loaded"):
        check_evaluator(built_in("lm-eval", tasks=["nothing"], include_path=str(tasks)))
