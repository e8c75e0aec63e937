"""Which examples each step of a run takes: of a whole set, epoch by epoch, or of a stream, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sftx.assembly import training_checks
from sftx.config.options import TrainConfig
from sftx.data.dataset import Examples
from sftx.data.stream import Stream
from sftx.errors import ModelError
from sftx.types import Collator, Example, Step

Sample: TypeAlias = Callable[[int], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Of an epoch: the indices of its examples and their groups."""

Planned: TypeAlias = tuple[float, Step, Sequence[Example]]
"""Epochs done after a step, the step, and the examples that its indices point to."""


class Steps(Protocol):
    """The steps of a whole run."""

    num_steps: int
    scope: PlannedScope

    def __iter__(self) -> Iterator[Planned]:
        """The steps from where the plan stands: its beginning, or what `load_state_dict` was given."""

    def state_dict(self, done: int) -> dict[str, Any]:
        """JSON values from which the plan goes on after `done` steps of the run.

        These are the steps that iteration gave, or all but the last, which was not finished.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there: the next step is the one after those that were done."""


@dataclass(frozen=True)
class PlannedScope:
    """What the first epoch holds, or a stream's first window."""

    num_examples: int
    num_label_tokens: int
    """Trained."""
    num_input_tokens: int
    num_steps: int
    longest: int
    """Tokens of the longest example."""
    largest_id: int


class Plan:
    """The steps of a run on examples that are all there: pure in the seed and the epoch."""

    def __init__(
        self, examples: Sequence[Example], collator: Collator, config: TrainConfig, sample: Sample | None = None
    ) -> None:
        self.examples = examples
        self._lengths = lengths_of(examples)
        self._groups = groups_of(examples)
        self._sample = sample
        self._collator = collator
        self._config = config
        self._last: tuple[int, list[Step]] | None = None
        self._epoch, self._before = 0, 0
        """The epoch that is under way, and the steps of the run that came before it."""
        self._done = 0
        """Steps that are not given any more."""
        first = self.epoch(0)
        self.num_steps = config.max_steps or max(1, round(config.num_train_epochs * len(first)))
        self.scope = _scope(first, examples)

    def epoch(self, epoch: int) -> list[Step]:
        """The steps of one epoch. Raises PluginError when the collator loses or repeats an example."""
        if self._last is not None and self._last[0] == epoch:
            return self._last[1]
        indices: list[int] | None = None
        lengths, groups = self._lengths, self._groups
        if self._sample is not None:
            chosen, groups = self._sample(epoch)
            indices, lengths = chosen.tolist(), lengths[chosen]
        steps = training_checks.plan(
            self._collator, lengths.tolist(), groups.tolist(), epoch=epoch, final=True, **_arguments(self._config)
        )[0]
        if indices is not None:
            steps = [tuple(tuple(indices[at] for at in row) for row in step) for step in steps]
        self._last = epoch, steps
        return steps

    def __iter__(self) -> Iterator[Planned]:
        while True:
            steps = self.epoch(self._epoch)
            rest = steps[self._done - self._before :]
            for number, step in enumerate(rest, self._done - self._before + 1):
                if self._before + number > self.num_steps:
                    return
                yield self._epoch + number / len(steps), step, self.examples
            self._before += len(steps)
            self._epoch, self._done = self._epoch + 1, self._before

    def state_dict(self, done: int) -> dict[str, Any]:
        return {"epoch": self._epoch, "steps_before": self._before, "done": done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._before, self._done = state["epoch"], state["steps_before"], state["done"]


class StreamPlan:
    """The steps of a run on a stream: each window is planned when it is read, and what fills no step carried over.

    The first window is read at once, so that what is wrong with the data is told before weights are read.
    """

    def __init__(self, stream: Stream, collator: Collator, config: TrainConfig, window: int) -> None:
        """`window`: examples that are planned together."""
        assert config.max_steps is not None
        self.num_steps = config.max_steps
        self._stream = stream
        self._collator = collator
        self._config = config
        self._size = window
        self.num_embeddings: int | None = None
        """Rows of the model's embedding, once it is known: windows that are read after that are held against it."""
        self._begin(window=0, before=0, done=0, carried=[])
        self.examples = self._examples
        """Of the first window."""
        self.scope = _scope(self._steps, self.examples)

    def _begin(self, *, window: int, before: int, done: int, carried: list[Example]) -> None:
        """Reads and plans a window. `before`: steps before it; `done`: steps that are not given any more, those too;
        `carried`: examples of the window before that filled no step."""
        self._window, self._before, self._done, self._carried = window, before, done, carried
        examples = [*carried, *self._stream.window(self._size)]
        if self.num_embeddings is not None:
            _check_ids(examples, self.num_embeddings)
        lengths, groups = lengths_of(examples).tolist(), groups_of(examples).tolist()
        self._steps, self._rest = training_checks.plan(
            self._collator, lengths, groups, epoch=0, window=window, final=False, **_arguments(self._config)
        )
        self._examples = examples

    def __iter__(self) -> Iterator[Planned]:
        while self._done < self.num_steps:
            for step in self._steps[self._done - self._before : self.num_steps - self._before]:
                yield float(min(self._stream.passes)), step, self._examples
            before = self._before + len(self._steps)
            if before >= self.num_steps:
                return
            carried = [self._examples[at] for at in self._rest]
            self._begin(window=self._window + 1, before=before, done=before, carried=carried)

    def state_dict(self, done: int) -> dict[str, Any]:
        """A window is read again from its beginning: where the stream stood, and what was carried into it."""
        return {
            "window": self._window,
            "steps_before": self._before,
            "done": done,
            "carried": [_as_json(example) for example in self._carried],
            "stream": self._stream.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Reads the window that was under way. Raises DataError when the sources are others, or have become shorter."""
        self._stream.load_state_dict(state["stream"])
        carried = [_of_json(example) for example in state["carried"]]
        self._begin(window=state["window"], before=state["steps_before"], done=state["done"], carried=carried)


def _check_ids(examples: Sequence[Example], num_embeddings: int) -> None:
    """Raises ModelError for a token id without an embedding, which would end in an index error deep in the forward."""
    for example in examples:
        if (largest := max(example.token_ids)) >= num_embeddings:
            raise ModelError(
                f"{example.row_id}: gives the token id {largest}, and the model's embedding has {num_embeddings} rows; "
                "they do not belong together"
            )


def _as_json(example: Example) -> dict[str, Any]:
    mask = "".join("01"[on] for on in example.loss_mask)  # a byte a token
    return {field.name: getattr(example, field.name) for field in fields(example)} | {"loss_mask": mask}


def _of_json(values: Mapping[str, Any]) -> Example:
    return Example(**{**values, "loss_mask": [on == "1" for on in values["loss_mask"]]})


def _scope(steps: Sequence[Step], examples: Sequence[Example]) -> PlannedScope:
    indices = np.array([index for step in steps for row in step for index in row], np.int64)
    lengths = lengths_of(examples)
    if isinstance(examples, Examples):
        num_label_tokens, largest_id = int(examples.num_label_tokens[indices].sum()), examples.largest_id
    else:
        num_label_tokens = sum(examples[index].num_label_tokens for index in indices)
        largest_id = max((max(example.token_ids) for example in examples), default=0)
    return PlannedScope(
        num_examples=len(indices),
        num_label_tokens=num_label_tokens,
        num_input_tokens=int(lengths[indices].sum()),
        num_steps=len(steps),
        longest=int(lengths.max(initial=0)),
        largest_id=largest_id,
    )


def _arguments(config: TrainConfig) -> dict[str, int]:
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return {"seed": config.seed, "examples_per_step": rows}


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """[n], tokens of each."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([len(example.token_ids) for example in examples], np.int64)


def groups_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """[n]"""
    if isinstance(examples, Examples):
        return examples.groups
    return np.array([example.group for example in examples], np.int64)
