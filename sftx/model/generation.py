"""Greedy answers to prompts, and the generation settings that a model comes with and is saved with.

Dimensions: B rows, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from sftx.errors import PluginError, one_line
from sftx.model.decoding import Decoder, Request, Sampling
from sftx.model.library_messages import quiet
from sftx.model.text_stream import TextStream

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
    """Yields (index of the prompt, token ids of its answer without the stop token), each when it is complete.

    Every token is the most likely one, whatever the model's own generation settings are. At most `batch_size` rows are
    computed together; the longest prompts come first. An answer ends where it has one of the texts `stop`, too.
    `check_stop` is called before every token; it may raise to end the generation.

    `embed` returns the embeddings of the prompts with these indices, [T, D] each (`embed_prompts`), for adapters that
    embed extras. What is generated after them is text.
    """
    requests = [
        Request(prompt, Sampling(max_new_tokens), TextStream(lm.tokenizer, stop) if stop else None)
        for prompt in prompts
    ]
    index_of = {request: index for index, request in enumerate(requests)}
    decoder = Decoder(
        lm,
        stop_ids=stop_ids,
        max_rows=batch_size,
        embed=None if embed is None else lambda asked: embed([index_of[request] for request in asked]),
    )
    for request in decoder.run(requests, check_stop=check_stop):
        yield index_of[request], request.answer_ids


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
