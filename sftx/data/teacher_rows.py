"""Rows with the most likely tokens of a teacher, which the plugin `distill` trains a student on.

Dimensions: B rows, T tokens, M label tokens, K tokens that are kept of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import torch

from sftx.data.collate import pad
from sftx.types import IGNORE_INDEX, Batch, Example

if TYPE_CHECKING:
    from sftx.model.language_model import CausalLM

_CHUNK_ROWS: Final = 256
"""Tokens whose logits exist at once."""
_DIGITS: Final = 5
"""Decimal places of a log-probability: finer than what the teacher's own dtype tells apart."""


@torch.no_grad()
def teacher_rows(
    lm: CausalLM,
    examples: Sequence[Example],
    *,
    top_k: int,
    temperature: float,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Iterator[dict[str, Any]]:
    """Yield a row for each example, in their order: its token ids and labels, and what the teacher says of the labels.

    Args:
        lm: the teacher, in eval mode.
        top_k: how many of the most likely tokens are kept for each label; at most the vocabulary.
        temperature: divides the logits.
        batch_size: examples that are computed at once.
        autocast: a function that returns the context of a forward pass.
    """
    for start in range(0, len(examples), batch_size):
        chosen = [examples[number] for number in range(start, min(start + batch_size, len(examples)))]
        batch = pad(chosen).to(lm.device)
        with autocast():
            log_probs, ids = _top_k(lm, batch, top_k, temperature)
        numbers = count()
        for example in chosen:
            trained = [t > 0 and bool(is_trained) for t, is_trained in enumerate(example.loss_mask)]
            places = [next(numbers) if is_trained else None for is_trained in trained]
            token_ids = example.token_ids.tolist()
            yield {
                "input_ids": token_ids,
                "labels": [token if one else IGNORE_INDEX for token, one in zip(token_ids, trained, strict=True)],
                "teacher_ids": [[] if place is None else ids[place] for place in places],
                "teacher_log_probs": [[] if place is None else log_probs[place] for place in places],
                "teacher_temperature": temperature,
            }


def _top_k(lm: CausalLM, batch: Batch, top_k: int, temperature: float) -> tuple[list[list[float]], list[list[int]]]:
    """Return log-probabilities and ids of the most likely tokens, a list for each label of the batch, in order."""
    hidden_MD = lm.hidden(batch).hidden_BTD[batch.labels_BT != IGNORE_INDEX]
    log_probs: list[list[float]] = []
    ids: list[list[int]] = []
    for hidden_CD in hidden_MD.split(_CHUNK_ROWS):
        logits_CV = lm.logits(hidden_CD[None])[0].float() / temperature
        top = logits_CV.log_softmax(1).topk(min(top_k, logits_CV.shape[1]))
        log_probs += [[round(value, _DIGITS) for value in row] for row in top.values.tolist()]
        ids += top.indices.tolist()
    return log_probs, ids
