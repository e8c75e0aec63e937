"""The checks that every run makes before its first step, and `sftx doctor` too.

They find what ruins a result in silence, and cost no more than reading the tokenizer once more: answers that do not
stop outside of sftx, or can never learn to, and ids that are served but were not trained.

Dimensions: V vocabulary, D hidden.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final

from sftx.data.export import to_record
from sftx.data.pipeline import DataPipeline
from sftx.data.row_encoder import split_units
from sftx.errors import DataError
from sftx.inspection.diagnosis.check_inputs import Check, CheckInputs, Finding
from sftx.types import Conversation, Message, Parsed, PlainText

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_NUM_CONTEXT_TOKENS: Final = 3
"""So many tokens are shown before the first that differs."""
_ONE_ROUND: Final = (Message("user", "How many legs has a spider?"), Message("assistant", "Eight."))
_TEST_CONVERSATIONS: Final = {
    "a system text and two rounds": Conversation(
        (Message("system", "Be brief."), *_ONE_ROUND, Message("user", "And a fly?"), Message("assistant", "Six."))
    ),
    "one round without a system text": Conversation(_ONE_ROUND),
}
_ALIKE: Final = 0.01
"""Rows of a weight this close, relative to their norm, were never trained: those of trained tokens are far apart."""
_PREFIX: Final = 16
"""Rows are compared in so many columns first."""


def log_start_checks(inputs: CheckInputs) -> None:
    """Log each finding in one line: a note as information, all else as a warning."""
    for check in CHECKS:
        for finding in check(inputs):
            log.log(logging.INFO if finding.severity == "note" else logging.WARNING, "%s", finding)


def generation_stop(inputs: CheckInputs) -> Iterator[Finding]:
    """Find generation settings of the base model that do not stop where the answers of an adapter end.

    A full model is saved with settings of its own that do.
    """
    if inputs.encoder.template is None or not inputs.has_turns or not inputs.adapters():
        return
    from sftx.model.generation import token_ids

    config = inputs.model_config.get_text_config()
    eos = (config.to_dict() if inputs.generation_settings is None else inputs.generation_settings).get("eos_token_id")
    try:
        base_stop_ids = token_ids(eos)
    except ValueError:  # what is no token id stops nothing; the run leaves it out with a line
        base_stop_ids = []
    stop_ids = inputs.encoder.stop_ids
    if stop_ids[0] not in base_stop_ids:
        stops = f"stop at {' or '.join(map(inputs.token_repr, base_stop_ids))}" if base_stop_ids else "never stop"
        yield Finding(
            "warning",
            "generation-stop",
            f"answers end with {inputs.token_repr(stop_ids[0])}, the base model's generation settings {stops}: PEFT "
            "and pipeline() take these, and go on after the answer",
            "generate with the generation_config.json that is saved beside the adapter; its README.md has the lines",
        )


def own_template(inputs: CheckInputs) -> Iterator[Finding]:
    """Find the first token at which the run's template and the model's own chat template differ."""
    template, tokenizer = inputs.encoder.template, inputs.tokenizer
    if template is None or not inputs.has_turns or inputs.own_chat_template is None:
        return
    conversations = _TEST_CONVERSATIONS | {
        str(where): parsed
        for where, parsed in inputs.sample
        # A control token that is spelled in a text is a difference of that row, which no template removes.
        if isinstance(parsed, Conversation) and not spells_control(tokenizer, parsed)
    }
    equal = 0
    for name, conversation in conversations.items():
        by_run = _ids_of_run(inputs.view.pipeline, conversation)
        by_model = served_ids(tokenizer, conversation, inputs.own_chat_template)
        if by_run is None or by_model is None:
            continue
        if by_run == by_model:
            equal += 1
            continue
        # A default system text that one of them adds is a matter of taste; the form of turns is not.
        is_taste = equal == 1 and name in _TEST_CONVERSATIONS
        yield Finding(
            "note" if is_taste else "warning",
            "own-template",
            f"{name}: " + _first_difference(inputs, by_run, by_model, "the run's template", "the tokenizer's own"),
            "--plugin tokenizer, in place of the run's template, trains with the tokenizer's own, as the model was; "
            "with another one it has to learn the form anew",
        )
        return  # a difference in the first conversation shows in the others too


def saved_tokenizer(inputs: CheckInputs) -> Iterator[Finding]:
    """Find ids that the saved tokenizer and its chat template give, read back from files, and that are not trained."""
    pipeline = inputs.view.pipeline
    saved, own = pipeline.saved_tokenizer.tokenizer, pipeline.tokenizer
    num_compared, others = 0, []
    for where, parsed in inputs.sample:
        trained, served = _ids_of_run(pipeline, parsed), served_ids(saved, parsed)
        if trained is None or served is None or spells_control(own, parsed):
            continue
        num_compared += 1
        if served == trained:
            continue
        if served != served_ids(own, parsed):
            yield Finding(
                "warning",
                "saved-tokenizer",
                f"{where}: transformers reads this tokenizer back as another one: "
                + _first_difference(inputs, trained, served, "the run", "the saved tokenizer"),
                "serve the result with the base model's tokenizer and the result's chat template",
            )
            return
        others.append((where, trained, served))
    # Text on both sides of a border between segments is encoded as one where it is served. That is rarely another
    # encoding, for white space at the border, and then the text is the same.
    if len(others) < num_compared:
        others = [row for row in others if own.decode(row[1]) != own.decode(row[2])]
    for where, trained, served in others[:1]:
        yield Finding(
            "warning",
            "saved-tokenizer",
            f"{where}: {_first_difference(inputs, trained, served, 'the run', 'the chat template that is saved')}",
            "correct the template plugin's `chat_template`; `load_run` prompts as the run trained",
        )


def _ids_of_run(pipeline: DataPipeline, parsed: Parsed) -> list[int] | None:
    """Return the ids that are trained, or None when the run's template does not accept the conversation."""
    if isinstance(parsed, PlainText):
        return served_ids(pipeline.tokenizer, parsed)
    try:
        units = list(split_units(parsed, pipeline.encoder))
        return pipeline.encoder.encode(units[-1])[0] if units else None
    except DataError:
        return None


def served_ids(
    tokenizer: PreTrainedTokenizerBase, parsed: Parsed, chat_template: str | None = None, *, is_prompt: bool = False
) -> list[int] | None:
    """Return the ids that transformers gives, or None when the chat template does not accept the conversation.

    `is_prompt`: the model is to answer, and the ids end with the opening of its turn.
    """
    if isinstance(parsed, PlainText):
        plain_ids: list[int] = tokenizer(parsed.text).input_ids
        return plain_ids
    if not isinstance(parsed, Conversation):
        return None
    messages: list[dict[str, Any]] = to_record(parsed)["messages"]
    for message in messages:
        for call in message.get("tool_calls", ()):  # templates write an object as JSON themselves
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    tools: Any = list(parsed.tools) or None
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=chat_template, add_generation_prompt=is_prompt, tokenize=False
        )
    except Exception:  # Jinja's errors, and any error that a template raises itself
        return None
    ids: list[int] = tokenizer(str(text), add_special_tokens=False).input_ids
    return ids


def spells_control(tokenizer: PreTrainedTokenizerBase, parsed: Parsed) -> bool:
    """Return whether text of the row spells a control token: it is text in training, and a token where it is served."""
    if not isinstance(parsed, Conversation):
        return False
    tokens = [token for token in tokenizer.get_added_vocab() if len(token) > 1]
    texts = [text for message in parsed.messages for text in (message.content, message.reasoning)]
    return any(token in text for token in tokens for text in texts)


def _first_difference(inputs: CheckInputs, one: Sequence[int], other: Sequence[int], by_one: str, by_other: str) -> str:
    at = next(n for n, (a, b) in enumerate(zip_longest(one, other)) if a != b)
    before = "".join(str(inputs.tokenizer.decode([token])) for token in one[max(0, at - _NUM_CONTEXT_TOKENS) : at])
    a, b = (inputs.token_repr(ids[at]) if at < len(ids) else "nothing" for ids in (one, other))
    return f"token {at}, after {before!r}, is {a} by {by_one} and {b} by {by_other}"


def find_untrained_tokens(pipeline: DataPipeline, head_VD: Tensor, embedding_VD: Tensor) -> Finding | None:
    """Find control tokens of the template that a frozen head or embedding cannot tell from other tokens.

    Tokens that a base model was never trained on have the same row, or nearly so. A head gives them the same logits
    whatever an adapter does: of an answer's end and an unused token with a lower id, the end is never generated.
    """
    encoder = pipeline.encoder
    if encoder.template is None:
        return None
    vocabulary = pipeline.tokenizer.get_vocab()
    ids = {vocabulary[token]: token for token in sorted(encoder.template.controls)}
    in_head, in_embedding = _tokens_alike(head_VD, list(ids)), _tokens_alike(embedding_VD, list(ids))
    affected = sorted(in_head | in_embedding)
    if not affected:
        return None
    first = affected[0]
    other = (in_head | in_embedding)[first]
    stops = [ids[token] for token in affected if token in encoder.stop_ids and token in in_head]
    effect = f"no answer can end with {' or '.join(stops)}" if stops else "it cannot tell them apart"
    adapters = [active.info.name for active in pipeline.assembly.providers("sftx_adapter")]
    return Finding(
        "warning",
        "untrained-tokens",
        f"the model was never trained on {', '.join(ids[token] for token in affected)}: the frozen row of {ids[first]} "
        f"is that of {pipeline.tokenizer.decode([other])!r} (id {other}) too, so {effect}",
        f"train their rows: --set 'lora.trainable_token_indices={affected}'"
        if "lora" in adapters
        else "train the embedding and the head, or choose a template of tokens that the model knows",
    )


def _tokens_alike(weight_VD: Tensor, token_ids: Sequence[int]) -> dict[int, int]:
    """Return for each of the tokens whose row equals that of another one the least such other token."""
    found = {}
    weight_VD = weight_VD.detach()
    for token in (token for token in token_ids if token < weight_VD.shape[0]):
        row_D = weight_VD[token].float()
        limit = _ALIKE * row_D.norm()
        distances_V = (weight_VD[:, :_PREFIX].float() - row_D[:_PREFIX]).norm(dim=1)
        near_N = (distances_V <= limit).nonzero().flatten()
        near_N = near_N[near_N != token]
        is_alike_N = (weight_VD[near_N].float() - row_D).norm(dim=1) <= limit
        if is_alike_N.any():
            found[token] = int(near_N[is_alike_N][0])
    return found


CHECKS: Final[tuple[Check, ...]] = (generation_stop, own_template, saved_tokenizer)
