"""Multiple choice: the share of questions for which the model finds the right answer the most likely one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from sftx import ConfigError, Conversation, Evaluation, Evaluator, Message, RunInfo, hookimpl


class Question(NamedTuple):
    """A question with its possible answers."""

    text: str
    choices: list[str]
    right: int
    """Index of the right answer."""
    is_beginning: bool = False
    """Whether `text` is a beginning that the choices go on with, as in HellaSwag, and no question."""


@dataclass(frozen=True, eq=False)
class MultipleChoice:
    """Scores answers by likelihood, without generating: `acc` and `acc_norm` as lm-evaluation-harness defines them.

    `acc` is the share of questions whose right answer has the highest sum of log-probabilities; for `acc_norm` each
    sum is divided by the answer's number of characters (`ConfigurableTask.process_results` in lm_eval/api/task.py of
    https://github.com/EleutherAI/lm-evaluation-harness). A row is a JSON object in one of the forms of

    - MMLU: `question`, `choices` (a list), `answer` (index, letter or text of the right one)
    - ARC: `question`, `choices` (`{"text": [...], "label": [...]}`), `answerKey` (a label)
    - HellaSwag: `ctx`, `endings`, `label` (index)
    """

    path: Annotated[str, Field(min_length=1, description="File of the questions: JSON Lines.")]
    prompt: Annotated[
        str,
        Field(min_length=1, description="Text before the answer, with {question}; a beginning (`ctx`) stands alone."),
    ] = "Question: {question}\nAnswer:"
    template: Annotated[
        bool, Field(description="Ask with the run's template, the question as the user's turn, instead of `prompt`.")
    ] = False
    limit: Annotated[
        int | None, Field(ge=1, le=10**9, description="Only the first questions of the file; by default all.")
    ] = None

    @hookimpl
    def sftx_validate(self, run: RunInfo) -> None:
        if "{question}" not in self.prompt:
            raise ConfigError(
                f"option 'prompt': {self.prompt!r} has no {{question}}, so every question would be the same"
            )
        self._questions()

    @hookimpl
    def sftx_evaluator(self) -> Evaluator:
        return _Scorer(self, self._questions())

    def _questions(self) -> list[Question]:
        return list(read_questions(Path(self.path), self.limit))


@dataclass
class _Scorer:
    options: MultipleChoice
    questions: list[Question]

    def evaluate(self, evaluation: Evaluation) -> Mapping[str, float]:
        pairs = [self._pair(evaluation, question, choice) for question in self.questions for choice in question.choices]
        sums = iter([total for total, _ in evaluation.log_likelihoods(pairs)])
        right = right_by_length = 0
        for question in self.questions:
            likelihoods = [next(sums) for _ in question.choices]
            by_length = [total / len(choice) for total, choice in zip(likelihoods, question.choices, strict=True)]
            right += _best(likelihoods) == question.right
            right_by_length += _best(by_length) == question.right
        count = len(self.questions)
        return {"acc": right / count, "acc_norm": right_by_length / count}

    def _pair(self, evaluation: Evaluation, question: Question, choice: str) -> tuple[list[int], list[int]]:
        if self.options.template:
            return evaluation.encode(Conversation((Message("user", question.text),)), choice)
        prompt = question.text if question.is_beginning else self.options.prompt.replace("{question}", question.text)
        return evaluation.encode(prompt, f" {choice}")


def _best(values: Sequence[float]) -> int:
    """Return the index of the greatest value, the first of several equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def read_questions(path: Path, limit: int | None = None) -> Iterator[Question]:
    """Read a file of questions. Raises ConfigError, naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"option 'path': {path} cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]
    if not numbered:
        raise ConfigError(f"option 'path': {path} has no question")
    for number, line in numbered:
        try:
            yield _question(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"option 'path': {path}:{number}: {reason}; a row has question, choices and answer (MMLU), or "
                "question, choices and answerKey (ARC), or ctx, endings and label (HellaSwag)"
            ) from error


def _question(row: Any) -> Question:
    if not isinstance(row, dict):
        raise TypeError(f"a {type(row).__name__}, expected an object")
    is_beginning = "endings" in row
    text, choices = (row["ctx"], row["endings"]) if is_beginning else (row["question"], row["choices"])
    labels: list[Any] = []
    if isinstance(choices, dict):
        choices, labels = choices["text"], choices["label"]
    if not isinstance(text, str) or not isinstance(choices, list) or len(choices) < 2:
        raise TypeError("the question is no text, or there are fewer than two choices")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise TypeError(f"a choice is no text, or is empty: {choices!r:.80}")
    answer = row["label"] if is_beginning else row["answerKey"] if "answerKey" in row else row["answer"]
    return Question(text, choices, _index(answer, choices, labels), is_beginning)


def _index(answer: Any, choices: list[str], labels: list[Any]) -> int:
    """Return the index of the right choice, which is given as a label, a text, an index or a letter."""
    for names in (labels, choices, [*range(len(choices))], [str(n) for n in range(len(choices))], "ABCDEFGHIJ"):
        if not isinstance(answer, bool) and answer in list(names):
            index = list(names).index(answer)
            if index < len(choices):
                return index
    raise ValueError(f"the answer {answer!r:.60} is none of the choices")
