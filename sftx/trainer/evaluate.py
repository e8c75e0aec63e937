"""Evaluate a model: its loss on held-out rows, answers that metrics score, and what evaluator plugins ask of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftx import atomic_files
from sftx.assembly.stages.data_stages import CollatorStage
from sftx.assembly.stages.evaluation_stages import EvaluatorStage, MetricStage
from sftx.assembly.stages.loss_stage import RESERVED_METRICS
from sftx.config.options import GenerationConfig
from sftx.data.collate import pad
from sftx.data.dataset import Dataset, Examples
from sftx.data.encoder import Encoder
from sftx.data.example_values import Values
from sftx.data.row_encoder import prompt_example
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import PluginError, TrainingError
from sftx.events import EvalReport, Sample
from sftx.model.generation import embed_prompts
from sftx.model.language_model import CausalLM
from sftx.phases import phase
from sftx.trainer.evaluation import ModelEvaluation, explain_out_of_memory
from sftx.trainer.evidence import choose_row, token_losses
from sftx.trainer.parallel import ParallelStrategy
from sftx.trainer.precision import Precision
from sftx.types import Batch, Question


class ModelEvaluator:
    """Evaluates one model: its loss on the held-out rows, answers that metrics score, and evaluator plugins.

    Several ranks share the rows; logits are never kept. `check_stop` is called between batches, and by a single process
    also between the tokens of answers; it raises when the run is to stop.
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
        evaluators: Mapping[str, EvaluatorStage] | None = None,
        encoder: Encoder | None = None,
        process_group: ProcessGroup | None = None,
        check_stop: Callable[[], None] = lambda: None,
        has_loss: bool = True,
    ) -> None:
        """`batch_size`: rows evaluated at once. `encoder`: of the run, which evaluators need.

        `has_loss`: whether the loss says something of held-out rows; one of a rollout needs its examples.
        """
        questions = data.questions
        if generation.max_rows is not None and generation.max_rows < len(questions):  # evenly spread
            chosen = range(generation.max_rows)
            questions = [questions[index * len(questions) // generation.max_rows] for index in chosen]
        self._data, self._examples, self._questions = data, data.examples, list(questions)
        self._collator = collator
        self._strategy = strategy
        self._process_group = process_group or ProcessGroup()
        self._metrics = metrics
        self._evaluators = evaluators or {}
        self._encoder = encoder
        self._precision = precision
        self._stop_ids = stop_ids
        self._batch_size = batch_size
        self._generation = generation
        self._has_loss = has_loss
        self.check_stop = check_stop
        self.precomputed: Values | None = None
        """What the loss computed of the held-out rows before training."""

    @property
    def has_work(self) -> bool:
        """Return whether there is anything to evaluate: held-out rows, or evaluators."""
        return bool((self._has_loss and len(self._examples)) or self._metrics or self._evaluators)

    def __call__(self, lm: CausalLM, step: int) -> EvalReport:
        """Evaluate the model after `step` steps. Raises TrainingError, PluginError."""
        start = time.perf_counter()
        evaluation = ModelEvaluation(
            lm=lm,
            step=step,
            rows=self._data.questions,
            examples=self._examples,
            encoder=self._encoder,
            stop_ids=self._stop_ids,
            batch_size=self._batch_size,
            generation_batch_size=self._generation.batch_size or self._batch_size,
            max_new_tokens=self._generation.max_new_tokens,
            process_group=self._process_group,
            check_stop=self.check_stop,
        )
        scores: dict[str, float] = {}
        samples: tuple[Sample, ...] = ()
        losses = None
        training = lm.training
        lm.eval()
        try:
            with torch.no_grad(), self._precision.autocast(), self._process_group.detect_lost_peers():
                if self._has_loss and len(self._examples):
                    option = "per_device_eval_batch_size"
                    with explain_out_of_memory(lm, f"step {step}: to evaluate", option, self._batch_size):
                        scores = self._losses(lm, step)
                if self._metrics or self._evaluators:
                    with self._strategy.summon_full_params():
                        if self._metrics:
                            samples = self._samples(evaluation)
                            scores |= self._score(samples, reported=scores)
                        scores |= self._evaluate(evaluation, reported=scores)
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
        return EvalReport(step, scores, samples, time.perf_counter() - start, losses)

    def _losses(self, lm: CausalLM, step: int) -> dict[str, float]:
        """Return the loss and the loss's metrics over the denominator of the whole dataset."""
        sums: defaultdict[str, float] = defaultdict(float)
        denominator = 0.0
        loss = self._strategy.step.loss
        batches = batches_by_length(self._examples, self._batch_size)
        world_size = self._process_group.world_size
        numbers = range(self._process_group.rank, math.ceil(len(batches) / world_size) * world_size, world_size)

        def collated() -> Iterator[tuple[Batch, bool]]:
            for number in numbers:
                self.check_stop()
                is_counted = number < len(batches)  # a rank that has no batch left takes part in the collectives
                indices = batches[number if is_counted else 0].tolist()
                examples = [self._examples[index] for index in indices]
                batch = self._collator.collate(examples)
                if self.precomputed is not None:
                    batch = self.precomputed.add_to(batch, indices, examples)
                yield loss.with_extras(batch) if loss.has_extras else batch, is_counted

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

    def _samples(self, evaluation: ModelEvaluation) -> tuple[Sample, ...]:
        """Generate an answer to every question."""
        lm, tokenizer = evaluation.lm, evaluation.lm.tokenizer

        def embed(numbers: Sequence[int]) -> list[Tensor]:
            prompts = [prompt_example(self._questions[number], group) for group, number in enumerate(numbers)]
            return embed_prompts(lm, self._collator.collate, prompts)

        answers = evaluation.answer(
            [question.prompt_ids for question in self._questions], embed=embed if lm.embeds_extras else None
        )
        return tuple(
            Sample(
                row_id=question.row_id,
                prompt=question.prompt,
                reference=question.reference,
                prediction=str(tokenizer.decode(answer, skip_special_tokens=True)),
                full_prompt=str(tokenizer.decode(question.prompt_ids, skip_special_tokens=False)),
            )
            for question, answer in zip(self._questions, answers, strict=True)
        )

    def _score(self, samples: Sequence[Sample], reported: Mapping[str, float]) -> dict[str, float]:
        """Return the scores of the metrics."""
        predictions = [sample.prediction for sample in samples]
        with phase("evaluating", "answers"):
            return self._process_group.run_on_rank0(
                lambda: score(self._metrics, predictions, self._questions, reported)
            )

    def _evaluate(self, evaluation: ModelEvaluation, reported: Mapping[str, float]) -> dict[str, float]:
        """Return the scores of the evaluators, those of rank 0 on every rank."""
        returned = {}
        for name, evaluator in self._evaluators.items():
            with phase("evaluating", name), _random_states_kept():
                returned[name] = evaluator.evaluate(evaluation)
            evaluation.lm.eval()  # whatever the evaluator left

        def scored() -> dict[str, float]:
            scores: dict[str, float] = {}
            for name, evaluator in self._evaluators.items():
                _add(scores, evaluator.named(returned[name]), reported, evaluator, name)
            return scores

        return self._process_group.run_on_rank0(scored)


_MOST_PADDING: Final = 0.05
"""Share of padding from which a batch ends, if it has enough rows."""
_ENOUGH_ROWS: Final = 8


def batches_by_length(examples: Examples, batch_size: int) -> list[NDArray[np.int64]]:
    """Return batches of indices of examples of similar length; a group is never split and counts as one row.

    A batch has `batch_size` rows, or fewer where a further row would mean too much padding: of 100 rows in order of
    length a fifth can be padding, and eight rows of a sentence are computed as fast as a hundred.
    """
    groups = examples.groups
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    longest = np.maximum.reduceat(examples.lengths, first) if len(first) else first
    order = np.lexsort((group, longest[group]))
    begins = np.flatnonzero(np.diff(groups[order], prepend=-1))
    ends = np.append(begins[1:], len(order))
    ordered = np.append(0, np.cumsum(examples.lengths[order]))
    at, cuts = 0, []
    for number in range(1, len(begins)):
        padded = (ends[number] - begins[at]) * longest[group[order[begins[number]]]]
        is_padded = ordered[ends[number]] - ordered[begins[at]] < (1 - _MOST_PADDING) * padded
        if number - at == batch_size or (is_padded and number - at >= _ENOUGH_ROWS):
            at = number
            cuts.append(begins[number])
    return np.split(order, cuts)


def score(
    metrics: Mapping[str, MetricStage],
    predictions: Sequence[str],
    rows: Sequence[Question],
    reported: Mapping[str, float],
) -> dict[str, float]:
    """Score all answers with every metric. Raises PluginError for a name that is reported already."""
    scores: dict[str, float] = {}
    for plugin, metric in metrics.items():
        _add(scores, metric.scores(predictions, rows), reported, metric, plugin)
    return scores


def _add(
    scores: dict[str, float], new: Mapping[str, float], reported: Mapping[str, float], stage: object, plugin: str
) -> None:
    """Add the scores of a plugin. Raises PluginError for a name that is reported already."""
    for name, value in new.items():
        if name in reported or name in scores or name in RESERVED_METRICS:
            advice = "rename the plugin" if name == plugin else "rename one of them"
            raise PluginError(f"{stage}: another value is reported as {name!r} already; {advice}")
        scores[name] = value


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Restore the global random number generators at the end of the block: libraries of benchmarks seed them."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def write_predictions(path: Path, samples: Sequence[Sample]) -> None:
    """Write one JSON object a row atomically, in LLaMA-Factory's form: `prompt` (all of it), `predict`, `label`.

    Raises OutputError; the old file is kept then.
    """
    rows = [{"prompt": one.full_prompt, "predict": one.prediction, "label": one.reference} for one in samples]
    atomic_files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
