"""The rows of a step become the micro-batches of each process, with as equal numbers of tokens as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence

Share = tuple[int, ...]
"""Positions of rows in a step: one micro-batch. Empty where rows run out: that process has nothing to add."""


def size(num_rows: int, num_ranks: int, rows_at_once: int) -> tuple[int, int]:
    """Rounds of a step, and the most rows that a process has in one of them."""
    num_rounds = math.ceil(num_rows / (num_ranks * rows_at_once))
    return num_rounds, math.ceil(num_rows / (num_ranks * num_rounds))


def deal(num_tokens: Sequence[int], num_ranks: int, rows_at_once: int) -> list[list[Share]]:
    """Rounds of micro-batches, one for each rank, of at most `rows_at_once` rows: `deal(...)[round][rank]`.

    `num_tokens`: of each row of the step, in its order. One process alone takes the rows as they come. Several take
    rows of similar length in one round, so that none waits long for another, and over the whole step as equal numbers
    of tokens as rounds of equal numbers of rows allow: each row, longest first, goes to the rank with the fewest.
    """
    rows = range(len(num_tokens))
    if num_ranks == 1:
        return [[tuple(rows[at : at + rows_at_once])] for at in range(0, len(rows), rows_at_once)]
    longest_first = sorted(rows, key=lambda row: -num_tokens[row])
    totals = [0] * num_ranks
    per_round = num_ranks * size(len(rows), num_ranks, rows_at_once)[1]
    rounds: list[list[Share]] = []
    for start in range(0, len(rows), per_round):
        chosen = longest_first[start : start + per_round]
        most = math.ceil(len(chosen) / num_ranks)
        shares: list[list[int]] = [[] for _ in range(num_ranks)]
        for row in chosen:
            open_ranks = [rank for rank in range(num_ranks) if len(shares[rank]) < most]
            rank = min(open_ranks, key=lambda rank: (totals[rank], rank))
            shares[rank].append(row)
            totals[rank] += num_tokens[row]
        rounds.append([tuple(sorted(share)) for share in shares])
    return rounds
