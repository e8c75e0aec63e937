"""Control tokens that a template needs and a tokenizer lacks are added, and the model gets rows for them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def add_missing(controls: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Adds those of `controls` that are no tokens yet, as special tokens in sorted order, and returns them."""
    vocabulary = tokenizer.get_vocab()
    missing = sorted(token for token in set(controls) if token not in vocabulary)
    tokenizer.add_tokens(missing, special_tokens=True)
    return missing


def ids_of(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of added tokens, in ascending order: what `ModelSpec.new_token_ids` holds."""
    return tuple(sorted(tokenizer.get_vocab()[token] for token in tokens))


def make_room(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Gives the embedding, and a head of its own, rows up to the largest id.

    Rows that the checkpoint has to spare are used as they are. Those that are added are drawn around the mean of the
    others (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html), always the same.
    """
    rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
    needed = max(token_ids, default=-1) + 1
    if needed <= rows:
        return
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)  # what it says of the new rows is said above
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model.resize_token_embeddings(needed)
    finally:
        transformers_logging.set_verbosity(verbosity)
    log.info("the embedding has grown from %d to %d rows, for added tokens", rows, needed)
