"""Multiple choice against a plain computation with transformers, and the shapes of rows that it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sftx import ConfigError, Conversation, Message, RunInfo
from sftx.distributed.process_group import ProcessGroup
from sftx.testing.kit import Kit, built_in
from sftx.trainer.evaluation import ModelEvaluation
from sftx_plugins.evaluators.multiple_choice import read_questions

QUESTIONS = Path(__file__).parents[1] / "helpers" / "questions.jsonl"


class Kits:
    kit = Kit(object())
    lm = kit.language_model().eval()


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return path


def many(path: Path) -> Path:
    """Questions whose choices have very different lengths, so that acc and acc_norm differ."""
    words = ["sun", "moon", "a river", "two and two", "the largest planet of all", "no"]
    return written(
        path,
        *(
            {
                "question": f"What is {n} of {words[n % 6]}?",
                "choices": words[n % 3 : n % 3 + 4],
                "answer": n * n % 7 % 4,
            }
            for n in range(40)
        ),
    )


def log_likelihood(prompt: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits_TV = Kits.lm.model(input_ids=torch.tensor([prompt + continuation])).logits[0].double()
    log_probs_TV = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(log_probs_TV.gather(1, torch.tensor(continuation)[:, None]).sum())


def scores(**options: Any) -> dict[str, float]:
    encoder = Kits.kit.encoder
    evaluation = ModelEvaluation(
        lm=Kits.lm,
        step=0,
        rows=[],
        examples=[],
        encoder=encoder,
        stop_ids=encoder.stop_ids,
        batch_size=8,
        generation_batch_size=8,
        max_new_tokens=4,
        process_group=ProcessGroup(),
    )
    plugin: Any = built_in("multiple-choice", **options)
    return dict(plugin.sftx_evaluator().evaluate(evaluation))


@pytest.mark.parametrize("template", [False, True])
def test_scores_are_those_of_a_plain_computation_by_transformers(tmp_path: Path, template: bool) -> None:
    path, encoder, tokenizer = many(tmp_path / "many.jsonl"), Kits.kit.encoder, Kits.kit.tokenizer
    right = right_by_length = 0
    for line in path.read_text(encoding="utf-8").split("\n\n")[:-1]:
        row = json.loads(line)
        if template:
            prompt = encoder.prompt(Conversation((Message("user", row["question"]),)))
            continuations = [tokenizer.encode(choice, add_special_tokens=False) for choice in row["choices"]]
        else:
            prompt = tokenizer.encode(f"Question: {row['question']}\nAnswer:", add_special_tokens=False)
            continuations = [tokenizer.encode(f" {choice}", add_special_tokens=False) for choice in row["choices"]]
        sums = torch.tensor([log_likelihood(prompt, continuation) for continuation in continuations])
        right += int(sums.argmax()) == row["answer"]
        lengths = torch.tensor([len(choice) for choice in row["choices"]])
        right_by_length += int((sums / lengths).argmax()) == row["answer"]
    expected = {"acc": right / 40, "acc_norm": right_by_length / 40}
    assert scores(path=str(path), template=template) == expected
    assert 0 < expected["acc"] != expected["acc_norm"]


def test_the_forms_of_rows(tmp_path: Path) -> None:
    found = [(question.text, question.right, question.is_beginning) for question in read_questions(QUESTIONS)]
    assert found == [
        ("What is 2 + 3?", 1, False),
        ("What is the capital of France?", 0, False),
        ("The sun rises in the", 0, True),
        ("What is the largest planet?", 1, False),
    ]
    path = written(
        tmp_path / "more.jsonl",
        {"question": "By text", "choices": ["no", "yes"], "answer": "yes"},
        {"question": "By text before letter", "choices": ["B", "A"], "answer": "A"},
        {"question": "By number in text", "choices": ["x", "y", "z"], "answer": "2"},
        {"question": "By label", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
    )
    assert [question.right for question in read_questions(path)] == [1, 1, 2, 0]
    assert len(list(read_questions(path, 3))) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "?", "choices": ["a", "b"]},
            r"wrong\.jsonl:3: the field .answer. is missing; a row has",
        ),
        ({"question": "?", "choices": ["a"], "answer": 0}, "fewer than two choices"),
        ({"question": "?", "choices": ["a", ""], "answer": 0}, r"a choice is no text, or is empty: \['a', ''\]"),
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, "the answer 2 is none of the choices"),
        ({"question": "?", "choices": ["a", "b"], "answer": True}, "the answer True is none of the choices"),
        ({"question": "?", "choices": ["a", "b"], "answer": [0]}, r"the answer \[0\] is none of the choices"),
        (["a"], "a list, expected an object"),
    ],
)
def test_a_wrong_row_is_named_before_torch_is_imported(tmp_path: Path, row: Any, message: str) -> None:
    good = {"question": "?", "choices": ["a", "b"], "answer": 0}
    plugin: Any = built_in("multiple-choice", path=str(written(tmp_path / "wrong.jsonl", good, row)))
    with pytest.raises(ConfigError, match=message):
        plugin.sftx_validate(RunInfo(tmp_path, {}))


def test_what_gives_no_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for options, message in (
        ({"path": str(tmp_path / "nowhere.jsonl")}, r"nowhere\.jsonl cannot be read"),
        ({"path": str(tmp_path / "empty.jsonl")}, r"empty\.jsonl has no question"),
        ({"path": str(QUESTIONS), "prompt": "Answer:"}, "has no {question}"),
    ):
        plugin: Any = built_in("multiple-choice", **options)
        with pytest.raises(ConfigError, match=message):
            plugin.sftx_validate(RunInfo(tmp_path, {}))
