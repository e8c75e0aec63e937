"""Replacing what the embedding of a model returns, for adapters that embed more than text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def replacing_embeddings(model: PreTrainedModel, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Lets `replace` change what the embedding returns, [B, T, D], when it is called first within the context.

    The decoder is still given token ids, which some architectures read elsewhere too. Later calls, for the tokens that
    are generated after a prompt, are left alone.
    """

    def replace_once(_module: nn.Module, _inputs: Any, embeds_BTD: Tensor) -> Tensor:
        hook.remove()
        return replace(embeds_BTD)

    hook = model.get_input_embeddings().register_forward_hook(replace_once)
    try:
        yield
    finally:
        hook.remove()
