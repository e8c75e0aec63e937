"""The contract of a collator: every example is trained once, and sharing a batch changes neither loss nor gradient.

Dimensions: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from sftx.assembly.stages import make
from sftx.data.collate import groups_of
from sftx.model.language_model import CausalLM
from sftx.testing.batches import differences, varied
from sftx.testing.clauses import ClauseError, Suite
from sftx.testing.kit import MAX_LENGTH, Kit
from sftx.testing.numeric import norm
from sftx.testing.process import random_states, random_states_kept, seed_all
from sftx.types import IGNORE_INDEX, Batch, Collator, Example, Row, Step, Window

# fp32: sums over the same tokens in another order. On the tiny model losses differ by 1e-7 and gradients by 2e-7 of
# their norm; one token that is wrong among 200 makes a hundredth.
_TOLERANCE: Final = 1e-5
_GROUP_SIZES: Final = ((), (1,), (2,), (1,) * 23, (2,) * 11, (1, 2, 3, 1, 1) * 3)


@dataclass(frozen=True)
class _Window:
    """What `plan` is asked: groups of these sizes, with lengths drawn from 2 to 60 tokens."""

    sizes: tuple[int, ...]
    seed: int
    epoch: int
    index: int
    rows_per_step: int
    is_last: bool

    @property
    def lengths(self) -> list[int]:
        rng = random.Random(f"lengths {self.sizes}")
        return [rng.randint(2, 60) for _ in range(sum(self.sizes))]

    @property
    def groups(self) -> list[int]:
        # Numbers with gaps, as rows leave them that are dropped.
        return [3 * group for group, size in enumerate(self.sizes) for _ in range(size)]

    def plan(self, collator: Collator, lengths: list[int], groups: list[int]) -> tuple[list[Step], Row]:
        return collator.plan(
            Window(
                lengths=lengths,
                groups=groups,
                rows_per_step=self.rows_per_step,
                seed=self.seed,
                epoch=self.epoch,
                index=self.index,
                is_last=self.is_last,
            )
        )

    def __str__(self) -> str:
        return (
            f"of {len(self.groups)} examples in {len(self.sizes)} groups (rows_per_step={self.rows_per_step}, "
            f"is_last={self.is_last}, seed={self.seed}, epoch={self.epoch}, index={self.index})"
        )


def _windows() -> list[_Window]:
    return [_Window(*asked) for asked in itertools.product(_GROUP_SIZES, (0, 7), (0, 1), (0, 2), (1, 4), (True, False))]


@dataclass(frozen=True)
class _Comparison:
    """The loss of a batch, and of its examples one by one."""

    batch: Batch
    together: float
    alone: float
    gradient_difference: float
    """Norm of the difference between the gradients, relative to that of the examples one by one."""

    def __str__(self) -> str:
        B, T = self.batch.input_ids_BT.shape
        return f"a batch of {len(self.batch.row_ids)} examples, [{B}, {T}]"


class _Case:
    def __init__(self, kit: Kit) -> None:
        self.collator: Collator = make(kit.plugin, "sftx_collator", max_length=MAX_LENGTH)
        self._kit = kit

    @cached_property
    def plans(self) -> list[tuple[_Window, list[Step], Row]]:
        return [(window, *window.plan(self.collator, window.lengths, window.groups)) for window in _windows()]

    @cached_property
    def cuts(self) -> list[list[Example]]:
        """Examples to be batched: some alone, some together; groups are whole, as in a run."""
        plain = self._kit.examples
        odd = varied(plain, self._kit.tokenizer)
        return [groups_of(plain)[0], plain, groups_of(odd)[-1], [*plain, *odd]]

    @cached_property
    def batches(self) -> list[tuple[list[Example], Batch]]:
        return [(examples, self.collator.collate(copy.deepcopy(examples))) for examples in self.cuts]

    @cached_property
    def comparisons(self) -> list[_Comparison]:
        lm = self._kit.language_model().eval()
        parameters = [p for p in lm.parameters() if p.requires_grad]
        compared = []
        for examples, batch in self.batches:
            loss = _loss_of_batch(lm, batch)
            gradients = torch.autograd.grad(loss, parameters)
            alone = 0.0
            summed = [torch.zeros_like(p) for p in parameters]
            for example in examples:
                own = _loss_of_example(lm, example)
                alone += own.item()
                for total, gradient in zip(summed, torch.autograd.grad(own, parameters), strict=True):
                    total += gradient
            off = norm([one - other for one, other in zip(gradients, summed, strict=True)])
            compared.append(_Comparison(batch, loss.item(), alone, off / norm(summed)))
        return compared


SUITE: Suite[_Case] = Suite("collator", _Case)


@SUITE.clause(
    "A plan holds each example once, in a row of a step or among those carried over; the last window carries none over."
)
def plans_every_example(case: _Case) -> None:
    for window, steps, carried in case.plans:
        held = Counter([index for step in steps for row in step for index in row] + list(carried))
        wanted = Counter(range(len(window.groups)))
        if held != wanted:
            missing, extra = sorted((wanted - held).elements()), sorted((held - wanted).elements())
            raise ClauseError(
                f"the plan {window} lacks {missing[:5]} and has {extra[:5]} too often; "
                "put every index into one row, or into what is carried over"
            )
        if window.is_last and carried:
            raise ClauseError(
                f"the plan {window} carries {list(carried)[:5]} over; with final=True nothing comes after, so plan "
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
            raise ClauseError(f"the plan {window} has a step or a row without examples; leave it out")
        if any(size > window.rows_per_step for size in sizes):
            raise ClauseError(
                f"the plan {window} has a step of {max(sizes)} rows; rows_per_step is how many rows share an update"
            )
        short = [size for size in sizes if size < window.rows_per_step]
        if len(short) > window.is_last:
            raise ClauseError(
                f"the plan {window} has {len(short)} steps with fewer rows (of {short[:5]}); carry over what does not "
                "fill a step, and with final=True put it into one"
            )


@SUITE.clause(
    "Examples of one group stand in one row, or are carried over together, in their order.",
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
                    f"the plan {window} tears the examples {members} of one group apart, or changes their order; a "
                    "preference pair must reach the loss in one micro-batch: make rows of whole groups"
                )


@SUITE.clause(
    "A plan depends on the arguments of `plan` alone, and leaves them and the global random numbers as they were.",
    needs=["plans-every-example"],
)
def plans_by_its_arguments(case: _Case) -> None:
    with random_states_kept():
        # The other way round, so that each plan has another one before it than it had the first time.
        for number, (window, *first) in enumerate(reversed(case.plans)):
            seed_all(number)
            before, lengths, groups = random_states(), window.lengths, window.groups
            again = window.plan(case.collator, lengths, groups)
            if (lengths, groups) != (window.lengths, window.groups):
                raise ClauseError(f"the plan {window} changed the lists of lengths or groups it was given; copy them")
            _same_randomness(before, f"the plan {window}")
            if list(again) != first:
                raise ClauseError(
                    f"the plan {window} was another one when asked for again, with other random numbers around it; "
                    'draw from random.Random(f"{seed} {epoch} {window}") alone, and keep nothing between two calls'
                )


@SUITE.clause("A batch holds each example once: its row id, and its token ids as one document.")
def batches_every_example(case: _Case) -> None:
    for examples, batch in case.batches:
        asked, held = Counter(example.row_id for example in examples), Counter(batch.row_ids)
        if asked != held:
            raise ClauseError(
                f"a batch of {len(examples)} examples has row_ids of {held.total()}, with {list(asked - held)[:3]} "
                f"missing and {list(held - asked)[:3]} too many; each example's row_id belongs into row_ids once"
            )
        if (batch.lengths_B is None) == (batch.cu_seqlens is None):
            raise ClauseError("set lengths_B for rows padded at the right, or cu_seqlens for packed ones, and not both")
        documents = Counter(tuple(batch.input_ids_BT.flatten()[where].tolist()) for where in _documents(batch))
        lost = [e for e in examples if not _take_out(documents, tuple(e.token_ids))]
        if lost:
            raise ClauseError(
                f"the token ids of {lost[0].row_id} ({len(lost[0].token_ids)} tokens), one of {len(examples)} "
                "examples, are no document of the batch; cut and change nothing, and let lengths_B or cu_seqlens "
                "say where each example stands"
            )


@SUITE.clause(
    "A batch counts its tokens: num_label_tokens, num_input_tokens, max_seqlen; its tensors are [B, T] and int64, and "
    "position ids begin at 0 in each document.",
    needs=["batches-every-example"],
)
def counts_what_it_holds(case: _Case) -> None:
    for examples, batch in case.batches:
        ids_BT, labels_BT, weights_BT = batch.input_ids_BT, batch.labels_BT, batch.token_weights_BT
        for name in ("input_ids_BT", "labels_BT", "position_ids_BT"):
            tensor: Tensor = getattr(batch, name)
            if tensor.dtype != torch.int64 or tensor.ndim != 2 or tensor.shape != ids_BT.shape:
                raise ClauseError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}; make it int64 [B, T] as input_ids_BT"
                )
        for name, dtype in (("lengths_B", torch.int64), ("cu_seqlens", torch.int32)):
            borders: Tensor | None = getattr(batch, name)
            if borders is not None and (borders.dtype != dtype or borders.ndim != 1):
                raise ClauseError(
                    f"{name} is {borders.dtype} {list(borders.shape)}; kernels for a GPU need it as {dtype} in one row"
                )
        if weights_BT is not None and (weights_BT.dtype != torch.float32 or weights_BT.shape != ids_BT.shape):
            raise ClauseError(f"token_weights_BT is {weights_BT.dtype} {list(weights_BT.shape)}; make it fp32 [B, T]")
        lengths = [len(example.token_ids) for example in examples]
        counts: tuple[tuple[str, object, int, str], ...] = (
            (
                "num_label_tokens",
                batch.num_label_tokens,
                int((labels_BT != IGNORE_INDEX).sum()),
                "labels are not IGNORE_INDEX",
            ),
            ("num_input_tokens", batch.num_input_tokens, sum(lengths), "tokens are not padding"),
            ("max_seqlen", batch.max_seqlen, max(lengths), "tokens are in the longest example"),
        )
        for name, seen, right, meaning in counts:
            if not isinstance(seen, int) or seen != right:
                raise ClauseError(f"{name} is {seen!r}, but {right} {meaning}; the engine relies on it as an int")
        positions_N = batch.position_ids_BT.flatten()
        for where in _documents(batch):
            if not torch.equal(positions_N[where], torch.arange(where.stop - where.start)):
                raise ClauseError(
                    f"the position ids of a document begin with {positions_N[where][:4].tolist()}; count from 0 in "
                    "each, or the model sees another place, and in a packed row the documents before"
                )


@SUITE.clause(
    "A batch depends on its examples alone: made twice it is the same to the bit, and it leaves the "
    "examples and the global random numbers as they were."
)
def collates_by_its_arguments(case: _Case) -> None:
    with random_states_kept():
        for number, (examples, first) in enumerate(reversed(case.batches)):
            seed_all(number)
            given, before = copy.deepcopy(examples), random_states()
            again = case.collator.collate(given)
            if given != examples:
                raise ClauseError(
                    f"collate changed the {len(examples)} examples it was given; they are batched again in the next "
                    "epoch: copy what you change"
                )
            _same_randomness(before, "collate")
            different = differences(first, again)
            if different:
                raise ClauseError(
                    f"the same {len(examples)} examples made a batch with other {', '.join(different)}; draw no random "
                    "numbers in collate, and keep nothing between two calls"
                )


@SUITE.clause(
    "A batch has the loss of its examples one by one, as the model's own forward gives it.",
    needs=["batches-every-example", "counts-what-it-holds"],
)
def changes_no_loss(case: _Case) -> None:
    for c in case.comparisons:
        if not abs(c.together - c.alone) <= _TOLERANCE * abs(c.alone):
            raise ClauseError(
                f"{c} has a loss of {c.together:.6g}, its examples one by one {c.alone:.6g}; check that labels_BT[b, "
                "t] is the token after t, that the last of each document is IGNORE_INDEX and nothing is masked by its "
                "id, that token_weights_BT are shifted like labels, and that no document sees another"
            )


@SUITE.clause(
    "A batch has the gradient of its examples one by one, in all parameters of the model.", needs=["changes-no-loss"]
)
def changes_no_gradient(case: _Case) -> None:
    for c in case.comparisons:
        if not c.gradient_difference <= _TOLERANCE:
            raise ClauseError(
                f"{c} has a gradient that is off by {c.gradient_difference:.1e} of its norm from its examples one by "
                "one, though its loss is right; check which weight and label each token has"
            )


def check_collator(plugin: object, *, model: Path | None = None) -> None:
    """Holds the plugin's collator against each clause. Raises ContractError, naming those that it breaks.

    `model`: a directory with a model and tokenizer to check with, instead of the tiny one.
    """
    SUITE.check(plugin, model=model)


def _documents(batch: Batch) -> Iterator[slice]:
    """Where each document stands in the flattened batch."""
    if batch.lengths_B is not None:
        T = batch.input_ids_BT.shape[1]
        yield from (slice(b * T, b * T + length) for b, length in enumerate(batch.lengths_B.tolist()))
    elif batch.cu_seqlens is not None:
        yield from (slice(*borders) for borders in itertools.pairwise(batch.cu_seqlens.tolist()))


def _take_out(documents: Counter[tuple[int, ...]], ids: tuple[int, ...]) -> bool:
    documents[ids] -= 1
    return documents[ids] >= 0


def _same_randomness(before: dict[str, object], what: str) -> None:
    changed = [name for name, state in random_states().items() if state != before[name]]
    if changed:
        raise ClauseError(f"{what} drew from {', '.join(changed)}, which others draw from; use a generator of its own")


def _loss_of_batch(lm: CausalLM, batch: Batch) -> Tensor:
    logits_BTV = lm.logits(lm.hidden(batch).hidden_BTD)
    loss_N = functional.cross_entropy(
        logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return (loss_N if batch.token_weights_BT is None else loss_N * batch.token_weights_BT.flatten()).sum()


def _loss_of_example(lm: CausalLM, example: Example) -> Tensor:
    """By transformers' own forward, without a batch: token t is predicted from what is before it."""
    ids_T = torch.tensor(example.token_ids, device=lm.device)
    logits_TV = lm.model(input_ids=ids_T[None], use_cache=False).logits[0]
    weights_T = torch.tensor(example.weights or [1.0] * len(ids_T)) * torch.tensor(example.loss_mask)
    return (functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none") * weights_T[1:].to(lm.device)).sum()
