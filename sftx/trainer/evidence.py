"""The content of `evidence.json`, a file of a run directory that only the run report reads.

It holds some training rows token by token with their loss masks, and the loss of every token of one held-out row before
and after training. It holds text and numbers only, so that a report needs neither model nor tokenizer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from sftx.data.collate import pad
from sftx.data.token_text import token_texts
from sftx.events import TokenLosses
from sftx.types import Batch, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftx.data.dataset import Examples
    from sftx.model.language_model import CausalLM

_MAX_SHOWN: Final = 400
"""At most so many tokens of a training row are kept."""
_LEAD: Final = 100
"""So many tokens before the first label token are kept when a long row is cut."""
_MIN_LENGTH, _MAX_LENGTH = 32, 256
"""The preferred number of tokens of the held-out row: a reader sees it at a glance."""


def shown_rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, count: int = 5) -> list[dict[str, Any]]:
    """Return `count` evenly spaced examples, or all if there are fewer, as JSON values.

    `row` is the row's id, `tokens` are pairs of a text and 1 for a label token or 0, and `left_out` counts the tokens
    before and after these that are omitted.
    """
    count = min(count, len(examples))
    rows = []
    for example in (examples[n * len(examples) // count] for n in range(count)):
        token_ids, loss_mask = example.token_ids.tolist(), example.loss_mask.tolist()
        length = len(token_ids)
        first_label = loss_mask.index(True) if True in loss_mask else 0
        # A reader wants to see the labels: a long prompt is shown from near its end.
        begin = (
            min(max(0, first_label - _LEAD), max(0, length - _MAX_SHOWN)) if first_label >= _MAX_SHOWN - _LEAD else 0
        )
        end = min(length, begin + _MAX_SHOWN)
        texts = token_texts(token_ids[begin:end], tokenizer)
        tokens = [[text, int(is_label)] for text, is_label in zip(texts, loss_mask[begin:end], strict=True)]
        rows.append({"row": example.row_id, "tokens": tokens, "left_out": [begin, length - end]})
    return rows


def choose_row(examples: Examples, *, cut: bool = True) -> Example | None:
    """Return the first example of a readable length, or else the nearest to it; None if there is none.

    `cut` shortens it to a readable length, which would part extras from the tokens that stand for them.
    """
    if not len(examples):
        return None
    distances = [max(_MIN_LENGTH - length, length - _MAX_LENGTH, 0) for length in examples.lengths.tolist()]
    example = examples[distances.index(min(distances))]
    if not cut:
        return example
    return dataclasses.replace(
        example,
        token_ids=example.token_ids[:_MAX_LENGTH],
        loss_mask=example.loss_mask[:_MAX_LENGTH],
        weights=None if example.weights is None else example.weights[:_MAX_LENGTH],
    )


def token_losses(lm: CausalLM, example: Example, collate: Callable[[Sequence[Example]], Batch] = pad) -> TokenLosses:
    """Return the negative log-likelihood, in nats, of every token of the row, label or not, from one forward pass.

    The caller decides about gradients, dropout and autocast; `collate` makes the extras that adapters embed.
    """
    import numpy as np  # not above: the commands that read evidence need no numpy

    all_labels = dataclasses.replace(example, loss_mask=np.ones(len(example.token_ids), np.bool_), weights=None)
    batch = collate([all_labels]).to(lm.device)
    hidden_BTD = lm.hidden(batch).hidden_BTD
    out = lm.cross_entropy(hidden_BTD, batch.labels_BT, num_valid=batch.num_label_tokens, reduction="none")
    losses: list[float] = out.loss.tolist()[: len(example.token_ids)]  # at each position the loss of the token after it
    return TokenLosses(
        row_id=example.row_id,
        tokens=tuple(token_texts(example.token_ids.tolist(), lm.tokenizer)),
        losses=(None, *losses[:-1]),
        trained=tuple(example.loss_mask.tolist()),
    )


def as_evidence(
    rows: Sequence[dict[str, Any]], before: TokenLosses | None, after: TokenLosses | None
) -> dict[str, Any]:
    """Return the JSON values of `evidence.json`. `after` becomes null when it is missing or about another row."""
    if before is None:
        return {"rows": list(rows), "token_losses": None}
    is_same_row = after is not None and (after.row_id, after.tokens) == (before.row_id, before.tokens)
    losses = {
        "row": before.row_id,
        "tokens": list(before.tokens),
        "trained": [int(is_label) for is_label in before.trained],
        "before": list(map(_finite, before.losses)),
        "after": list(map(_finite, after.losses)) if after is not None and is_same_row else None,
    }
    return {"rows": list(rows), "token_losses": losses}


def _finite(value: float | None) -> float | None:
    """Return None for NaN and infinities, which JSON lacks."""
    return value if value is not None and math.isfinite(value) else None
