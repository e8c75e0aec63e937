"""Evaluate a model on held-out rows: the loss, and answers that metrics score."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftx import atomic_files
from sftx.assembly.stages import RESERVED_METRICS, CollatorStage, MetricStage
from sftx.config.options import GenerationConfig
from sftx.data.collate import pad
from sftx.data.dataset import Dataset, Examples
from sftx.data.row_encoder import Question
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import PluginError, TrainingError, counted, is_out_of_memory
from sftx.events import EvalReport, Sample
from sftx.model.generation import embed_prompts, generate_greedy
from sftx.model.language_model import CausalLM
from sftx.phases import Phase, phase
from sftx.trainer.evidence import choose_row, token_losses
from sftx.trainer.parallel import ParallelStrategy
from sftx.trainer.precision import Precision
from sftx.types import Batch, Example


class Evaluator:
    """Evaluates one model on one held-out dataset. Several ranks share the rows; logits are never kept.

    `check_stop` is called between batches, and by a single process also between the tokens of answers; it raises when
    the run is to stop.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        collator: CollatorStage,
        strategy: ParallelStrategy,
        metrics: Mapping[str, MetricStage],
        precision: Precision,
        stop_ids: Sequence[int],
        batch_size: int,
        generation: GenerationConfig,
        process_group: ProcessGroup | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """`batch_size`: rows evaluated at once."""
        questions = data.questions
        if generation.max_rows is not None and generation.max_rows < len(questions):  # evenly spread
            chosen = range(generation.max_rows)
            questions = [questions[index * len(questions) // generation.max_rows] for index in chosen]
        self._examples, self._questions = data.examples, list(questions)
        self._collator = collator
        self._strategy = strategy
        self._process_group = process_group or ProcessGroup()
        self._metrics = metrics
        self._precision = precision
        self._stop_ids = stop_ids
        self._batch_size = batch_size
        self._generation_batch_size = generation.batch_size or batch_size
        self._max_new_tokens = generation.max_new_tokens
        self.check_stop = check_stop

    def __call__(self, lm: CausalLM, step: int) -> EvalReport:
        """Evaluate the model after `step` steps. Raises TrainingError, PluginError."""
        start = time.perf_counter()
        training = lm.training
        lm.eval()
        try:
            with torch.no_grad(), self._precision.autocast(), self._process_group.detect_lost_peers():
                option = "per_device_eval_batch_size"
                with _explain_out_of_memory(lm, f"step {step}: to evaluate", option, self._batch_size):
                    means = self._losses(lm, step)
                option = "generation.batch_size"
                with _explain_out_of_memory(lm, f"step {step}: to answer", option, self._generation_batch_size):
                    samples = self._samples(lm) if self._metrics else ()
                row = choose_row(self._examples, cut=not lm.embeds_extras)
                collate = self._collator.collate if lm.embeds_extras else pad
                with phase("evaluating", "the tokens of one row"):
                    losses = (
                        None
                        if row is None
                        else self._strategy.step.call_in_forward(lambda: token_losses(lm, row, collate))
                    )
        finally:
            lm.train(training)
        with phase("evaluating", "answers"):
            means |= self._process_group.run_on_rank0(lambda: score(self._metrics, samples, reported=means))
        return EvalReport(step, means, samples, time.perf_counter() - start, losses)

    def _losses(self, lm: CausalLM, step: int) -> dict[str, float]:
        """Return the loss and the loss's metrics over the denominator of the whole dataset."""
        sums: defaultdict[str, float] = defaultdict(float)
        denominator = 0.0
        loss = self._strategy.step.loss
        batches = _batches(self._examples, self._batch_size)
        world_size = self._process_group.world_size
        numbers = range(self._process_group.rank, math.ceil(len(batches) / world_size) * world_size, world_size)

        def collated() -> Iterator[tuple[Batch, bool]]:
            for number in numbers:
                self.check_stop()
                is_counted = number < len(batches)  # a rank that has no batch left takes part in the collectives
                indices = batches[number if is_counted else 0].tolist()
                yield self._collator.collate([self._examples[index] for index in indices]), is_counted

        with phase("evaluating", "held-out rows", total=len(numbers), unit="batches") as progress:
            statistics = self._strategy.statistics(collated())
            for batch, is_counted in progress.counted(collated()):
                out = self._strategy.step(dataclasses.replace(batch, statistics=statistics).to(lm.device))
                denominator += is_counted * loss.denominator(batch)
                sums["loss"] += is_counted * out.sum.item()
                for name, value in loss.metric_sums(out):
                    sums[name] += is_counted * value.item()
        names = self._process_group.all_gather_names(sums)
        total, *summed = self._process_group.all_reduce_sum([denominator, *(sums[name] for name in names)])
        means = loss.metric_means(dict(zip(names, summed, strict=True)), loss.check_total(total))
        mean_loss = means.pop("loss")
        if not math.isfinite(mean_loss):
            raise TrainingError(f"step {step}: the loss of the held-out rows is {mean_loss:g}; look at the model")
        return {"loss": mean_loss, **loss.report_means(means, f"the evaluation after step {step}")}

    def _samples(self, lm: CausalLM) -> tuple[Sample, ...]:
        """Generate an answer to every question."""
        answering = phase("answering", "held-out rows", total=len(self._questions), unit="rows")
        with answering as progress, self._strategy.summon_full_params():
            if self._process_group.world_size == 1:
                answered = self._answer(lm, progress)
            else:
                answered = self._answer_on_all_ranks(lm, progress)
        return tuple(
            Sample(
                row_id=question.row_id,
                prompt=question.prompt,
                reference=question.reference,
                prediction=str(lm.tokenizer.decode(answered[number], skip_special_tokens=True)),
                full_prompt=str(lm.tokenizer.decode(question.prompt_ids, skip_special_tokens=False)),
            )
            for number, question in enumerate(self._questions)
        )

    def _generate(
        self, lm: CausalLM, questions: Sequence[Question], check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield the index of a question and the token ids of its answer."""

        def embed(indices: Sequence[int]) -> list[Tensor]:
            prompts = [_prompt_example(questions[index], number) for number, index in enumerate(indices)]
            return embed_prompts(lm, self._collator.collate, prompts)

        return generate_greedy(
            lm,
            [question.prompt_ids for question in questions],
            max_new_tokens=self._max_new_tokens,
            stop_ids=self._stop_ids,
            batch_size=self._generation_batch_size,
            check_stop=check_stop,
            embed=embed if lm.embeds_extras else None,
        )

    def _answer(self, lm: CausalLM, progress: Phase) -> dict[int, list[int]]:
        """Return the token ids of the answers by the number of the question."""
        answered = {}
        for number, ids in self._generate(lm, self._questions, self.check_stop):
            answered[number] = ids
            progress.update()
        return answered

    def _answer_on_all_ranks(self, lm: CausalLM, progress: Phase) -> dict[int, list[int]]:
        """Divide the questions among ranks: each answers a batch, then all check together whether to stop."""
        size = self._generation_batch_size
        order = sorted(range(len(self._questions)), key=lambda number: -len(self._questions[number].prompt_ids))
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        answered: dict[int, list[int]] = {}
        for start in range(0, len(batches), self._process_group.world_size):
            self.check_stop()
            together = batches[start : start + self._process_group.world_size]
            for batch in together[self._process_group.rank :][:1]:
                for index, ids in self._generate(lm, [self._questions[number] for number in batch]):
                    answered[batch[index]] = ids
            progress.update(sum(map(len, together)))
        gathered = self._process_group.all_gather(answered)
        return {number: ids for one in gathered for number, ids in one.items()}


def _prompt_example(question: Question, group: int) -> Example:
    """Return a question as an example for a collator, with a group of its own; nothing of it is trained."""
    token_ids = np.asarray(question.prompt_ids, np.int32)
    return Example(token_ids, np.zeros(len(token_ids), np.bool_), question.row_id, group, extras=question.extras)


def _batches(examples: Examples, batch_size: int) -> list[NDArray[np.int64]]:
    """Return batches of indices of examples of similar length; a group is never split and counts as one row."""
    groups = examples.groups
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    longest = np.maximum.reduceat(examples.lengths, first) if len(first) else first
    order = np.lexsort((group, longest[group]))
    begins = np.flatnonzero(np.diff(groups[order], prepend=-1))
    return np.split(order, begins[batch_size::batch_size])


def score(
    metrics: Mapping[str, MetricStage], samples: Sequence[Sample], reported: Mapping[str, float]
) -> dict[str, float]:
    """Score all answers with every metric. Raises PluginError for a name that is reported already."""
    scores: dict[str, float] = {}
    for plugin, metric in metrics.items():
        of_metric = metric.scores(
            [sample.prediction for sample in samples],
            [sample.reference for sample in samples],
            [sample.row_id for sample in samples],
        )
        for name, value in of_metric.items():
            if name in reported or name in scores or name in RESERVED_METRICS:
                advice = "rename the plugin" if name == plugin else "rename one of them"
                raise PluginError(f"{metric}: another value is reported as {name!r} already; {advice}")
            scores[name] = value
    return scores


@contextlib.contextmanager
def _explain_out_of_memory(lm: CausalLM, what: str, option: str, num_rows: int) -> Iterator[None]:
    """Turn an out-of-memory error into a TrainingError that says what to lower, and by how much."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fewer = f"lower {option} to {num_rows // 2} (now {num_rows})" if num_rows > 1 else "lower data.max_length"
        raise TrainingError(
            f"{what} {counted(num_rows, 'row')} at once, {lm.device} has not enough memory; {fewer}"
        ) from error


def write_predictions(path: Path, samples: Sequence[Sample]) -> None:
    """Write one JSON object a row atomically, in LLaMA-Factory's form: `prompt` (all of it), `predict`, `label`.

    Raises OutputError; the old file is kept then.
    """
    rows = [{"prompt": one.full_prompt, "predict": one.prediction, "label": one.reference} for one in samples]
    atomic_files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
