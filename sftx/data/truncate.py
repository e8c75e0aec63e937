"""An example of more than `max_length` tokens becomes one that fits, or several, or none.

No policy ever trains a stop token where the text did not stop: what is cut off takes its stop token with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import groupby
from typing import TypeAlias

from sftx.config.options import DataConfig
from sftx.types import Conversation, Parsed

Piece: TypeAlias = tuple[list[int], list[bool], list[float]]
"""Token ids, loss mask and loss weights of one example."""


def fit(
    unit: Parsed, whole: Piece, config: DataConfig, is_control: Callable[[int], bool], encode: Callable[[Parsed], Piece]
) -> list[Piece]:
    """What is left of `whole`, the encoding of `unit`, in pieces of at most `config.max_length` tokens.

    Empty when the policy is to drop it, or when nothing that is left would be trained.
    """
    limit = config.max_length
    match config.long_rows:
        case "cut_end":
            pieces = [_part(whole, 0, limit)]
        case "cut_oldest":
            pieces = [_without_oldest(unit, limit, encode)]
        case "cut_proportional":
            pieces = [_proportional(whole, limit, is_control)]
        case "split":
            pieces = [_part(whole, at, at + limit) for at in range(0, len(whole[0]), limit)]
        case _:
            pieces = []
    return [piece for piece in pieces if any(piece[1][1:])]


def _part(piece: Piece, start: int, end: int) -> Piece:
    token_ids, loss_mask, weights = piece
    return token_ids[start:end], loss_mask[start:end], weights[start:end]


def _without_oldest(unit: Parsed, limit: int, encode: Callable[[Parsed], Piece]) -> Piece:
    """The newest turns that fit, from a user's turn on, after the system's text; nothing when even the last do not."""
    if not isinstance(unit, Conversation):
        return _part(encode(unit), 0, limit)
    system = [m for m in unit.messages if m.role == "system"]
    turns = [m for m in unit.messages if m.role != "system"]
    for start in (n for n, turn in enumerate(turns) if n and turn.role == "user"):
        shorter = encode(dataclasses.replace(unit, messages=(*system, *turns[start:])))
        if len(shorter[0]) <= limit:
            return shorter
    return [], [], []


def infer_lengths(prompt: int, answer: int, limit: int) -> tuple[int, int]:
    """How many tokens of a prompt and its answer are kept within `limit`: the rule of LLaMA-Factory's infer_seqlen.

    A side that takes less than half is kept whole as far as the other allows; else both shrink in proportion.
    """
    if answer * 2 < limit:
        most = limit
    elif prompt * 2 < limit:
        most = limit - prompt
    else:
        most = int(limit * (answer / (prompt + answer)))
    answer = min(most, answer)
    return min(max(limit - answer, 0), prompt), answer


def _proportional(whole: Piece, limit: int, is_control: Callable[[int], bool]) -> Piece:
    """Each prompt and its answer by `infer_lengths` in what the earlier ones left; what no longer fits is left out.

    LLaMA-Factory cuts the end of a prompt, and with it what opens the answer. Here the end of its longest plain text
    is cut, then that of the next longest, so that control tokens stay where they are as long as there is other text.
    """
    kept: list[int] = []
    runs = [list(run) for _, run in groupby(range(len(whole[0])), key=lambda at: whole[1][at])]
    if whole[1][0]:
        runs.insert(0, [])  # an answer without a prompt
    for prompt, answer in zip(runs[::2], [*runs[1::2], []], strict=False):
        room = limit - len(kept)
        if room <= 0:
            break
        num_prompt, num_answer = infer_lengths(len(prompt), len(answer), room)
        chosen = _shortened(prompt, num_prompt, lambda at: is_control(whole[0][at])) + answer[:num_answer]
        kept.extend(chosen)
    token_ids, loss_mask, weights = whole
    return [token_ids[at] for at in kept], [loss_mask[at] for at in kept], [weights[at] for at in kept]


def _shortened(places: list[int], num: int, is_control: Callable[[int], bool]) -> list[int]:
    """`num` of the places: the ends of the longest plain runs are left out, control tokens last of all."""
    runs = [(control, list(run)) for control, run in groupby(places, key=is_control)]
    surplus = len(places) - num
    for _, run in sorted(runs, key=lambda item: (item[0], -len(item[1]))):
        cut = min(surplus, len(run))
        del run[len(run) - cut :]
        surplus -= cut
    return [at for _, run in runs for at in run]
