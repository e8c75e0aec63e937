"""How a step's rows are dealt out to the processes that share it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sftx.data.sampler import split_step

LENGTHS = st.lists(st.integers(1, 4096), min_size=1, max_size=64)
RANKS = st.integers(1, 8)
ROWS_AT_ONCE = st.integers(1, 8)


def totals(lengths: list[int], num_ranks: int, rows_at_once: int) -> list[int]:
    """Tokens of each rank over the step."""
    rounds = split_step(lengths, num_ranks, rows_at_once)
    return [sum(lengths[row] for shares in rounds for row in shares[rank]) for rank in range(num_ranks)]


@given(LENGTHS, RANKS, ROWS_AT_ONCE)
def test_every_row_is_dealt_once_and_a_micro_batch_holds_no_more_rows_than_it_may(
    lengths: list[int], num_ranks: int, rows_at_once: int
) -> None:
    rounds = split_step(lengths, num_ranks, rows_at_once)
    assert sorted(row for shares in rounds for share in shares for row in share) == list(range(len(lengths)))
    assert all(len(shares) == num_ranks for shares in rounds)
    assert all(len(share) <= rows_at_once for shares in rounds for share in shares)


@given(LENGTHS, RANKS, ROWS_AT_ONCE)
def test_no_more_rounds_than_the_rows_need(lengths: list[int], num_ranks: int, rows_at_once: int) -> None:
    assert len(split_step(lengths, num_ranks, rows_at_once)) == -(-len(lengths) // (num_ranks * rows_at_once))


@given(LENGTHS, RANKS, ROWS_AT_ONCE)
def test_no_rank_computes_more_than_one_longest_row_more_than_another(
    lengths: list[int], num_ranks: int, rows_at_once: int
) -> None:
    num_tokens = totals(lengths, num_ranks, rows_at_once)
    assert max(num_tokens) - min(num_tokens) <= max(lengths) or num_ranks == 1


@given(st.data(), RANKS, ROWS_AT_ONCE)
def test_ranks_have_equal_numbers_of_rows_of_a_whole_step(
    data: st.DataObject, num_ranks: int, rows_at_once: int
) -> None:
    num_rows = num_ranks * data.draw(st.integers(1, 12))
    lengths = data.draw(st.lists(st.integers(1, 4096), min_size=num_rows, max_size=num_rows))
    rounds = split_step(lengths, num_ranks, rows_at_once)
    numbers = [sum(len(shares[rank]) for shares in rounds) for rank in range(num_ranks)]
    assert numbers == [num_rows // num_ranks] * num_ranks


@given(LENGTHS, ROWS_AT_ONCE)
def test_one_process_takes_the_rows_as_they_come(lengths: list[int], rows_at_once: int) -> None:
    assert [row for shares in split_step(lengths, 1, rows_at_once) for row in shares[0]] == list(range(len(lengths)))


def test_few_long_rows_among_short_ones_are_shared_out() -> None:
    """By the order of rows one rank would have 2002 tokens and the other 20."""
    assert totals([1000, 1000, 1, 1, 5, 5, 5, 5], 2, 4) == [1011, 1011]
