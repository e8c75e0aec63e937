"""What the report of a run shows and no other file of its directory holds: `evidence.json`.

Some training rows token by token, with their masks; and the loss of each token of one held-out row, before training
and after it. Text and numbers only: nothing here needs the model or its tokenizer to be read again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sftx.data.collate import pad
from sftx.events import TokenLosses
from sftx.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftx.data.dataset import Examples
    from sftx.model.language_model import LanguageModel

FILE: Final = "evidence.json"

_MOST_SHOWN: Final = 400
"""Tokens of a training row."""
_LEAD: Final = 100
"""Tokens that are shown before the first trained one, where not all of a long row is."""
_SHORTEST, _LONGEST = 32, 256
"""Tokens of a held-out row that can be taken in at one look."""
_LONGEST_CHARACTER: Final = 8
"""Tokens that may make one character together."""


def shown_rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, count: int = 5) -> list[dict[str, Any]]:
    """JSON values of `count` examples at equal distances, or of all where there are fewer.

    `row`: its id; `tokens`: text and 1 where it is trained, else 0; `left_out`: how many tokens before and after these
    are not shown.
    """
    count = min(count, len(examples))
    return [_shown(examples[n * len(examples) // count], tokenizer) for n in range(count)]


def _shown(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    length = len(example.token_ids)
    first = next((n for n, trained in enumerate(example.loss_mask.tolist()) if trained), 0)
    # What is trained is the point of the picture: a long prompt is shown from near its end.
    begin = min(max(0, first - _LEAD), max(0, length - _MOST_SHOWN)) if first >= _MOST_SHOWN - _LEAD else 0
    end = min(length, begin + _MOST_SHOWN)
    shown = token_texts(example.token_ids[begin:end].tolist(), tokenizer)
    return {
        "row": example.row_id,
        "tokens": [[text, int(mask)] for text, mask in zip(shown, example.loss_mask[begin:end].tolist(), strict=True)],
        "left_out": [begin, length - end],
    }


def choose_row(examples: Examples) -> Example | None:
    """The first example of a length that is read at one look, or else the nearest to it, cut; None if there is none."""
    if not len(examples):
        return None
    away = [max(_SHORTEST - length, length - _LONGEST, 0) for length in examples.lengths.tolist()]
    example = examples[away.index(min(away))]
    return dataclasses.replace(
        example,
        token_ids=example.token_ids[:_LONGEST],
        loss_mask=example.loss_mask[:_LONGEST],
        weights=None if example.weights is None else example.weights[:_LONGEST],
    )


def token_losses(lm: LanguageModel, example: Example) -> TokenLosses:
    """The negative log-likelihood of every token of the row, trained or not, in nats; one forward.

    Gradients, dropout and autocast are the caller's to choose.
    """
    everything = dataclasses.replace(example, loss_mask=np.ones(len(example.token_ids), np.bool_), weights=None)
    batch = pad([everything]).to(lm.device)
    hidden_BTD = lm.hidden(batch).hidden_BTD
    out = lm.cross_entropy(hidden_BTD, batch.labels_BT, num_valid=batch.num_label_tokens, reduction="none")
    of_next_N: list[float] = out.loss.tolist()  # at each position the loss of the token after it
    return TokenLosses(
        row_id=example.row_id,
        tokens=tuple(token_texts(example.token_ids.tolist(), lm.tokenizer)),
        losses=(None, *of_next_N[:-1]),
        trained=tuple(example.loss_mask.tolist()),
    )


def as_evidence(
    rows: Sequence[dict[str, Any]], before: TokenLosses | None, after: TokenLosses | None
) -> dict[str, Any]:
    """JSON values for `evidence.json`. `after` is null where it is missing or of another row."""
    if before is None:
        return {"rows": list(rows), "token_losses": None}
    same = after is not None and (after.row_id, after.tokens) == (before.row_id, before.tokens)
    losses = {
        "row": before.row_id,
        "tokens": list(before.tokens),
        "trained": [int(trained) for trained in before.trained],
        "before": list(map(_finite, before.losses)),
        "after": list(map(_finite, after.losses)) if after is not None and same else None,
    }
    return {"rows": list(rows), "token_losses": losses}


def _finite(value: float | None) -> float | None:
    """JSON has no other numbers."""
    return value if value is not None and math.isfinite(value) else None


def token_texts(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token; of those that make one character together, the first has it and the others nothing.

    Decoded with the token before it, since some tokenizers leave out the space that a text begins with.
    """
    texts: list[str] = []
    for begin, end, text in _characters(token_ids, tokenizer):
        texts += [text, *[""] * (end - begin - 1)]
    return texts


def _characters(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int, str]]:
    """Spans of tokens that are whole characters, and their text."""

    def text_of(begin: int, end: int) -> str:
        ids = list(token_ids[begin:end])
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before, begin = 0, 0
    for end in range(1, len(token_ids) + 1):
        known, text = text_of(before, begin), text_of(before, end)
        is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        if is_whole or end - begin == _LONGEST_CHARACTER or end == len(token_ids):
            yield begin, end, text[len(known) :]
            before, begin = begin, end
