"""What `sftx doctor` checks of template, tokenizer and model: one function a check, each giving its findings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from sftx.errors import DataError
from sftx.inspection.diagnosis.facts import Check, Facts, Finding
from sftx.types import Conversation, Message

_BASE: Final = re.compile(r"(^|[-_.])base($|[-_.])", re.IGNORECASE)
_EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_BEFORE: Final = 3
"""Tokens that are shown before the first that differs."""

_ROUNDS: Final = (("user", "How many legs has a spider?"), ("assistant", "Eight."))
_PROBES: Final = {
    "a system text and two rounds": (("system", "Be brief."), *_ROUNDS, ("user", "And a fly?"), ("assistant", "Six.")),
    "one round without a system text": _ROUNDS,
}


def bos(facts: Facts) -> Iterator[Finding]:
    """Examples that begin with two BOS tokens, or with none where the tokenizer writes one."""
    bos, examples = facts.own.bos_token_id, facts.data.examples
    if not isinstance(bos, int):
        return
    starts = [examples.tokens(at)[0][:2].tolist() for at in range(len(examples))]
    double = [n for n, start in enumerate(starts) if start == [bos, bos]]
    if double:
        yield Finding(
            "error",
            "bos",
            f"{len(double):,} of {len(examples):,} examples begin with {facts.token(bos)} twice (first: "
            f"{examples.where(double[0])}), which the model has never seen",
            "one of template and rows writes it too often: leave it out of the rows, or choose another template",
        )
    begins = facts.own("").input_ids[:1] == [bos]
    if begins and facts.data.has_turns and starts and not any(start[:1] == [bos] for start in starts):
        yield Finding(
            "warning",
            "bos",
            f"no example begins with {facts.token(bos)}, which this tokenizer puts before every text",
            "choose the template that was made for this model; without its BOS a model often does worse",
        )


def stop_tokens(facts: Facts) -> Iterator[Finding]:
    """Whether the token that ends an answer is trained, and what else is made of it."""
    data, encoder, options = facts.data, facts.encoder, facts.look.config.data
    stop = " or ".join(facts.token(token) for token in encoder.stop_ids)
    if data.has_turns and len(data.examples) and not data.trains_stop:
        meant = not options.train_turn_end
        yield Finding(
            "warning" if meant else "error",
            "stop-tokens",
            f"no example trains {stop}, which ends an answer, so the model learns not to end one",
            "leave out --no-train-turn-end"
            if meant
            else "raise data.max_length if every row is cut; see `sftx inspect`",
        )
    pad, eos = facts.own.pad_token_id, facts.own.eos_token_id
    if pad is not None and pad == eos:
        yield Finding(
            "note",
            "stop-tokens",
            f"the padding token is the eos token, {facts.token(pad)}: harmless here, where padding is told by length",
            "nothing; a tool that masks padding by its id would not train the end of answers",
        )
    generation = facts.generation_config
    ends = getattr(generation, "eos_token_id", None)
    listed = [ends] if isinstance(ends, int) else list(ends or ())
    if data.has_turns and listed and not set(listed) & set(encoder.stop_ids):
        ids = " or ".join(facts.token(token) for token in listed)
        yield Finding(
            "warning",
            "stop-tokens",
            f"the model's generation_config.json stops at {ids}, answers are trained to end with {stop}",
            f"generate with eos_token_id={list(encoder.stop_ids)}, or the result talks on after its answer",
        )


def own_template(facts: Facts) -> Iterator[Finding]:
    """Where the run's template and the tokenizer's own write something else."""
    if facts.encoder.template is None or not facts.data.has_turns or not isinstance(facts.own.chat_template, str):
        return
    for words, turns in _PROBES.items():
        ours, theirs = _rendered(facts, turns), _their_rendering(facts, turns)
        if ours is None or theirs is None or ours == theirs:
            continue
        at = next(n for n, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
        before = "".join(str(facts.own.decode([token])) for token in ours[max(0, at - _BEFORE) : at])
        a, b = (facts.token(ids[at]) if at < len(ids) else "nothing" for ids in (ours, theirs))
        # A default system text that one of them adds is a matter of taste; the form of turns is not.
        yield Finding(
            "warning" if words == next(iter(_PROBES)) else "note",
            "own-template",
            f"{words}: token {at}, after {before!r}, is {a} by the run's template and {b} by the tokenizer's own",
            "--plugin tokenizer trains with the tokenizer's own template, as the model was; with another one it has "
            "to learn the form anew",
        )
        return  # one difference shows in every probe


def _rendered(facts: Facts, turns: tuple[tuple[str, str], ...]) -> list[int] | None:
    """None where the template has no place for such turns."""
    assert facts.encoder.template is not None
    conversation = Conversation(tuple(Message(role, content) for role, content in turns))
    try:
        return facts.encoder.encode_segments(facts.encoder.template.render(conversation))[0]
    except DataError:
        return None


def _their_rendering(facts: Facts, turns: tuple[tuple[str, str], ...]) -> list[int] | None:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = facts.own.apply_chat_template(messages, tokenize=False)
    except Exception:  # Jinja's, and whatever a template raises of its own
        return None
    ids: list[int] = facts.own(str(text), add_special_tokens=False).input_ids
    return ids


def vocabulary(facts: Facts) -> Iterator[Finding]:
    """Whether every token has a row of the embedding."""
    text: Any = facts.model_config.get_text_config()
    num_rows, written = int(text.vocab_size), _rows_of_the_embedding(Path(facts.look.prepared.model))
    if written is not None and written != num_rows:
        yield Finding(
            "error",
            "vocabulary",
            f"the weights hold an embedding of {written:,} rows, config.json says vocab_size={num_rows:,}",
            "one of the two files belongs to another model; fetch both anew",
        )
    if facts.look.config.add_tokens:
        return  # the embedding grows with the tokenizer
    largest = max(found.examples.largest_id for found in (facts.data, facts.held_out))
    num_tokens = len(facts.look.prepared.tokenizer)
    if largest >= num_rows:
        yield Finding(
            "error",
            "vocabulary",
            f"the tokenizer gives the id {largest:,} ({facts.token(largest)}), the embedding has {num_rows:,} rows",
            "tokenizer and model do not belong together; for tokens that were added to it see --add-tokens",
        )
    elif num_tokens > num_rows:
        yield Finding(
            "warning",
            "vocabulary",
            f"the tokenizer knows {num_tokens:,} tokens, the embedding has {num_rows:,} rows; no row of the data uses "
            "those without one",
            "take the tokenizer of this model",
        )


def _rows_of_the_embedding(directory: Path) -> int | None:
    """From the header of the weights, of which nothing else is read; None where they do not lie there as one file."""
    file = directory / "model.safetensors"
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(size))
        except (ValueError, MemoryError, OverflowError):
            return None  # whoever loads the weights says what is wrong with them
    return next((int(header[name]["shape"][0]) for name in header if name.endswith(_EMBEDDINGS)), None)


def base_model(facts: Facts) -> Iterator[Finding]:
    """Control tokens that the model has never been trained on."""
    template, own = facts.encoder.template, facts.own
    if template is None or not facts.data.has_turns:
        return
    known = {own.bos_token, own.eos_token}
    controls = sorted(template.controls - known)
    is_base = own.chat_template is None or _BASE.search(Path(facts.look.config.model).name) is not None
    if not (is_base and controls) or facts.look.config.add_tokens:
        return
    why = "has no chat template" if own.chat_template is None else "calls itself a base model"
    names = ", ".join(controls[:4]) + (", ..." if len(controls) > 4 else "")
    adapters = facts.adapters()
    fix = "take the model's instruct variant, or a template of plain text, such as alpaca or vicuna"
    if "lora" in adapters:
        fix += "; or train their embeddings: --set 'lora.modules_to_save=[embed_tokens, lm_head]'"
    saved = [a.options.get("modules_to_save") for a in facts.look.prepared.assembly.providers("sftx_adapter")]
    yield Finding(
        "warning" if adapters and not any(saved) else "note",
        "base-model",
        f"the model {why}: it has hardly been trained on the control tokens {names}",
        fix if adapters else "nothing; all weights are trained, their embeddings too",
    )


def positions(facts: Facts) -> Iterator[Finding]:
    """Rows that are longer than what the model was made for."""
    limit = getattr(facts.model_config.get_text_config(), "max_position_embeddings", None)
    longest = max(int(found.examples.lengths.max(initial=0)) for found in (facts.data, facts.held_out))
    if isinstance(limit, int) and longest > limit:
        yield Finding(
            "warning",
            "positions",
            f"the longest example has {longest:,} tokens, the model was made for {limit:,}",
            f"lower data.max_length to {limit}",
        )


CHECKS: Final[tuple[Check, ...]] = (bos, stop_tokens, own_template, vocabulary, base_model, positions)
