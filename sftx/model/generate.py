"""Prompts become greedy answers: batches padded at the left, with the model's own cache.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

if TYPE_CHECKING:
    from sftx.model.language_model import LanguageModel


def answers(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int,
    check_stop: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, list[int]]]:
    """The index of each prompt with its answer, without the stop token that ended it, batch by batch.

    Each token is the likeliest one: what the model's own settings ask for besides (a repetition penalty, which would
    see the padding too) does not apply. Prompts of similar length share a batch, the longest come first: what does not
    fit into memory shows at once. `check_stop` is called before each token of a batch, and ends it all by raising.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,  # never seen: the mask hides it
    )
    stopping = StoppingCriteriaList([_Check(check_stop)])
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        check_stop()
        chosen = order[start : start + batch_size]
        ids_BT, mask_BT = _left_padded([prompts[index] for index in chosen])
        with torch.no_grad(), _answering(lm, settings):
            out_BT = cast(Any, lm.model).generate(
                input_ids=ids_BT.to(lm.device),
                attention_mask=mask_BT.to(lm.device),
                stopping_criteria=stopping,
                synced_gpus=False,  # the whole model is here: no process waits for another's answers
            )
        for index, ids in zip(chosen, out_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
            yield index, _until_stop(ids, stop_ids)


@contextlib.contextmanager
def _answering(lm: LanguageModel, settings: GenerationConfig) -> Iterator[None]:
    """Without dropout, and with these settings as the model's own, which transformers fills every gap from."""
    model: PreTrainedModel = lm.model
    training, own = lm.training, model.generation_config
    lm.eval()
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
        lm.train(training)


class _Check(StoppingCriteria):
    """Stops nothing by itself: it calls what may raise."""

    def __init__(self, check_stop: Callable[[], None]) -> None:
        self._check_stop = check_stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._check_stop()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [B, T] in int64."""
    length = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        ids_BT[b, length - len(prompt) :] = torch.tensor(prompt)
        mask_BT[b, length - len(prompt) :] = 1
    return ids_BT, mask_BT


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((at for at, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def generation_defaults(lm: LanguageModel, stop_ids: Sequence[int]) -> GenerationConfig:
    """The model's own settings with which it stops where it was trained to: for the saved generation_config.json.

    The template's stop tokens come before the model's own; padding is the tokenizer's, or the first stop token.
    """
    settings = GenerationConfig.from_dict(cast(Any, lm.model.generation_config).to_dict())
    own = settings.eos_token_id
    ends = list(dict.fromkeys([*stop_ids, *([own] if isinstance(own, int) else own or [])]))
    if ends:
        settings.eos_token_id = ends[0] if len(ends) == 1 else ends
    settings._from_model_config = None  # no longer what config.json says alone
    if settings.pad_token_id is None:
        pad = lm.tokenizer.pad_token_id
        settings.pad_token_id = pad if isinstance(pad, int) else next(iter(ends), None)
    return settings
