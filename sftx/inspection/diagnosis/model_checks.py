"""The checks of `sftx doctor` on template, tokenizer and model. Each check is one function that yields its findings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from sftx.errors import ConfigError, DataError
from sftx.inspection.diagnosis.check_inputs import Check, CheckInputs, Finding, cut_entries, longest_row
from sftx.types import Conversation, Message

_BASE_MODEL_NAME: Final = re.compile(r"(^|[-_.])base($|[-_.])", re.IGNORECASE)
_EMBEDDING_NAMES: Final = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_NUM_CONTEXT_TOKENS: Final = 3
"""So many tokens are shown before the first that differs."""

_ONE_ROUND: Final = (("user", "How many legs has a spider?"), ("assistant", "Eight."))
_TEST_CONVERSATIONS: Final = {
    "a system text and two rounds": (
        ("system", "Be brief."), *_ONE_ROUND, ("user", "And a fly?"), ("assistant", "Six."),
    ),
    "one round without a system text": _ONE_ROUND,
}  # fmt: skip


def bos(inputs: CheckInputs) -> Iterator[Finding]:
    """Find examples that begin with two BOS tokens, or with none although the tokenizer writes one."""
    bos, examples = inputs.model_tokenizer.bos_token_id, inputs.train.examples
    if not isinstance(bos, int):
        return
    starts = [examples.tokens(at)[0][:2].tolist() for at in range(len(examples))]
    double = [n for n, start in enumerate(starts) if start == [bos, bos]]
    if double:
        yield Finding(
            "error",
            "bos",
            f"{len(double):,} of {len(examples):,} examples begin with {inputs.token_repr(bos)} twice (first: "
            f"{examples.where(double[0])}), which the model has never seen",
            "the template and the rows both write it: remove it from the rows, or choose another template",
        )
    tokenizer_writes_bos = inputs.model_tokenizer("").input_ids[:1] == [bos]
    if tokenizer_writes_bos and inputs.train.has_turns and starts and not any(start[:1] == [bos] for start in starts):
        yield Finding(
            "warning",
            "bos",
            f"no example begins with {inputs.token_repr(bos)}, which this tokenizer puts before every text",
            "choose the template that was made for this model; without its BOS a model often does worse",
        )


def stop_tokens(inputs: CheckInputs) -> Iterator[Finding]:
    """Find stop tokens that are never trained, that are padding too, or that generation does not stop at."""
    train, encoder, tokenizer = inputs.train, inputs.encoder, inputs.model_tokenizer
    stop = " or ".join(inputs.token_repr(token) for token in encoder.stop_ids)
    if train.has_turns and len(train.examples) and not train.trains_stop:
        is_intended = not inputs.view.config.data.train_turn_end
        yield Finding(
            "warning" if is_intended else "error",
            "stop-tokens",
            f"no example trains {stop}, which ends an answer, so the model does not learn to stop",
            "train it with --train-turn-end"
            if is_intended
            else f"--max-length {longest_row(train)} cuts no row"
            if cut_entries(train)
            else "see with `sftx inspect` what the rows train",
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding(
            "note",
            "stop-tokens",
            f"the padding token is the eos token, {inputs.token_repr(tokenizer.pad_token_id)}: harmless here, where "
            "padding is masked by length",
            "nothing; a tool that masks padding by its id would not train the end of answers",
        )
    eos = getattr(inputs.generation_config, "eos_token_id", None)
    generation_stop_ids = [eos] if isinstance(eos, int) else list(eos or ())
    if train.has_turns and generation_stop_ids and not set(generation_stop_ids) & set(encoder.stop_ids):
        ids = " or ".join(inputs.token_repr(token) for token in generation_stop_ids)
        yield Finding(
            "warning",
            "stop-tokens",
            f"the model's generation_config.json stops at {ids}, answers are trained to end with {stop}",
            f"generate with eos_token_id={list(encoder.stop_ids)}, or the model continues after its answer",
        )


def own_template(inputs: CheckInputs) -> Iterator[Finding]:
    """Find the first token at which the run's template and the tokenizer's own chat template differ."""
    tokenizer = inputs.model_tokenizer
    if inputs.encoder.template is None or not inputs.train.has_turns or not isinstance(tokenizer.chat_template, str):
        return
    for name, turns in _TEST_CONVERSATIONS.items():
        by_run, by_tokenizer = _render_by_run(inputs, turns), _render_by_tokenizer(inputs, turns)
        if by_run is None or by_tokenizer is None or by_run == by_tokenizer:
            continue
        at = next(n for n, (a, b) in enumerate(zip_longest(by_run, by_tokenizer)) if a != b)
        before = "".join(str(tokenizer.decode([token])) for token in by_run[max(0, at - _NUM_CONTEXT_TOKENS) : at])
        a, b = (inputs.token_repr(ids[at]) if at < len(ids) else "nothing" for ids in (by_run, by_tokenizer))
        # A default system text that one of them adds is a matter of taste; the form of turns is not.
        yield Finding(
            "warning" if name == next(iter(_TEST_CONVERSATIONS)) else "note",
            "own-template",
            f"{name}: token {at}, after {before!r}, is {a} by the run's template and {b} by the tokenizer's own",
            "--plugin tokenizer, in place of the run's template, trains with the tokenizer's own, as the model was; "
            "with another one it has to learn the form anew",
        )
        return  # a difference in the first conversation shows in the second too


def _render_by_run(inputs: CheckInputs, turns: tuple[tuple[str, str], ...]) -> list[int] | None:
    """Return token ids, or None when the run's template does not accept these turns."""
    assert inputs.encoder.template is not None
    conversation = Conversation(tuple(Message(role, content) for role, content in turns))
    try:
        return inputs.encoder.encode_segments(inputs.encoder.template.render(conversation))[0]
    except DataError:
        return None


def _render_by_tokenizer(inputs: CheckInputs, turns: tuple[tuple[str, str], ...]) -> list[int] | None:
    """Return token ids, or None when the tokenizer's chat template does not accept these turns."""
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = inputs.model_tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # Jinja's errors, and any error that a template raises itself
        return None
    ids: list[int] = inputs.model_tokenizer(str(text), add_special_tokens=False).input_ids
    return ids


def vocabulary(inputs: CheckInputs) -> Iterator[Finding]:
    """Find token ids without a row in the embedding, and weights that disagree with config.json."""
    text_config: Any = inputs.model_config.get_text_config()
    num_rows, num_saved_rows = int(text_config.vocab_size), _saved_embedding_rows(Path(inputs.view.pipeline.model))
    if num_saved_rows is not None and num_saved_rows != num_rows:
        yield Finding(
            "error",
            "vocabulary",
            f"the weights hold an embedding of {num_saved_rows:,} rows, config.json says vocab_size={num_rows:,}",
            "one of the two files belongs to another model; download both again",
        )
    if inputs.view.config.add_tokens:
        return  # the embedding grows with the tokenizer
    largest = max(data.examples.largest_id for data in (inputs.train, inputs.held_out))
    num_tokens = len(inputs.view.pipeline.tokenizer)
    if largest >= num_rows:
        yield Finding(
            "error",
            "vocabulary",
            f"the tokenizer gives the id {largest:,} ({inputs.token_repr(largest)}), the embedding has {num_rows:,} "
            "rows",
            "tokenizer and model do not belong together; for tokens that were added to it see --add-tokens",
        )
    elif num_tokens > num_rows:
        yield Finding(
            "warning",
            "vocabulary",
            f"the tokenizer knows {num_tokens:,} tokens, the embedding has {num_rows:,} rows; no row of the data uses "
            "tokens without one",
            "use the tokenizer of this model",
        )


def _saved_embedding_rows(directory: Path) -> int | None:
    """Read the embedding's size from the header of model.safetensors; None when there is no such file."""
    file = directory / "model.safetensors"
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(size))
        except (ValueError, MemoryError, OverflowError):
            return None  # loading the weights reports the damage
    return next((int(header[name]["shape"][0]) for name in header if name.endswith(_EMBEDDING_NAMES)), None)


def base_model(inputs: CheckInputs) -> Iterator[Finding]:
    """Find control tokens that a base model has never been trained on."""
    template, tokenizer = inputs.encoder.template, inputs.model_tokenizer
    if template is None or not inputs.train.has_turns:
        return
    controls = sorted(template.controls - {tokenizer.bos_token, tokenizer.eos_token})
    is_named_base = _BASE_MODEL_NAME.search(Path(inputs.view.config.model).name) is not None
    if not controls or not (tokenizer.chat_template is None or is_named_base) or inputs.view.config.add_tokens:
        return
    why = "has no chat template" if tokenizer.chat_template is None else "calls itself a base model"
    names = ", ".join(controls[:4]) + (", ..." if len(controls) > 4 else "")
    is_trained, advice = _trains_embeddings(inputs)
    yield Finding(
        "note" if is_trained else "warning",
        "base-model",
        f"the model {why}: it has hardly been trained on the control tokens {names}",
        "nothing; their embeddings are trained too"
        if is_trained
        else "use the model's instruct variant, or a template of plain text in place of this one: --plugin "
        f"alpaca-template or --plugin vicuna{advice}",
    )


def _trains_embeddings(inputs: CheckInputs) -> tuple[bool, str]:
    """Return whether the run trains the input embedding and the output head, and what else to do if it does not."""
    adapters = inputs.adapters()
    if not adapters:
        return True, ""
    model = inputs.spec.skeleton
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [next(path for path, other in model.named_modules() if other is part) for part in parts]
    endings: set[str] = set()
    for active in inputs.view.pipeline.assembly.providers("sftx_adapter"):
        endings.update(active.options.get("modules_to_save") or ())
    if all(any(f".{name}".endswith(f".{ending}") for ending in endings) for name in names):
        return True, ""
    short = ", ".join(name.rpartition(".")[2] for name in names)
    return False, f"; or train their embeddings: --set 'lora.modules_to_save=[{short}]'" * ("lora" in adapters)


def untrained_weights(inputs: CheckInputs) -> Iterator[Finding]:
    """Find weights that this run would leave as they are, and an adapter that cannot adapt the model at all."""
    import torch

    from sftx.model.language_model import CausalLM

    adapters = inputs.adapters()
    if not adapters and inputs.model_config.get_text_config() is inputs.model_config:
        return
    try:
        made = inputs.view.pipeline.assembly.adapters(inputs.spec)
    except ConfigError as error:
        yield Finding(
            "error", "untrained-weights", str(error), "choose what this model allows, or leave the plugin out"
        )
        return
    lm = CausalLM(inputs.spec.skeleton, inputs.model_tokenizer)
    with torch.device("meta"):
        lm.attach(made)
    for line in lm.untrained_parts():
        is_adapter = line.startswith("not adapted")
        yield Finding(
            "warning" if is_adapter else "note",
            "untrained-weights",
            line,
            f"nothing, when that is intended; without {', '.join(adapters)} all weights of the language model train"
            if is_adapter
            else "nothing",
        )


def positions(inputs: CheckInputs) -> Iterator[Finding]:
    """Find examples that are longer than the model's maximum length."""
    limit = getattr(inputs.model_config.get_text_config(), "max_position_embeddings", None)
    longest = max(int(data.examples.lengths.max(initial=0)) for data in (inputs.train, inputs.held_out))
    if isinstance(limit, int) and longest > limit:
        yield Finding(
            "warning",
            "positions",
            f"the longest example has {longest:,} tokens, the model was made for {limit:,}",
            f"--max-length {limit} cuts it",
        )


CHECKS: Final[tuple[Check, ...]] = (
    bos,
    stop_tokens,
    own_template,
    vocabulary,
    base_model,
    untrained_weights,
    positions,
)
