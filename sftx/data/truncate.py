"""Truncate rows of more than `data.max_length` tokens, by the policy that `data.long_rows` names.

Every policy returns the indices of the tokens that it keeps. None of them trains a stop token in a place where the
text did not stop: when the end of an answer is cut off, its stop token is cut off with it.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sftx.config.options import DataConfig
from sftx.types import Conversation, Message, Parsed

LabelledTokens: TypeAlias = tuple[list[int], list[bool], list[float]]
"""Token ids, loss mask and loss weights of one unit (a conversation, a text or a row of tokens)."""


class Truncated(NamedTuple):
    """A unit with too many tokens becomes these examples, given as indices into its tokens."""

    unit: Parsed
    """The given unit; with `cut_oldest`, the same conversation without its oldest turns."""
    labelled: LabelledTokens
    """All tokens of `unit`."""
    kept: list[NDArray[np.int64]]
    """For each example, the ascending indices of its tokens. Empty when the unit is dropped."""


def fit(
    unit: Parsed,
    labelled: LabelledTokens,
    config: DataConfig,
    is_control: Callable[[int], bool],
    encode: Callable[[Parsed], LabelledTokens],
) -> Truncated:
    """Cut `unit`, whose tokens are `labelled`, into examples of at most `config.max_length` tokens.

    An example without a trained token is left out. `encode` encodes the shorter conversations of `cut_oldest`.
    """
    limit = config.max_length
    if config.long_rows == "cut_oldest" and isinstance(unit, Conversation):
        found = _newest_turns(unit, len(labelled[0]), limit, encode)
        if found is None:
            return Truncated(unit, labelled, [])
        shorter, tokens = found
        return Truncated(shorter, tokens, [np.arange(len(tokens[0]))] if any(tokens[1][1:]) else [])

    token_ids, loss_mask = labelled[0], np.asarray(labelled[1], np.bool_)
    indices = np.arange(len(token_ids))
    match config.long_rows:
        case "cut_end" | "cut_oldest":  # text and tokens have no turns, so the end is cut
            examples = [indices[:limit]]
        case "cut_proportional":
            examples = [_cut_proportional(loss_mask, np.array([is_control(t) for t in token_ids]), limit)]
        case "split":
            examples = [indices[start : start + limit] for start in range(0, len(indices), limit)]
        case _:
            examples = []
    return Truncated(unit, labelled, [kept for kept in examples if loss_mask[kept[1:]].any()])


def _newest_turns(
    unit: Conversation, num_tokens: int, limit: int, encode: Callable[[Parsed], LabelledTokens]
) -> tuple[Conversation, LabelledTokens] | None:
    """Return all system messages and as many of the newest turns as fit, beginning with a user's turn, or None.

    Fewer turns have fewer tokens in every template, so a search finds the first window that fits. It begins where the
    share of characters says that the window ends, which is mostly right or one off: two windows are encoded.
    """
    system = tuple(m for m in unit.messages if m.role == "system")
    turns = tuple(m for m in unit.messages if m.role != "system")
    starts = [n for n, turn in enumerate(turns) if n and turn.role == "user"]
    if not starts:
        return None
    to_end = list(itertools.accumulate(map(_num_chars, reversed(turns)), initial=0))[::-1]
    always = sum(map(_num_chars, system)) + sum(len(str(tool)) for tool in unit.tools)
    num_chars = limit * (always + to_end[0]) / num_tokens - always
    guess = bisect.bisect_left(starts, -num_chars, key=lambda start: -to_end[start])
    too_long, fitting, step = -1, len(starts), 1
    found = None
    while fitting - too_long > 1:
        guess = min(max(guess, too_long + 1), fitting - 1)
        shorter = dataclasses.replace(unit, messages=(*system, *turns[starts[guess] :]))
        tokens = encode(shorter)
        if len(tokens[0]) <= limit:
            fitting, found = guess, (shorter, tokens)
            guess -= step
        else:
            too_long = guess
            guess += step
        if too_long >= 0 and fitting < len(starts):
            guess = (too_long + fitting) // 2
        step *= 2
    return found


def _num_chars(message: Message) -> int:
    """Return the length of a turn in characters, with some for its markup."""
    calls = sum(len(str(call.arguments)) for call in message.tool_calls)
    return len(message.content) + len(message.reasoning) + calls + 20


def infer_lengths(prompt: int, answer: int, limit: int) -> tuple[int, int]:
    """Return how many tokens of a prompt and of its answer are kept: LLaMA-Factory's function `infer_seqlen`.

    A side that needs less than half of `limit` is kept whole as far as the other side allows. Otherwise both shrink in
    proportion to their lengths.
    """
    if answer * 2 < limit:
        max_answer = limit
    elif prompt * 2 < limit:
        max_answer = limit - prompt
    else:
        max_answer = int(limit * (answer / (prompt + answer)))
    answer = min(max_answer, answer)
    return min(max(limit - answer, 0), prompt), answer


def _cut_proportional(loss_mask: NDArray[np.bool_], is_control: NDArray[np.bool_], limit: int) -> NDArray[np.int64]:
    """Apply `infer_lengths` to each prompt and its answer in the room that the earlier ones left.

    LLaMA-Factory cuts the end of a prompt, and with it the tokens that open the answer. Here the end of the prompt's
    longest plain text is cut, then that of the next longest, so that control tokens are kept as long as there is
    other text to cut.
    """
    kept: list[NDArray[np.int64]] = []
    room = limit
    runs = _runs(np.arange(len(loss_mask)), loss_mask)
    nothing = runs[0][:0]
    if loss_mask[0]:
        runs.insert(0, nothing)  # the row begins with an answer that has no prompt
    for prompt, answer in zip(runs[::2], [*runs[1::2], nothing], strict=False):
        if room <= 0:
            break
        num_prompt, num_answer = infer_lengths(len(prompt), len(answer), room)
        surplus = len(prompt) - num_prompt
        parts = _runs(prompt, is_control[prompt])
        # Cut the longest plain run first, and control tokens last of all.
        for n in sorted(range(len(parts)), key=lambda n: (is_control[parts[n][:1]].any(), -len(parts[n]))):
            cut = min(surplus, len(parts[n]))
            parts[n] = parts[n][: len(parts[n]) - cut]
            surplus -= cut
        kept += [*parts, answer[:num_answer]]
        room -= num_prompt + num_answer
    return np.concatenate(kept)


def _runs(indices: NDArray[np.int64], flags: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Split `indices` wherever the flag changes from one to the next."""
    return np.split(indices, np.flatnonzero(flags[1:] != flags[:-1]) + 1)
