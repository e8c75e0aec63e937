"""Held-out rows become a loss, and answers that metrics score."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from sftx import whole_files
from sftx.config import GenerationConfig
from sftx.data.examples import Examples
from sftx.data.prepare import Dataset
from sftx.data.rows import Question
from sftx.errors import TrainingError
from sftx.model.generate import answers
from sftx.model.language_model import LanguageModel
from sftx.model.memory import is_out_of_memory
from sftx.reports import EvalReport, Sample
from sftx.training import checked
from sftx.training.precision import Precision
from sftx.training.scores import scores
from sftx.types import Collator, Loss, Metric

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates one model on one held-out set; logits are never kept.

    `check_stop` is called between batches, and between the tokens of answers; it raises when the run is to stop.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        collator: Collator,
        loss: Loss,
        metrics: Mapping[str, Metric],
        precision: Precision,
        stop_ids: Sequence[int],
        batch_size: int,
        generation: GenerationConfig,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._examples = data.examples
        self._questions = _spread(data.questions, generation.max_rows)
        self._collator = collator
        self._loss = loss
        self._metrics = metrics
        self._precision = precision
        self._stop_ids = stop_ids
        self._batch_size = batch_size
        self._answered_at_once = generation.batch_size or batch_size
        self._max_new_tokens = generation.max_new_tokens
        self.check_stop = check_stop

    def __call__(self, lm: LanguageModel, step: int) -> EvalReport:
        start = time.perf_counter()
        training = lm.training
        lm.eval()
        try:
            with torch.no_grad(), self._precision.autocast():
                with _enough_memory(lm, f"step {step}: to evaluate", "per_device_eval_batch_size", self._batch_size):
                    means = self._losses(lm, self._examples, step)
                with _enough_memory(lm, f"step {step}: to answer", "generation.batch_size", self._answered_at_once):
                    samples = self._answers(lm, self._questions) if self._metrics else ()
        finally:
            lm.train(training)
        means |= scores(self._metrics, samples, taken=means.keys())
        return EvalReport(step, means, samples, time.perf_counter() - start)

    def _losses(self, lm: LanguageModel, examples: Examples, step: int) -> dict[str, float]:
        """The loss and what else it counts, over the whole set's denominator."""
        sums: defaultdict[str, float] = defaultdict(float)
        total = 0.0
        batches = _batches(examples, self._batch_size)
        for indices in tqdm(batches, "evaluating", unit=" batches", delay=2, disable=None, leave=False):
            self.check_stop()
            batch = checked.collate(self._collator, [examples[index] for index in indices.tolist()])
            total += sum(checked.denominators(self._loss, [batch]))
            out = checked.loss_sum(self._loss, self._loss(lm, batch.to(lm.device)))
            sums["loss"] += out.sum.item()
            for name, value in out.metrics.items():
                sums[name] += value.item()
        means = {name: value / total for name, value in sums.items()}
        loss = means.pop("loss")
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the loss of the held-out rows is {loss:g}; look at the model")
        return {"loss": loss, **checked.means(self._loss, means, f"the evaluation after step {step}")}

    def _answers(self, lm: LanguageModel, questions: Sequence[Question]) -> tuple[Sample, ...]:
        log.info("answering %d held-out rows", len(questions))
        answered: dict[int, list[int]] = {}
        # On a terminal only, and only when it takes longer than a moment.
        with tqdm(total=len(questions), desc="answering", unit=" rows", delay=2, disable=None, leave=False) as bar:
            for number, ids in answers(
                lm,
                [question.prompt_ids for question in questions],
                max_new_tokens=self._max_new_tokens,
                stop_ids=self._stop_ids,
                batch_size=self._answered_at_once,
                check_stop=self.check_stop,
            ):
                answered[number] = ids
                bar.update()
        return tuple(_sample(lm, question, answered[number]) for number, question in enumerate(questions))


@contextlib.contextmanager
def _enough_memory(lm: LanguageModel, what: str, option: str, num_rows: int) -> Iterator[None]:
    """Says what to lower, and by how much, when there is not."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fewer = f"lower {option} to {num_rows // 2} (now {num_rows})" if num_rows > 1 else "lower data.max_length"
        rows = "1 row" if num_rows == 1 else f"{num_rows} rows"
        raise TrainingError(f"{what} {rows} at once, {lm.device} has not the memory; {fewer}") from error


def _sample(lm: LanguageModel, question: Question, answer: list[int]) -> Sample:
    return Sample(
        row_id=question.row_id,
        prompt=question.prompt,
        reference=question.reference,
        prediction=str(lm.tokenizer.decode(answer, skip_special_tokens=True)),
        full_prompt=str(lm.tokenizer.decode(question.prompt_ids, skip_special_tokens=False)),
    )


def write_predictions(path: Path, samples: Sequence[Sample]) -> None:
    """One JSON object a row, in LLaMA-Factory's form: `prompt` with its control tokens, `predict` and `label` without.

    Whole, or what was there before. Raises OutputError.
    """
    rows = [{"prompt": one.full_prompt, "predict": one.prediction, "label": one.reference} for one in samples]
    whole_files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _spread(questions: Sequence[Question], most: int | None) -> list[Question]:
    """At most that many, at equal distances."""
    if most is None or most >= len(questions):
        return list(questions)
    return [questions[index * len(questions) // most] for index in range(most)]


def _batches(examples: Examples, batch_size: int) -> list[NDArray[np.int64]]:
    """The indices of examples of similar length; those of one group are never parted, and count as one row."""
    groups = examples.groups
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    longest = np.maximum.reduceat(examples.lengths, first) if len(first) else first
    order = np.lexsort((group, longest[group]))
    begins = np.flatnonzero(np.diff(groups[order], prepend=-1))
    return np.split(order, begins[batch_size::batch_size])
