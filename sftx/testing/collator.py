"""The contract of a collator: every example is trained once, and batching changes neither loss nor gradient.

Dimensions: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from sftx.data.collate import documents_of, groups_of
from sftx.model.language_model import CausalLM
from sftx.testing.batches import differences, norm, varied
from sftx.testing.clauses import ClauseError, Suite
from sftx.testing.kit import MAX_LENGTH, Kit, make_stage
from sftx.testing.process import changed_random_states, random_states, random_states_kept, seed_all
from sftx.types import IGNORE_INDEX, Batch, Collator, Example, Row, Step, Window

# In fp32, sums over the same tokens in another order: on the tiny model losses differ by 1e-7 and gradients by 2e-7 of
# their norm, while one wrong token among 200 changes them by a hundredth.
_TOLERANCE: Final = 1e-5


def _windows() -> list[Window]:
    """Return windows of groups of several sizes, with lengths of 2 to 60 tokens."""
    windows = []
    for sizes in ((), (1,), (2,), (1,) * 23, (2,) * 11, (1, 2, 3, 1, 1) * 3):
        rng = random.Random(f"lengths {sizes}")
        lengths = [rng.randint(2, 60) for _ in range(sum(sizes))]
        # Numbers with gaps, as dropped rows leave them.
        groups = [3 * group for group, size in enumerate(sizes) for _ in range(size)]
        for seed, epoch, index, rows, is_last in itertools.product((0, 7), (0, 1), (0, 2), (1, 4), (True, False)):
            windows.append(Window(lengths, groups, rows, seed, epoch, index, is_last))
    return windows


def _shown(window: Window) -> str:
    return (
        f"the plan of {len(window.groups)} examples in {len(set(window.groups))} groups (rows_per_step="
        f"{window.rows_per_step}, is_last={window.is_last}, seed={window.seed}, epoch={window.epoch}, "
        f"index={window.index})"
    )


@dataclass(frozen=True)
class _Comparison:
    """The loss of a batch and the summed losses of its examples, each computed alone."""

    batch: Batch
    loss: float
    expected_loss: float
    gradient_error: float
    """Norm of the difference between the gradients, relative to the norm of the expected one."""

    def __str__(self) -> str:
        B, T = self.batch.input_ids_BT.shape
        return f"a batch of {len(self.batch.row_ids)} examples, [{B}, {T}]"


class _Case:
    def __init__(self, kit: Kit) -> None:
        self.collator: Collator = make_stage(kit.plugin, "sftx_collator", max_length=MAX_LENGTH)
        self._kit = kit

    @cached_property
    def plans(self) -> list[tuple[Window, list[Step], Row]]:
        return [(window, *self.collator.plan(copy.deepcopy(window))) for window in _windows()]

    @cached_property
    def batches(self) -> list[tuple[list[Example], Batch]]:
        """Batches of one group, of a few and of many, each with its examples."""
        plain = self._kit.examples
        difficult = varied(plain, self._kit.tokenizer)
        selections = [groups_of(plain)[0], plain, groups_of(difficult)[-1], [*plain, *difficult]]
        return [(examples, self.collator.collate(copy.deepcopy(examples))) for examples in selections]

    @cached_property
    def comparisons(self) -> list[_Comparison]:
        lm = self._kit.language_model().eval()
        parameters = [p for p in lm.parameters() if p.requires_grad]
        comparisons = []
        for examples, batch in self.batches:
            loss = _batch_loss(lm, batch)
            gradients = torch.autograd.grad(loss, parameters)
            expected_loss = 0.0
            expected = [torch.zeros_like(p) for p in parameters]
            for example in examples:
                example_loss = _example_loss(lm, example)
                expected_loss += example_loss.item()
                for total, gradient in zip(expected, torch.autograd.grad(example_loss, parameters), strict=True):
                    total += gradient
            error = norm([a - b for a, b in zip(gradients, expected, strict=True)]) / norm(expected)
            comparisons.append(_Comparison(batch, loss.item(), expected_loss, error))
        return comparisons


SUITE: Suite[_Case] = Suite("collator", _Case)


@SUITE.clause(
    "A plan contains each example once, in a row of a step or carried over; the last window carries nothing over."
)
def plans_every_example(case: _Case) -> None:
    for window, steps, carried in case.plans:
        planned = Counter([index for step in steps for row in step for index in row] + list(carried))
        expected = Counter(range(len(window.groups)))
        if planned != expected:
            missing, extra = sorted((expected - planned).elements()), sorted((planned - expected).elements())
            raise ClauseError(
                f"{_shown(window)} lacks {missing[:5]} and has {extra[:5]} too often; put every index into one row, or "
                "into the row that is carried over"
            )
        if window.is_last and carried:
            raise ClauseError(
                f"{_shown(window)} carries {list(carried)[:5]} over; no window follows one with is_last=True, so plan "
                "them in a step with fewer rows"
            )


@SUITE.clause(
    "A step has rows_per_step rows, none of them empty; one step of the last window may have fewer.",
    needs=["plans-every-example"],
)
def fills_its_steps(case: _Case) -> None:
    for window, steps, _ in case.plans:
        sizes = [len(step) for step in steps]
        if not all(sizes) or not all(row for step in steps for row in step):
            raise ClauseError(f"{_shown(window)} has a step or a row without examples; leave it out")
        if sizes and max(sizes) > window.rows_per_step:
            raise ClauseError(f"{_shown(window)} has a step of {max(sizes)} rows; make steps of rows_per_step rows")
        short = [size for size in sizes if size < window.rows_per_step]
        if len(short) > window.is_last:
            raise ClauseError(
                f"{_shown(window)} has {len(short)} steps with fewer rows ({short[:5]}); carry over what does not fill "
                "a step, and put it into one step if is_last=True"
            )


@SUITE.clause(
    "Examples of one group are in the same row, or carried over together, in their order.",
    needs=["plans-every-example"],
)
def keeps_groups_together(case: _Case) -> None:
    for window, steps, carried in case.plans:
        rows = [*(row for step in steps for row in step), carried]
        place = {index: (number, at) for number, row in enumerate(rows) for at, index in enumerate(row)}
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for index, group in enumerate(window.groups):
            groups[group].append(index)
        for members in groups.values():
            places = [place[index] for index in members]
            if len({number for number, _ in places}) > 1 or places != sorted(places):
                raise ClauseError(
                    f"{_shown(window)} separates the examples {members} of one group, or changes their order; a "
                    "preference pair must reach the loss in one micro-batch, so make rows of complete groups"
                )


@SUITE.clause(
    "A plan depends on its window alone, and changes neither the window nor the global random state.",
    needs=["plans-every-example"],
)
def plans_by_its_arguments(case: _Case) -> None:
    with random_states_kept():
        # In reverse order, so that another plan precedes each one than the first time.
        for number, (window, *first) in enumerate(reversed(case.plans)):
            seed_all(number)
            before, copied = random_states(), copy.deepcopy(window)
            again = case.collator.plan(copied)
            if copied != window:
                raise ClauseError(f"{_shown(window)} changed the lengths or groups of its window; copy them")
            _check_random_states(before, _shown(window))
            if list(again) != first:
                raise ClauseError(
                    f"{_shown(window)} was different the second time, with other global random numbers; draw from "
                    'random.Random(f"{seed} {epoch} {index}") of the window, and keep no state between two calls'
                )


@SUITE.clause("A batch holds each example once: its row id, and its token ids as one document.")
def batches_every_example(case: _Case) -> None:
    for examples, batch in case.batches:
        expected, row_ids = Counter(example.row_id for example in examples), Counter(batch.row_ids)
        if row_ids != expected:
            raise ClauseError(
                f"a batch of {len(examples)} examples lacks the row_ids {list(expected - row_ids)[:3]} and has "
                f"{list(row_ids - expected)[:3]} too many; put each example's row_id into row_ids once"
            )
        if batch.examples and tuple(example.row_id for example in batch.examples) != batch.row_ids:
            raise ClauseError(
                "its examples are not in the order of row_ids, by which a loss finds them; leave `examples` to sftx, "
                "or bring both into one order"
            )
        if (batch.lengths_B is None) == (batch.cu_seqlens is None):
            raise ClauseError("set lengths_B for rows padded on the right, or cu_seqlens for packed rows, not both")
        documents = Counter(tuple(batch.input_ids_BT.flatten()[where].tolist()) for where in documents_of(batch))
        for example in examples:
            ids = tuple(map(int, example.token_ids))
            documents[ids] -= 1
            if documents[ids] < 0:
                raise ClauseError(
                    f"the {len(ids)} token ids of {example.row_id} are no document of a batch of {len(examples)} "
                    "examples; cut and change nothing, and let lengths_B or cu_seqlens delimit each example"
                )


@SUITE.clause(
    "num_label_tokens, num_input_tokens and max_seqlen are correct; tensors are [B, T] and int64; position ids start "
    "at 0 in each document.",
    needs=["batches-every-example"],
)
def counts_what_it_holds(case: _Case) -> None:
    for examples, batch in case.batches:
        B, T = batch.input_ids_BT.shape
        for name, dtype, shape in (
            ("input_ids_BT", torch.int64, (B, T)),
            ("labels_BT", torch.int64, (B, T)),
            ("position_ids_BT", torch.int64, (B, T)),
            ("token_weights_BT", torch.float32, (B, T)),
            ("lengths_B", torch.int64, None),
            ("cu_seqlens", torch.int32, None),  # as kernels on a GPU need them
        ):
            tensor: Tensor | None = getattr(batch, name)
            if tensor is None:
                continue
            if tensor.dtype != dtype or (tensor.ndim != 1 if shape is None else tensor.shape != shape):
                expected = "with one dimension" if shape is None else f"of shape {list(shape)}"
                raise ClauseError(f"{name} is {tensor.dtype} {list(tensor.shape)}; make it {dtype} {expected}")
        lengths = [len(example.token_ids) for example in examples]
        num_labels = int((batch.labels_BT != IGNORE_INDEX).sum())
        counts: tuple[tuple[str, int, str], ...] = (
            ("num_label_tokens", num_labels, "labels are not IGNORE_INDEX"),
            ("num_input_tokens", sum(lengths), "tokens are not padding"),
            ("max_seqlen", _longest(batch, lengths), "tokens are in the longest example, or piece of one"),
        )
        for name, right, meaning in counts:
            value: object = getattr(batch, name)
            if not isinstance(value, int) or value != right:
                raise ClauseError(f"{name} is {value!r}, but {right} {meaning}; the trainer relies on it as an int")
        positions_N = batch.position_ids_BT.flatten()
        for where in documents_of(batch):
            if not torch.equal(positions_N[where], torch.arange(len(where))):
                raise ClauseError(
                    f"the position ids of a document start with {positions_N[where][:4].tolist()}; count from 0 in "
                    "each, otherwise the model sees wrong positions and, in a packed row, the previous documents"
                )


@SUITE.clause(
    "A batch depends on its examples alone, and changes neither them nor the global random state; a second one is "
    "bit-identical."
)
def collates_by_its_arguments(case: _Case) -> None:
    with random_states_kept():
        for number, (examples, first) in enumerate(reversed(case.batches)):
            seed_all(number)
            copied, before = copy.deepcopy(examples), random_states()
            again = case.collator.collate(copied)
            if list(map(_content, copied)) != list(map(_content, examples)):
                raise ClauseError(
                    f"collate changed its {len(examples)} examples, which are batched again in the next epoch; copy "
                    "what you change"
                )
            _check_random_states(before, "collate")
            if different := differences(first, again):
                raise ClauseError(
                    f"the same {len(examples)} examples made a batch with other {', '.join(different)}; draw no random "
                    "numbers in collate, and keep no state between two calls"
                )


@SUITE.clause(
    "The loss of a batch is the sum of its examples' losses, each computed alone by the model's own forward.",
    needs=["batches-every-example", "counts-what-it-holds"],
)
def changes_no_loss(case: _Case) -> None:
    for c in case.comparisons:
        if not abs(c.loss - c.expected_loss) <= _TOLERANCE * abs(c.expected_loss):
            raise ClauseError(
                f"{c} has a loss of {c.loss:.6g}, its examples one by one {c.expected_loss:.6g}; check that labels and "
                "weights are shifted by one, that the last label of each document is IGNORE_INDEX, that nothing is "
                "masked by its id, and that no document sees another"
            )


@SUITE.clause(
    "The gradient of a batch is the sum of its examples' gradients, in all parameters.", needs=["changes-no-loss"]
)
def changes_no_gradient(case: _Case) -> None:
    for c in case.comparisons:
        if not c.gradient_error <= _TOLERANCE:
            raise ClauseError(
                f"{c} has a gradient that is off by {c.gradient_error:.1e} of the norm of its examples' gradients, "
                "though its loss is right; check the weight and the label of each token"
            )


def check_collator(plugin: object, *, model: Path | None = None) -> None:
    """Check the plugin's collator. Raises ContractError, which names the broken clauses.

    `model` is a directory with a model and tokenizer to use instead of the tiny ones.
    """
    SUITE.check(plugin, model=model)


def _longest(batch: Batch, lengths: Sequence[int]) -> int:
    """Return the tokens of the longest example, or of the longest piece where examples share prefixes."""
    if batch.shared is None or batch.cu_seqlens is None:
        return max(lengths)
    return int(batch.cu_seqlens.diff().max())


def _content(example: Example) -> tuple[Any, ...]:
    """Return the fields of an example as values that `==` compares."""
    weights = None if example.weights is None else list(example.weights)
    ids, mask = list(example.token_ids), list(example.loss_mask)
    return ids, mask, weights, example.row_id, example.group, dict(example.extras)


def _check_random_states(before: dict[str, Any], what: str) -> None:
    if changed := changed_random_states(before):
        raise ClauseError(f"{what} drew from {changed}, which others use too; use a generator of its own")


def _batch_loss(lm: CausalLM, batch: Batch) -> Tensor:
    logits_BTV = lm.logits(lm.hidden(batch).hidden_BTD)
    loss_N = functional.cross_entropy(
        logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return (loss_N if batch.token_weights_BT is None else loss_N * batch.token_weights_BT.flatten()).sum()


def _example_loss(lm: CausalLM, example: Example) -> Tensor:
    """Compute the loss with the forward of transformers: each token is predicted from those before it."""
    ids_T = torch.tensor(example.token_ids, dtype=torch.int64, device=lm.device)
    logits_TV = lm.model(input_ids=ids_T[None], use_cache=False).logits[0]
    weights_T = torch.tensor([1.0] * len(ids_T) if example.weights is None else example.weights)
    weights_T = weights_T * torch.tensor(example.loss_mask)
    return (functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none") * weights_T[1:].to(lm.device)).sum()
