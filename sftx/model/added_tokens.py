"""Adds the control tokens that a template needs and a tokenizer lacks, and embedding rows for them to the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from sftx.model.library_messages import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sftx.types import LanguageModel

log = logging.getLogger(__name__)


def add_missing(controls: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Adds those control tokens that the vocabulary lacks, as special tokens in sorted order, and returns them."""
    vocabulary = tokenizer.get_vocab()
    missing = sorted(token for token in set(controls) if token not in vocabulary)
    tokenizer.add_tokens(missing, special_tokens=True)
    return missing


def ids_of(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids of added tokens in ascending order, as `ModelSpec.new_token_ids` holds them."""
    vocabulary = tokenizer.get_vocab()
    return tuple(sorted(vocabulary[token] for token in tokens))


def untrained_rows(lm: LanguageModel, token_ids: Sequence[int]) -> list[str]:
    """Returns which of the embedding and the output head do not train the rows of these tokens."""
    embedding, ids = cast(Any, lm.model.get_input_embeddings()), torch.tensor(token_ids, device=lm.device)
    with torch.enable_grad():
        trains = {"embedding": embedding(ids).requires_grad, "output head": lm.head_weight.requires_grad}
    return [name for name, does in trains.items() if not does]


def grow_embeddings(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Grows the embedding, and an untied head, until the largest of the ids has a row.

    Rows that the checkpoint has beyond its vocabulary are used as they are. New rows are drawn around the mean of the
    others (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html) with a fixed seed.
    """
    num_rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
    num_needed = max(token_ids, default=-1) + 1
    if num_needed <= num_rows:
        return
    with quiet(), torch.random.fork_rng(devices=[]):  # its notes on the new rows repeat the docstring above
        torch.default_generator.manual_seed(0)
        model.resize_token_embeddings(num_needed)
    log.info("the embedding has grown from %d to %d rows, for added tokens", num_rows, num_needed)
