"""From examples to the positions of a batch and back: `per_label` and `sum_by_example`, and the examples of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch

from sftx import IGNORE_INDEX, Batch, Example, PluginError, pack, pad, per_label, sum_by_example
from sftx.assembly.stages.data_stages import CollatorStage
from sftx.assembly.stages.loss_stage import LossStage
from sftx_plugins.collators.padded import Padded


def example(number: int, length: int, num_trained: int) -> Example:
    """Return an example whose last tokens are trained; its ids tell its number and the place of each token."""
    mask = [False] * (length - num_trained) + [True] * num_trained
    return Example([100 * number + t for t in range(length)], mask, f"row {number}", number)  # type: ignore[arg-type]


EXAMPLES = (example(1, 5, 3), example(2, 2, 1), example(3, 7, 0), example(4, 4, 4))
LAYOUTS: dict[str, Callable[[Sequence[Example]], Batch]] = {
    "padded": pad,
    "padded to 8": lambda examples: pad(examples, multiple_of=8),
    "packed": pack,
}


@pytest.fixture(params=LAYOUTS)
def batch(request: pytest.FixtureRequest) -> Batch:
    return LAYOUTS[request.param](EXAMPLES)


def test_a_batch_has_its_examples(batch: Batch) -> None:
    assert batch.examples == EXAMPLES
    assert batch.to(torch.device("cpu")).examples == EXAMPLES


def test_a_number_of_each_token_is_where_the_token_is_the_label(batch: Batch) -> None:
    # The number of a token is its id, so that the layout must be that of the labels themselves.
    laid_out_BT = per_label(batch, [example.token_ids for example in EXAMPLES])
    assert laid_out_BT.dtype == torch.float32
    assert torch.equal(laid_out_BT, batch.labels_BT.clamp(min=0).float())


def test_sums_are_those_of_the_label_tokens_and_nothing_else(batch: Batch) -> None:
    values_BT = per_label(batch, [example.token_ids for example in EXAMPLES])
    expected = [102 + 103 + 104, 201, 0, 401 + 402 + 403]  # the first token of an example is never a label
    hidden_BT = values_BT.masked_fill(batch.labels_BT == IGNORE_INDEX, torch.nan).requires_grad_()
    for values in (hidden_BT, hidden_BT.flatten()):
        assert sum_by_example(batch, values).tolist() == expected
    factors_E = torch.tensor([2.0, 3.0, 5.0, 7.0])
    (gradient_BT,) = torch.autograd.grad((sum_by_example(batch, hidden_BT) * factors_E).sum(), hidden_BT)
    factors = zip(EXAMPLES, factors_E.tolist(), strict=True)
    of_each_BT = per_label(batch, [[factor] * len(example.token_ids) for example, factor in factors])
    assert torch.equal(gradient_BT, of_each_BT)


def test_sums_are_bit_identical_in_every_layout() -> None:
    numbers = [torch.randn(len(example.token_ids)).tolist() for example in EXAMPLES]
    sums = []
    for layout in LAYOUTS.values():
        batch = layout(EXAMPLES)
        sums.append(sum_by_example(batch, per_label(batch, numbers)))
    assert all(torch.equal(one, sums[0]) for one in sums)


def test_what_does_not_fit_the_examples_is_refused(batch: Batch) -> None:
    numbers = [[0.0] * len(example.token_ids) for example in EXAMPLES]
    with pytest.raises(PluginError, match="3 sequences for a batch of 4 examples"):
        per_label(batch, numbers[:3])
    with pytest.raises(PluginError, match="row 2: per_label got 3 numbers for 2 tokens"):
        per_label(batch, [numbers[0], [0.0] * 3, *numbers[2:]])
    longer = dataclasses.replace(batch, examples=(example(1, 4, 3), *EXAMPLES[1:]))
    with pytest.raises(PluginError, match="row 1: has 4 tokens and 5 positions"):
        per_label(longer, [numbers[3], *numbers[1:]])
    merged = dataclasses.replace(batch, row_ids=batch.row_ids[:3])
    with pytest.raises(PluginError, match="3 examples and 4 rows or documents"):
        sum_by_example(merged, torch.zeros(batch.input_ids_BT.shape))


class Own(Padded):
    """A collator that makes its batches itself: in another order, and without examples."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        return dataclasses.replace(pad(examples[::-1]), examples=())


class OutOfOrder(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        return dataclasses.replace(pad(examples), examples=tuple(examples[::-1]))


def test_a_run_fills_in_the_examples_that_a_collator_leaves_out() -> None:
    twice = dataclasses.replace(EXAMPLES[0], group=7)  # one record that is read twice
    batch = CollatorStage("own", Own()).collate([*EXAMPLES, twice])
    assert [e.row_id for e in batch.examples] == list(batch.row_ids)
    assert {e.group for e in batch.examples} == {1, 2, 3, 4, 7}
    with pytest.raises(PluginError, match=r"out: collate gave the examples .* for the row_ids"):
        CollatorStage("out", OutOfOrder()).collate(EXAMPLES)


class WithExtras:
    def __init__(self, made: object) -> None:
        self._made = made

    def denominator(self, batch: Batch) -> float:
        return 1.0

    def extras(self, batch: Batch) -> object:
        return self._made

    def __call__(self, *_: object) -> object:
        raise AssertionError


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "extras returned NoneType, expected a dict"),
        ({"a": 1}, r"extras\['a'\] is int, expected a tensor"),
        ({3: torch.zeros(1)}, r"extras\[3\]"),
        ({"own": torch.zeros(1)}, "extras has the name 'own', which batch.extras has already"),
    ],
)
def test_extras_of_a_loss_are_checked(made: object, message: str) -> None:
    batch = pad(EXAMPLES)
    batch.extras["own"] = torch.zeros(1)
    with pytest.raises(PluginError, match=f"the loss: {message}"):
        LossStage("the loss", WithExtras(made)).with_extras(batch)  # type: ignore[arg-type]
    more = LossStage("the loss", WithExtras({"new": torch.ones(1)})).with_extras(batch)  # type: ignore[arg-type]
    assert sorted(more.extras) == ["new", "own"]
    assert sorted(batch.extras) == ["own"]
