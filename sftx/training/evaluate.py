"""Held-out rows become a loss, and answers that metrics score."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from sftx.config import GenerationConfig
from sftx.data.batch import groups_of
from sftx.data.prepare import Dataset
from sftx.data.rows import Question
from sftx.errors import PluginError, TrainingError
from sftx.model.language_model import LanguageModel
from sftx.reports import EvalReport, Sample
from sftx.training import checked
from sftx.training.precision import Precision
from sftx.types import Collator, Example, Loss, Metric

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates one model on one held-out set; logits are never kept."""

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
    ) -> None:
        self._examples = data.examples
        self._questions = _spread(data.questions, generation.max_rows)
        self._collator = collator
        self._loss = loss
        self._metrics = metrics
        self._precision = precision
        self._stop_ids = stop_ids
        self._batch_size = batch_size
        self._max_new_tokens = generation.max_new_tokens

    def __call__(self, lm: LanguageModel, step: int) -> EvalReport:
        start = time.perf_counter()
        training = lm.training
        lm.eval()
        try:
            with torch.no_grad(), self._precision.autocast():
                means = self._losses(lm, self._examples, step)
                samples = self._answers(lm, self._questions) if self._metrics else ()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise TrainingError(
                f"step {step}: {lm.device} has not the memory to evaluate {self._batch_size} rows at once; lower "
                "per_device_eval_batch_size or generation.max_new_tokens"
            ) from error
        lm.train(training)
        for name, metric in self._metrics.items():
            if name in means or name in checked.OURS:
                raise PluginError(f"{metric}: something else is reported as {name!r} already; rename the plugin")
            means[name] = sum(_score(metric, sample) for sample in samples) / len(samples)
        return EvalReport(step, means, samples, time.perf_counter() - start)

    def _losses(self, lm: LanguageModel, examples: Sequence[Example], step: int) -> dict[str, float]:
        """The loss and what else it counts, over the whole set's denominator."""
        sums: defaultdict[str, float] = defaultdict(float)
        total = 0.0
        for chosen in _batches(examples, self._batch_size):
            batch = checked.collate(self._collator, chosen)
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
        answers = lm.generate(
            [question.prompt_ids for question in questions],
            max_new_tokens=self._max_new_tokens,
            stop_ids=self._stop_ids,
            batch_size=self._batch_size,
        )
        return tuple(
            Sample(q.row_id, q.prompt, q.reference, str(lm.tokenizer.decode(ids, skip_special_tokens=True)))
            for q, ids in zip(questions, answers, strict=True)
        )


def _score(metric: Metric, sample: Sample) -> float:
    score = metric(sample.prediction, sample.reference)
    try:
        value = float(score)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise PluginError(f"{metric}: the score of {sample.row_id} is {value}, expected a finite number")
    return value


def _spread(questions: Sequence[Question], most: int | None) -> list[Question]:
    """At most that many, at equal distances."""
    if most is None or most >= len(questions):
        return list(questions)
    return [questions[index * len(questions) // most] for index in range(most)]


def _batches(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Examples of similar length together; those of one group are never parted."""
    rows = sorted(groups_of(examples), key=lambda row: max(len(example.token_ids) for example in row))
    return [
        [example for row in rows[at : at + batch_size] for example in row] for at in range(0, len(rows), batch_size)
    ]
