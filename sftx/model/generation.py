"""Greedy generation of answers to prompts, in left-padded batches with the model's own key-value cache.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.utils.hub import cached_file

from sftx.errors import PluginError, one_line
from sftx.model.embeddings import replacing_embeddings
from sftx.model.library_messages import quiet

if TYPE_CHECKING:
    from sftx.model.language_model import CausalLM
    from sftx.types import Batch, Example, LanguageModel

log = logging.getLogger(__name__)

_TOKEN_IDS: Final = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"})
"""Generation settings that name tokens."""


def generate_greedy(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int,
    stop: Sequence[str] = (),
    check_stop: Callable[[], None] = lambda: None,
    embed: Callable[[Sequence[int]], Sequence[Tensor]] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (index of the prompt, token ids of its answer without the stop token), batch by batch.

    Every token is the most likely one. The model's own generation settings do not apply: a repetition penalty, for
    example, would also count the padding. Prompts of similar length share a batch. The longest come first, so that a
    batch that does not fit into memory fails at once. An answer ends where it has one of the texts `stop`, too.
    `check_stop` is called before every batch and every token; it may raise to end the generation.

    `embed` returns the embeddings of the prompts with these indices, [T, D] each (`embed_prompts`), for adapters that
    embed extras. What is generated after them is text.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,  # any id will do: padding is masked, and cut off after the first stop token
    )
    # transformers would compute the router's loss for each new token, over a mask of all tokens, and fail.
    has_router_loss = hasattr(lm.model.config.get_text_config(), "output_router_logits")
    no_router_loss = {"output_router_logits": False} if has_router_loss else {}
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        check_stop()
        indices = order[start : start + batch_size]
        ids_BT, mask_BT = _pad_left([prompts[index] for index in indices])
        replaced: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if embed is not None:
            with torch.no_grad(), _evaluating_with(lm.model, settings):
                replaced = replacing_embeddings(lm.model, partial(_put_right, embed(indices)))
        stopping = StoppingCriteriaList([_CheckStop(check_stop)])
        if stop:
            stopping.append(_StopAtText(lm, ids_BT.shape[1], stop))
        # The rows of added tokens are written into the embedding and the head once, not for every token.
        with torch.no_grad(), parametrize.cached(), _evaluating_with(lm.model, settings), replaced:
            out_BT = cast(Any, lm.model).generate(
                input_ids=ids_BT.to(lm.device),
                attention_mask=mask_BT.to(lm.device),
                stopping_criteria=stopping,
                synced_gpus=False,  # every process has all parameters here and generates on its own
                **no_router_loss,
            )
        for index, ids in zip(indices, out_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
            end = next((position for position, token in enumerate(ids) if token in stop_ids), len(ids))
            yield index, ids[:end]


@contextlib.contextmanager
def _evaluating_with(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Switches dropout off, and replaces the generation config, which transformers reads every unset value from.

    transformers gives the head the last position of each row, a slice with gaps. A frozen weight is not multiplied
    with it as one matrix: it is expanded to a batch of B weights, which a CPU copies in bf16 (9 times the time of the
    first token, and B times the memory of the head). Without gaps it is one matrix product.
    """
    training, own_settings = model.training, model.generation_config
    head = cast(torch.nn.Module, model.get_output_embeddings())
    hook = head.register_forward_pre_hook(lambda _, inputs: tuple(part.contiguous() for part in inputs))
    model.eval()
    model.generation_config = settings
    try:
        yield
    finally:
        hook.remove()
        model.generation_config = own_settings
        model.train(training)


def embed_prompts(
    lm: CausalLM, collate: Callable[[Sequence[Example]], Batch], examples: Sequence[Example]
) -> list[Tensor]:
    """Returns the embeddings of each example, [T, D], with what adapters embed of its extras, from one batch of all.

    The batch may be padded or packed, in any order. Raises PluginError when it lacks an example as it was given.
    """
    batch = collate(examples).to(lm.device)
    embeds_BTD = lm.embed(batch)
    if batch.cu_seqlens is None:
        documents = [(b, 0, end) for b, end in enumerate(cast(Tensor, batch.lengths_B).tolist())]
    else:
        documents = [(0, start, end) for start, end in itertools.pairwise(batch.cu_seqlens.tolist())]
    embedded = {
        (row_id, *batch.input_ids_BT[b, start:end].tolist()): embeds_BTD[b, start:end]
        for row_id, (b, start, end) in zip(batch.row_ids, documents, strict=True)
    }
    rows = [embedded.get((example.row_id, *example.token_ids.tolist())) for example in examples]
    for example, row_TD in zip(examples, rows, strict=True):
        if row_TD is None:
            raise PluginError(
                f"the collator's batch of prompts has no document of {example.row_id} with its "
                f"{len(example.token_ids)} tokens; collate must keep them, and row_ids be in the order of the documents"
            )
    return cast("list[Tensor]", rows)


def _put_right(rows: Sequence[Tensor], embeds_BTD: Tensor) -> Tensor:
    """Returns embeddings that are padded at the left, with these rows, [T, D] each, in place of their own."""
    embeds_BTD = embeds_BTD.clone()
    for b, row_TD in enumerate(rows):
        embeds_BTD[b, embeds_BTD.shape[1] - len(row_TD) :] = row_TD
    return embeds_BTD


class _CheckStop(StoppingCriteria):
    """Calls `check_stop` before every token; it never stops a row by itself."""

    def __init__(self, check_stop: Callable[[], None]) -> None:
        self._check_stop = check_stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._check_stop()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _StopAtText(StoppingCriteria):
    """Stops a row whose answer has one of the texts."""

    def __init__(self, lm: LanguageModel, prompt_length: int, texts: Sequence[str]) -> None:
        self._tokenizer = lm.tokenizer
        self._prompt_length = prompt_length
        self._texts = texts

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        answers = self._tokenizer.batch_decode(input_ids[:, self._prompt_length :], skip_special_tokens=True)
        has_text = [any(text in answer for text in self._texts) for answer in answers]
        return torch.tensor(has_text, device=input_ids.device)


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Returns the padded ids and the attention mask, both int64 [B, T].

    `tokenizer.pad` raises for a tokenizer without a padding token, which none is needed for here.
    """
    length = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        ids_BT[b, length - len(prompt) :] = torch.tensor(prompt)
        mask_BT[b, length - len(prompt) :] = 1
    return ids_BT, mask_BT


def load_generation_config(name: str) -> GenerationConfig | None:
    """Returns the model's generation_config.json, or None where there is none.

    Settings that transformers does not accept are left out, and logged: it would not load them, or not save them.
    """
    try:
        values = _read_json(name)
    except OSError:
        return None
    if not isinstance(values, dict):
        log.warning("model %s: its generation_config.json is no JSON object, and is not used", name)
        return GenerationConfig()
    return _saveable(values, f"model {name}")


def read_generation_settings(name: str) -> dict[str, Any] | None:
    """Returns what the model's generation_config.json holds, or None where there is none, or it is no JSON object."""
    with contextlib.suppress(OSError):
        values = _read_json(name)
        return values if isinstance(values, dict) else None
    return None


def _read_json(name: str) -> Any:
    """Returns the value in generation_config.json, None where it is no JSON. Raises OSError where there is no file."""
    with open(str(cached_file(name, "generation_config.json")), encoding="utf-8") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError):
            return None


def token_ids(setting: Any) -> list[int]:
    """Returns the token ids of a generation setting such as `eos_token_id`: one, several or none.

    Raises ValueError for what is no token id.
    """
    ids = setting if isinstance(setting, list) else [] if setting is None else [setting]
    if all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in ids):
        return ids
    raise ValueError("a token id is a whole number from 0")


def generation_defaults(lm: LanguageModel, stop_ids: Sequence[int]) -> GenerationConfig:
    """Returns the generation config to save with the model: its own, extended so that it stops where it was trained to.

    The template's stop tokens come before the model's own. The padding token is the model's, or the tokenizer's, or
    the first stop token.
    """
    settings = _saveable(cast(Any, lm.model.generation_config).to_dict(), type(lm.model).__name__)
    eos_ids = list(dict.fromkeys([*stop_ids, *token_ids(settings.eos_token_id)]))
    if eos_ids:
        settings.eos_token_id = eos_ids[0] if len(eos_ids) == 1 else eos_ids
    settings._from_model_config = None  # config.json alone no longer says all of it
    if settings.pad_token_id is None:
        pad_id = lm.tokenizer.pad_token_id
        settings.pad_token_id = pad_id if isinstance(pad_id, int) else next(iter(eos_ids), None)
    return settings


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _saveable(values: Mapping[str, Any], source: str) -> GenerationConfig:
    """Returns a generation config of these settings without those that cannot be used or saved, and logs these.

    transformers takes any value for a token id, and fails when it generates. It refuses to save a setting for its
    value, or because it has no effect beside the others, as a temperature has without do_sample. Leaving it out then
    changes no answer.
    """

    def error_of(chosen: Mapping[str, Any]) -> Exception | None:
        try:
            for name in _TOKEN_IDS & chosen.keys():
                if len(token_ids(chosen[name])) > 1 and name != "eos_token_id":
                    raise ValueError(f"{name} is one token id")
            config = GenerationConfig.from_dict(dict(chosen))
            config.validate(strict=True)
            json.loads(config.to_json_string(), parse_constant=_refuse_constant)
        except Exception as error:  # whatever a wrong type causes
            return error
        return None

    kept: dict[str, Any] = {}
    refused = dict(values)
    with quiet():
        if error_of(values) is None:
            return GenerationConfig.from_dict(dict(values))
        # One by one, and those again that are allowed only beside a later one.
        while added := [key for key, value in refused.items() if not error_of(kept | {key: value})]:
            for key in added:
                if error_of(kept | {key: refused[key]}) is None:
                    kept[key] = refused.pop(key)
        key, value = next(iter(refused.items()))
        reason = error_of(kept | {key: value}) or Exception()
    log.warning(
        "%s: its generation settings %s are left out, which transformers does not use or not save (%s)",
        source,
        ", ".join(f"{key}={value!r:.40}" for key, value in refused.items()),
        one_line(reason, max_chars=140).removeprefix("GenerationConfig is invalid: - "),
    )
    return GenerationConfig.from_dict(kept)
