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

from sftx import atomic_files
from sftx.assembly import training_checks
from sftx.config.options import GenerationConfig
from sftx.data.dataset import Examples
from sftx.data.preprocess import Dataset
from sftx.data.row_encoder import Question
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import TrainingError, is_out_of_memory
from sftx.events import EvalReport, Sample
from sftx.model.generate import answers
from sftx.model.language_model import LanguageModel
from sftx.trainer.evidence import choose_row, token_losses
from sftx.trainer.parallel import Engine
from sftx.trainer.precision import Precision
from sftx.trainer.scores import scores
from sftx.types import Collator, Metric

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates one model on one held-out set; logits are never kept. Several processes share the rows.

    `check_stop` is called between batches, by one process alone also between the tokens of answers; it raises when the
    run is to stop.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        collator: Collator,
        engine: Engine,
        metrics: Mapping[str, Metric],
        precision: Precision,
        stop_ids: Sequence[int],
        batch_size: int,
        generation: GenerationConfig,
        process_group: ProcessGroup | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._examples = data.examples
        self._questions = _spread(data.questions, generation.max_rows)
        self._collator = collator
        self._engine = engine
        self._process_group = process_group or ProcessGroup()
        self._loss = engine.step.loss
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
            with torch.no_grad(), self._precision.autocast(), self._process_group.detect_lost_peers():
                with _enough_memory(lm, f"step {step}: to evaluate", "per_device_eval_batch_size", self._batch_size):
                    means = self._losses(lm, self._examples, step)
                with _enough_memory(lm, f"step {step}: to answer", "generation.batch_size", self._answered_at_once):
                    samples = self._samples(lm) if self._metrics else ()
                row = choose_row(self._examples)
                losses = None if row is None else self._engine.step.within(lambda: token_losses(lm, row))
        finally:
            lm.train(training)
        means |= self._process_group.run_on_rank0(lambda: scores(self._metrics, samples, taken=means.keys()))
        return EvalReport(step, means, samples, time.perf_counter() - start, losses)

    def _losses(self, lm: LanguageModel, examples: Examples, step: int) -> dict[str, float]:
        """The loss and what else it counts, over the whole set's denominator."""
        sums: defaultdict[str, float] = defaultdict(float)
        denominator = 0.0
        batches = _batches(examples, self._batch_size)
        rounds = range(
            self._process_group.rank,
            _rounded_up(len(batches), self._process_group.world_size),
            self._process_group.world_size,
        )
        for number in tqdm(rounds, "evaluating", unit=" batches", delay=2, disable=None, leave=False):
            self.check_stop()
            counts = number < len(batches)  # a process that has no batch left computes along
            indices = batches[number if counts else 0]
            batch = training_checks.collate(self._collator, [examples[index] for index in indices.tolist()])
            out = training_checks.loss_sum(self._loss, self._engine.step(batch.to(lm.device)))
            denominator += counts * sum(training_checks.denominators(self._loss, [batch]))
            sums["loss"] += counts * out.sum.item()
            for name, value in out.metrics.items():
                sums[name] += counts * value.item()
        names = self._process_group.all_gather_names(sums)
        *added, total = self._process_group.all_reduce_sum([*(sums[name] for name in names), denominator])
        total = training_checks.total(self._loss, total)
        means = {name: value / total for name, value in zip(names, added, strict=True)}
        loss = means.pop("loss")
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the loss of the held-out rows is {loss:g}; look at the model")
        return {"loss": loss, **training_checks.means(self._loss, means, f"the evaluation after step {step}")}

    def _samples(self, lm: LanguageModel) -> tuple[Sample, ...]:
        log.info("answering %d held-out rows", len(self._questions))
        with self._engine.summon_full_params():
            found = self._answers(lm) if self._process_group.world_size == 1 else self._shared_answers(lm)
        return tuple(_sample(lm, question, found[number]) for number, question in enumerate(self._questions))

    def _answers(self, lm: LanguageModel) -> dict[int, list[int]]:
        """By the number of the question."""
        answered = {}
        # On a terminal only, and only when it takes longer than a moment.
        with tqdm(
            total=len(self._questions), desc="answering", unit=" rows", delay=2, disable=None, leave=False
        ) as bar:
            for number, ids in answers(
                lm,
                [question.prompt_ids for question in self._questions],
                max_new_tokens=self._max_new_tokens,
                stop_ids=self._stop_ids,
                batch_size=self._answered_at_once,
                check_stop=self.check_stop,
            ):
                answered[number] = ids
                bar.update()
        return answered

    def _shared_answers(self, lm: LanguageModel) -> dict[int, list[int]]:
        """The same by several processes: each answers a batch, then they look together whether to stop."""
        order = sorted(range(len(self._questions)), key=lambda number: -len(self._questions[number].prompt_ids))
        batches = [order[at : at + self._answered_at_once] for at in range(0, len(order), self._answered_at_once)]
        answered: dict[int, list[int]] = {}
        for start in range(0, len(batches), self._process_group.world_size):
            self.check_stop()
            for batch in batches[start : start + self._process_group.world_size][self._process_group.rank :][:1]:
                found = lm.generate(
                    [self._questions[number].prompt_ids for number in batch],
                    max_new_tokens=self._max_new_tokens,
                    stop_ids=self._stop_ids,
                    batch_size=self._answered_at_once,
                )
                answered |= zip(batch, found, strict=True)
        return {number: ids for one in self._process_group.all_gather(answered) for number, ids in one.items()}


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


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
    atomic_files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
