"""Encoded rows become the figures that are shown above them: lengths, what is trained, how full the batches are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sftx.config.options import TrainConfig
from sftx.data.dataset import Dataset, Examples
from sftx.data.ledger import Entry
from sftx.data.pipeline import DataPipeline
from sftx.data.sampler import EpochSampler
from sftx.inspection.dataset_view import Look, Split, kinds
from sftx.types import Example, Step

_BINS: Final = 24
_MICRO_BATCHES: Final = 64
"""Collated to see how full they are, evenly spread over the epoch."""


@dataclass(frozen=True)
class Bin:
    """Examples of `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class Lengths:
    """Tokens of an example."""

    min: int
    median: int
    p90: int
    max: int
    histogram: tuple[Bin, ...]


@dataclass(frozen=True)
class Filling:
    """How the examples share batches."""

    packs: bool
    """Whether several examples share a row."""
    share: float
    """Real tokens among all positions of a batch; the rest is padding. Measured on micro-batches of the first epoch."""
    num_rows: int
    """Of the first epoch."""
    row_share: float | None
    """Where examples share rows: real tokens among rows x max_length, of the whole epoch."""

    def __str__(self) -> str:
        if self.row_share is None:
            return f"{self.share:.1%} of a batch are real tokens, the rest is padding"
        return f"{self.num_rows:,} packed rows, {self.row_share:.1%} full"


@dataclass(frozen=True)
class Change:
    """Rows that do not reach training as they were written."""

    action: str
    """dropped, filtered, cut or split"""
    reason: str
    count: int
    first: str
    """Where the first of them stands."""


@dataclass(frozen=True)
class Figures:
    """What there is to train on."""

    split: str
    model: str
    template: str
    collator: str
    max_length: int
    formats: dict[str, int]
    """Rows by the parser that took them."""
    num_rows: int
    num_examples: int
    num_input_tokens: int
    num_label_tokens: int
    """Trained ones."""
    lengths: Lengths | None
    """None when no row gives an example."""
    num_epoch_examples: int | None
    """Of the first epoch, which the weights of sources make another number; None for held-out rows."""
    num_steps: int | None
    """Optimizer steps of the run; None for held-out rows."""
    rows_per_step: int
    filling: Filling | None
    changes: tuple[Change, ...]
    problems: tuple[str, ...]
    """What would stop the run."""
    note: str = ""

    @property
    def trained_share(self) -> float:
        return self.num_label_tokens / max(1, self.num_input_tokens)


def figures(look: Look, split: Split) -> Figures:
    """The figures of one split. Raises SftxError."""
    prepared, data = look.prepared, look.dataset(split)
    options = look.config.train
    plan = _plan(look, data) if split == "train" else None
    notes = []
    if look.config.data.streaming and split == "train":
        notes.append(f"streamed: the first {data.ledger.num_rows:,} rows")
    if prepared.collator.wrap_length is not None and split == "train":
        notes.append(
            f"rows are shown whole; training cuts their concatenation every {prepared.collator.wrap_length:,} tokens"
        )
    return Figures(
        split=split,
        model=look.config.model,
        template=_names(prepared, "sftx_template") or "none",
        collator=_names(prepared, "sftx_collator"),
        max_length=look.config.data.max_length,
        formats={name or "unreadable": number for name, number in data.formats.items()},
        num_rows=data.ledger.num_rows,
        num_examples=len(data.examples),
        num_input_tokens=data.num_input_tokens,
        num_label_tokens=data.num_label_tokens,
        lengths=lengths(data.examples.lengths),
        num_epoch_examples=plan.scope.num_examples if plan is not None else None,
        num_steps=plan.num_steps if plan is not None else None,
        rows_per_step=options.rows_per_step,
        filling=filling(plan, data.examples, prepared, options) if plan is not None else None,
        changes=_changes(data.ledger.entries),
        problems=look.problems(split),
        note="; ".join(notes),
    )


def _names(prepared: DataPipeline, hook: str) -> str:
    return ", ".join(active.info.name for active in prepared.assembly.providers(hook))


def _plan(look: Look, data: Dataset) -> EpochSampler | None:
    if not len(data.examples):
        return None
    plan = look.prepared.sampler(data, look.config.train)
    assert isinstance(plan, EpochSampler)  # a look streams nothing
    return plan


def _changes(entries: list[Entry]) -> tuple[Change, ...]:
    found = kinds(entries, lambda entry: f"{entry.action}\0{entry.reason}")
    return tuple(Change(same[0].action, same[0].reason, len(same), str(same[0].where)) for same in found.values())


def lengths(values: NDArray[np.int64]) -> Lengths | None:
    """Order statistics and a histogram of whole-numbered bins of one width."""
    if not len(values):
        return None
    least, most = int(values.min()), int(values.max())
    width = max(1, math.ceil((most - least + 1) / _BINS))
    num = (most - least) // width + 1
    counts = np.bincount((values - least) // width, minlength=num)
    bins = [Bin(least + n * width, least + (n + 1) * width - 1, int(count)) for n, count in enumerate(counts)]
    median, p90 = np.quantile(values, [0.5, 0.9], method="inverted_cdf")
    return Lengths(least, int(median), int(p90), most, tuple(bins))


def filling(plan: EpochSampler, examples: Examples, prepared: DataPipeline, options: TrainConfig) -> Filling:
    """How full rows and batches of the first epoch are."""
    steps = plan.epoch(0)
    rows = [row for step in steps for row in step]
    packs = any(len(set(examples.groups[list(row)].tolist())) > 1 for row in rows if len(row) > 1)
    row_share = None
    if packs:
        filled = sum(int(examples.lengths[list(row)].sum()) for row in rows)
        capacity: int = prepared.collator.row_length or prepared.config.max_length
        row_share = filled / (len(rows) * capacity)
    return Filling(packs, _share_of_batches(steps, examples, prepared, options.micro_batch_size), len(rows), row_share)


def _share_of_batches(steps: list[Step], examples: Examples, prepared: DataPipeline, size: int) -> float:
    batches = [step[at : at + size] for step in steps for at in range(0, len(step), size)]
    every = max(1, len(batches) // _MICRO_BATCHES)
    real = positions = 0
    for batch in batches[::every]:
        chosen: list[Example] = [examples[index] for row in batch for index in row]
        collated = prepared.collator.collate(chosen)
        real += collated.num_input_tokens
        positions += collated.input_ids_BT.numel()
    return real / positions
