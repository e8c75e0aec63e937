"""Statistics of a run's encoded rows: lengths, label tokens, steps, padding, and rows that were changed or dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sftx.data.dataset import Examples
from sftx.data.ledger import Entry
from sftx.data.pipeline import DataPipeline, Split
from sftx.data.sampler import EpochSampler, Sampler
from sftx.inspection.dataset_view import DatasetView

_NUM_BINS: Final = 24
_NUM_MICRO_BATCHES: Final = 64
"""About so many micro-batches, evenly spread over the first epoch, are collated to measure padding."""


@dataclass(frozen=True)
class HistogramBin:
    """The number of examples of `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class LengthStatistics:
    """Order statistics and a histogram of the number of tokens of an example."""

    min: int
    median: int
    p90: int
    max: int
    histogram: tuple[HistogramBin, ...]


@dataclass(frozen=True)
class BatchFill:
    """How much of the batches of the first epoch is padding."""

    packs: bool
    """True if several examples share a row."""
    share: float
    """Non-padding tokens divided by all positions of the micro-batches that were collated."""
    num_rows: int
    """Rows of the first epoch."""
    row_share: float | None
    """For packed rows, non-padding tokens divided by rows times row length, over the first epoch; else None."""

    def __str__(self) -> str:
        if self.row_share is None:
            return f"{self.share:.1%} of a batch are non-padding tokens"
        return f"{self.num_rows:,} packed rows, {self.row_share:.1%} full"


@dataclass(frozen=True)
class ChangedRows:
    """Rows that do not reach training as they were written, all for the same reason."""

    action: str
    """One of dropped, filtered, cut and split."""
    reason: str
    count: int
    first: str
    """The place of the first of these rows."""


@dataclass(frozen=True)
class DatasetStatistics:
    """Statistics of one split; `dataclasses.asdict` of it is `figures` in the output of `sftx inspect --json`."""

    split: str
    model: str
    template: str
    collator: str
    max_length: int
    formats: dict[str, int]
    """The number of rows that each parser read."""
    num_rows: int
    num_examples: int
    num_input_tokens: int
    num_label_tokens: int
    lengths: LengthStatistics | None
    """None when there is no example."""
    num_epoch_examples: int | None
    """Examples of the first epoch, which depend on the weights of the sources; None for held-out rows."""
    num_steps: int | None
    """Optimizer steps of the run; None for held-out rows."""
    rows_per_step: int
    filling: BatchFill | None
    changes: tuple[ChangedRows, ...]
    """The most frequent reason comes first."""
    problems: tuple[str, ...]
    """Messages of the errors with which a run would stop."""
    note: str = ""

    @property
    def label_share(self) -> float:
        return self.num_label_tokens / max(1, self.num_input_tokens)


def dataset_statistics(view: DatasetView, split: Split) -> DatasetStatistics:
    """Read and encode a split and count what it holds. Raises SftxError."""
    pipeline, data, options = view.pipeline, view.dataset(split), view.config.train
    sampler: Sampler | None = None
    if split == "train" and len(data.examples):
        sampler = pipeline.sampler(data, options)
    notes = []
    if pipeline.rollout is not None and split == "train":
        notes.append("rows are questions, which the model answers while it trains")
    if view.config.data.streaming and split == "train":
        notes.append(f"streamed: the first {data.ledger.num_rows:,} rows")
    wrap_length = pipeline.collator.wrap_length
    if wrap_length is not None and split == "train":
        notes.append(f"rows are shown whole; training cuts their concatenation every {wrap_length:,} tokens")
    return DatasetStatistics(
        split=split,
        model=view.config.model,
        template=_plugin_names(pipeline, "sftx_template") or "none",
        collator=_plugin_names(pipeline, "sftx_collator"),
        max_length=view.config.data.max_length,
        formats={name or "unreadable": number for name, number in data.formats.items()},
        num_rows=data.ledger.num_rows,
        num_examples=len(data.examples),
        num_input_tokens=data.num_input_tokens,
        num_label_tokens=data.num_label_tokens,
        lengths=length_statistics(data.examples.lengths),
        num_epoch_examples=sampler.scope.num_examples if sampler is not None else None,
        num_steps=sampler.num_steps if sampler is not None else None,
        rows_per_step=options.rows_per_step,
        filling=batch_fill(sampler, data.examples, pipeline, options.micro_batch_size)
        if isinstance(sampler, EpochSampler)  # the examples of a rollout are not known
        else None,
        changes=_changed_rows(data.ledger.entries),
        problems=view.problems(split),
        note="; ".join(notes),
    )


def _plugin_names(pipeline: DataPipeline, hook: str) -> str:
    return ", ".join(active.info.name for active in pipeline.assembly.providers(hook))


def _changed_rows(entries: list[Entry]) -> tuple[ChangedRows, ...]:
    by_reason: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        by_reason.setdefault((entry.action, entry.reason), []).append(entry)
    most_frequent = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return tuple(ChangedRows(*key, len(same), str(same[0].where)) for key, same in most_frequent)


def length_statistics(lengths: NDArray[np.int64]) -> LengthStatistics | None:
    """Return order statistics and a histogram with bins of one integer width; None without lengths."""
    if not len(lengths):
        return None
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, math.ceil((high - low + 1) / _NUM_BINS))
    counts = np.bincount((lengths - low) // width, minlength=(high - low) // width + 1)
    bins = [HistogramBin(low + n * width, low + (n + 1) * width - 1, int(count)) for n, count in enumerate(counts)]
    median, p90 = np.quantile(lengths, [0.5, 0.9], method="inverted_cdf")
    return LengthStatistics(low, int(median), int(p90), high, tuple(bins))


def batch_fill(sampler: EpochSampler, examples: Examples, pipeline: DataPipeline, micro_batch_size: int) -> BatchFill:
    """Measure how full the rows and the micro-batches of the first epoch are."""
    steps, size = sampler.epoch(0), micro_batch_size
    rows = [row for step in steps for row in step]
    packs = any(len(set(examples.groups[list(row)].tolist())) > 1 for row in rows if len(row) > 1)
    row_share = None
    if packs:
        row_length = pipeline.collator.row_length or pipeline.config.max_length
        num_tokens = sum(int(examples.lengths[list(row)].sum()) for row in rows)
        row_share = num_tokens / (len(rows) * row_length)

    micro_batches = [step[at : at + size] for step in steps for at in range(0, len(step), size)]
    num_tokens = num_positions = 0
    for micro_batch in micro_batches[:: max(1, len(micro_batches) // _NUM_MICRO_BATCHES)]:
        collated = pipeline.collator.collate([examples[index] for row in micro_batch for index in row])
        num_tokens += collated.num_input_tokens
        num_positions += collated.input_ids_BT.numel()
    return BatchFill(packs, num_tokens / num_positions, len(rows), row_share)
