"""Decide which examples each optimizer step takes, and which rank computes which of its rows.

`EpochSampler` plans a whole dataset epoch by epoch, `StreamSampler` a stream window by window (`RolloutSampler`, of a
run whose examples are answers, is in `rollout_sampler.py`). Both are pure in seed,
epoch and window and know nothing of the number of processes; `split_step` divides a step among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sftx.assembly.stages.data_stages import CollatorStage
from sftx.config.options import TrainConfig
from sftx.data.dataset import Examples
from sftx.data.stream import Stream
from sftx.errors import ModelError
from sftx.types import Example, Step, Window

Draw: TypeAlias = Callable[[int], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Draws the examples of an epoch: their indices, and their groups."""


class PlannedStep(NamedTuple):
    """The rows of one optimizer step, over all ranks."""

    epoch: float
    """Epochs completed after this step."""
    rows: Step
    examples: Sequence[Example]
    """What the indices of `rows` refer to; an example is decoded when it is accessed."""
    lengths: NDArray[np.int64]
    """[len(examples)], tokens of each example."""
    metrics: Mapping[str, float] = {}
    """What a rollout reports of the step's window."""


@dataclass(frozen=True)
class PlannedScope:
    """Size of the first epoch, or of a stream's first window."""

    num_examples: int
    num_label_tokens: int
    num_input_tokens: int
    num_steps: int
    longest: int
    """Tokens of the longest example."""
    largest_id: int


class Sampler(Protocol):
    """The steps of a whole run."""

    num_steps: int
    scope: PlannedScope
    examples: Sequence[Example]
    """Those of the dataset, or of the stream's first window; with a rollout, the prompts."""

    def prepare(self) -> None:
        """Make what all processes have to make together before the next step. Every process calls it."""

    def __iter__(self) -> Iterator[PlannedStep]:
        """Yield the steps from the beginning, or from where `load_state_dict` continues."""

    def state_dict(self, done: int) -> dict[str, Any]:
        """Return JSON values from which sampling continues after `done` steps of the run.

        `done` is the number of steps that iteration has yielded, or one less when the last was not finished.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state: the next step is the one after those that were done."""


class EpochSampler:
    """The steps of a run on a dataset that is complete: pure in the seed and the epoch."""

    def __init__(
        self, examples: Sequence[Example], collator: CollatorStage, config: TrainConfig, draw: Draw | None = None
    ) -> None:
        """`draw` chooses the examples of an epoch (a mixture of sources); None takes each once."""
        self.examples = examples
        self._lengths, self._groups = lengths_and_groups(examples)
        self._draw = draw
        self._collator = collator
        self._config = config
        self._planned: tuple[int, list[Step]] | None = None
        self._epoch, self._before = 0, 0
        """The current epoch, and the number of steps in the epochs before it."""
        self._done = 0
        """Steps that are not yielded any more."""
        first = self.epoch(0)
        self.num_steps = config.max_steps or max(1, round(config.num_train_epochs * len(first)))
        self.scope = _scope(first, examples, self._lengths)

    def epoch(self, epoch: int) -> list[Step]:
        """Plan the steps of one epoch. Raises PluginError when the collator loses or repeats an example."""
        if self._planned is None or self._planned[0] != epoch:
            lengths, groups = self._lengths, self._groups
            chosen: list[int] | None = None
            if self._draw is not None:
                drawn, groups = self._draw(epoch)
                chosen, lengths = drawn.tolist(), lengths[drawn]
            window = Window(
                lengths=lengths.tolist(),
                groups=groups.tolist(),
                rows_per_step=self._config.rows_per_step,
                seed=self._config.seed,
                epoch=epoch,
            )
            steps = self._collator.plan(window)[0]
            if chosen is not None:
                steps = [tuple(tuple(chosen[at] for at in row) for row in step) for step in steps]
            self._planned = epoch, steps
        return self._planned[1]

    def prepare(self) -> None:
        """Do nothing: each process plans by itself."""

    def __iter__(self) -> Iterator[PlannedStep]:
        while True:
            steps = self.epoch(self._epoch)
            rest = steps[self._done - self._before :]
            for number, step in enumerate(rest, self._done - self._before + 1):
                if self._before + number > self.num_steps:
                    return
                yield PlannedStep(self._epoch + number / len(steps), step, self.examples, self._lengths)
            self._before += len(steps)
            self._epoch, self._done = self._epoch + 1, self._before

    def state_dict(self, done: int) -> dict[str, Any]:
        return {"epoch": self._epoch, "steps_before": self._before, "done": done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._before, self._done = state["epoch"], state["steps_before"], state["done"]


class StreamSampler:
    """The steps of a run on a stream: a window is planned when it is read, and examples left over are carried on.

    The first window is read at once, so that faults of the data are reported before weights are read.
    """

    def __init__(self, stream: Stream, collator: CollatorStage, config: TrainConfig, window_size: int) -> None:
        """`window_size`: number of examples that are planned together."""
        assert config.max_steps is not None
        self.num_steps = config.max_steps
        self._stream = stream
        self._collator = collator
        self._config = config
        self._window_size = window_size
        self.num_embeddings: int | None = None
        """Rows of the model's embedding, once known: token ids of later windows are checked against it."""
        self._read_window(window=0, before=0, done=0, carried=[])
        self.examples: Sequence[Example] = self._examples
        self.scope = _scope(self._steps, self._examples, self._lengths)

    def _read_window(self, *, window: int, before: int, done: int, carried: list[Example]) -> None:
        """Read and plan a window.

        `before`: steps of the windows before it; `done`: steps that are not yielded any more, those included;
        `carried`: examples that the window before did not use.
        """
        self._window, self._before, self._done, self._carried = window, before, done, carried
        examples = [*carried, *self._stream.window(self._window_size)]
        if self.num_embeddings is not None:
            for example in examples:
                if (largest := int(example.token_ids.max())) >= self.num_embeddings:
                    raise ModelError(  # otherwise an index error deep in the forward
                        f"{example.row_id}: gives the token id {largest}, and the model's embedding has "
                        f"{self.num_embeddings} rows; they do not belong together"
                    )
        self._lengths, groups = lengths_and_groups(examples)
        self._steps, self._rest = self._collator.plan(
            Window(
                lengths=self._lengths.tolist(),
                groups=groups.tolist(),
                rows_per_step=self._config.rows_per_step,
                seed=self._config.seed,
                index=window,
                is_last=False,
            )
        )
        self._examples = examples

    def prepare(self) -> None:
        """Do nothing: each process reads by itself."""

    def __iter__(self) -> Iterator[PlannedStep]:
        while self._done < self.num_steps:
            for step in self._steps[self._done - self._before : self.num_steps - self._before]:
                yield PlannedStep(float(min(self._stream.passes)), step, self._examples, self._lengths)
            before = self._before + len(self._steps)
            if before >= self.num_steps:
                return
            carried = [self._examples[at] for at in self._rest]
            self._read_window(window=self._window + 1, before=before, done=before, carried=carried)

    def state_dict(self, done: int) -> dict[str, Any]:
        """Return where the stream stood before the current window, which is read again, and what it was given."""
        return {
            "window": self._window,
            "steps_before": self._before,
            "done": done,
            "carried": [to_json(example) for example in self._carried],
            "stream": self._stream.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read the saved window again. Raises DataError when the sources are others, or have become shorter."""
        self._stream.load_state_dict(state["stream"])
        carried = [from_json(example) for example in state["carried"]]
        self._read_window(window=state["window"], before=state["steps_before"], done=state["done"], carried=carried)


def to_json(example: Example) -> dict[str, Any]:
    """Return an example as JSON values, for a checkpoint."""
    return {
        "token_ids": example.token_ids.tolist(),
        "loss_mask": "".join("01"[on] for on in example.loss_mask.tolist()),  # a byte a token
        "row_id": example.row_id,
        "group": example.group,
        "weights": None if example.weights is None else example.weights.tolist(),
        "extras": example.extras,
    }


def from_json(values: Mapping[str, Any]) -> Example:
    """Return the example that `to_json` wrote."""
    return Example(**{**values, "loss_mask": [on == "1" for on in values["loss_mask"]]})


def lengths_and_groups(examples: Sequence[Example]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return [n] tokens and [n] group of each example, from the columns where there are any."""
    if isinstance(examples, Examples):
        return examples.lengths, examples.groups
    lengths = np.array([len(example.token_ids) for example in examples], np.int64)
    return lengths, np.array([example.group for example in examples], np.int64)


def _scope(steps: Sequence[Step], examples: Sequence[Example], lengths: NDArray[np.int64]) -> PlannedScope:
    indices = np.array([index for step in steps for row in step for index in row], np.int64)
    if isinstance(examples, Examples):
        num_label_tokens, largest_id = int(examples.num_label_tokens[indices].sum()), examples.largest_id
    else:
        num_label_tokens = sum(examples[index].num_label_tokens for index in indices.tolist())
        largest_id = max((int(example.token_ids.max()) for example in examples), default=0)
    return PlannedScope(
        num_examples=len(indices),
        num_label_tokens=num_label_tokens,
        num_input_tokens=int(lengths[indices].sum()),
        num_steps=len(steps),
        longest=int(lengths.max(initial=0)),
        largest_id=largest_id,
    )


# --- the rows of a step, divided among ranks ------------------------------------------------------


def num_micro_batches(num_rows: int, world_size: int, rows_at_once: int) -> tuple[int, int]:
    """Return the micro-batches that each rank computes in a step of `num_rows`, and the most rows of one of them."""
    rounds = math.ceil(num_rows / (world_size * rows_at_once))
    return rounds, math.ceil(num_rows / (world_size * rounds))


def split_step(num_tokens: Sequence[int], world_size: int, rows_at_once: int) -> list[list[tuple[int, ...]]]:
    """Divide the rows of a step into micro-batches of at most `rows_at_once` rows, balanced by token count.

    `num_tokens` gives the tokens of each row. The result `[micro_batch][rank]` holds positions of rows; it is empty for
    a rank that has no row left. One process takes the rows in order. Several take rows of similar length at the same
    time, so that no rank waits long for another; each row, longest first, goes to the rank with the fewest tokens so
    far that has room for it.
    """
    rows = range(len(num_tokens))
    if world_size == 1:
        return [[tuple(rows[at : at + rows_at_once])] for at in range(0, len(rows), rows_at_once)]
    longest_first = sorted(rows, key=lambda row: -num_tokens[row])
    totals = [0] * world_size
    per_round = world_size * num_micro_batches(len(rows), world_size, rows_at_once)[1]
    rounds: list[list[tuple[int, ...]]] = []
    for start in range(0, len(rows), per_round):
        chosen = longest_first[start : start + per_round]
        most = math.ceil(len(chosen) / world_size)
        shards: list[list[int]] = [[] for _ in range(world_size)]
        for row in chosen:
            open_ranks = [rank for rank in range(world_size) if len(shards[rank]) < most]
            rank = min(open_ranks, key=lambda rank: (totals[rank], rank))
            shards[rank].append(row)
            totals[rank] += num_tokens[row]
        rounds.append([tuple(sorted(shard)) for shard in shards])
    return rounds
