"""The checks of `sftx doctor` on template, tokenizer and model. Each check is one function that yields its findings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sftx.errors import ConfigError, counted
from sftx.inspection.diagnosis.check_inputs import Check, CheckInputs, Finding, cut_entries, longest_row
from sftx.inspection.diagnosis.start_checks import find_untrained_tokens

if TYPE_CHECKING:
    from torch import Tensor

_BASE_MODEL_NAME: Final = re.compile(r"(^|[-_.])base($|[-_.])", re.IGNORECASE)
_EMBEDDING_NAMES: Final = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")

_HEAD_NAMES: Final = ("lm_head.weight", "embed_out.weight")


def bos(inputs: CheckInputs) -> Iterator[Finding]:
    """Find examples that begin with two BOS tokens, or with none although the tokenizer writes one."""
    bos, examples = inputs.tokenizer.bos_token_id, inputs.train.examples
    if not isinstance(bos, int):
        return
    starts = [examples.tokens(at)[0][:2].tolist() for at in range(len(examples))]
    double = [n for n, start in enumerate(starts) if start == [bos, bos]]
    if double:
        yield Finding(
            "error",
            "bos",
            f"{len(double):,} of {counted(len(examples), 'example')} "
            f"{'begins' if len(double) == 1 else 'begin'} with {inputs.token_repr(bos)} twice (first: "
            f"{examples.where(double[0])}), which the model has never seen",
            "the template and the rows both write it: remove it from the rows, or choose another template",
        )
    tokenizer_writes_bos = inputs.tokenizer("").input_ids[:1] == [bos]
    if tokenizer_writes_bos and inputs.train.has_turns and starts and not any(start[:1] == [bos] for start in starts):
        yield Finding(
            "warning",
            "bos",
            f"no example begins with {inputs.token_repr(bos)}, which this tokenizer puts before every text",
            "choose the template that was made for this model; without its BOS a model often does worse",
        )


def stop_tokens(inputs: CheckInputs) -> Iterator[Finding]:
    """Find stop tokens that are never trained, or that are padding too."""
    train, encoder, tokenizer = inputs.train, inputs.encoder, inputs.tokenizer
    stop = " or ".join(inputs.token_repr(token) for token in encoder.stop_ids)
    if not inputs.has_rollout and train.has_turns and len(train.examples) and not train.trains_stop:
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


def untrained_tokens(inputs: CheckInputs) -> Iterator[Finding]:
    """Find control tokens that the model was never trained on, and whose rows an adapter leaves as they are."""
    adapters = inputs.view.pipeline.assembly.providers("sftx_adapter")
    trains_rows = any(a.options.get("modules_to_save") or a.options.get("trainable_token_indices") for a in adapters)
    if not (adapters or inputs.freezes_ends()) or trains_rows or inputs.view.config.add_tokens:
        return
    directory = Path(inputs.view.pipeline.model)
    embedding_VD = _saved_tensor(directory, _EMBEDDING_NAMES)
    is_tied = inputs.model_config.get_text_config().tie_word_embeddings
    head_VD = embedding_VD if is_tied else _saved_tensor(directory, _HEAD_NAMES)
    if head_VD is not None and embedding_VD is not None:
        finding = find_untrained_tokens(inputs.view.pipeline, head_VD, embedding_VD)
        if finding is not None:
            yield finding


def _saved_tensor(directory: Path, names: tuple[str, ...]) -> Tensor | None:
    """Return a tensor of the model's files, of which only what is used is read; None when it is not there."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if name.endswith(names):
                        tensor: Tensor = tensors.get_tensor(name)
                        return tensor
        except (OSError, SafetensorError):
            return None  # loading the weights reports the damage
    return None


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
    template, tokenizer = inputs.encoder.template, inputs.tokenizer
    if template is None or not inputs.train.has_turns:
        return
    controls = sorted(template.controls - {tokenizer.bos_token, tokenizer.eos_token})
    is_named_base = _BASE_MODEL_NAME.search(Path(inputs.view.config.model).name) is not None
    if not controls or not (inputs.own_chat_template is None or is_named_base) or inputs.view.config.add_tokens:
        return
    why = "has no chat template" if inputs.own_chat_template is None else "calls itself a base model"
    names = ", ".join(controls[:4]) + (", ..." if len(controls) > 4 else "")
    is_trained, advice = _trains_embeddings(inputs, controls)
    yield Finding(
        "note" if is_trained else "warning",
        "base-model",
        f"the model {why}: it has hardly been trained on the control tokens {names}",
        "nothing; their embeddings are trained too"
        if is_trained
        else "use the model's instruct variant, or a template of plain text in place of this one: --plugin "
        f"alpaca-template or --plugin vicuna{advice}",
    )


def _trains_embeddings(inputs: CheckInputs, tokens: Sequence[str]) -> tuple[bool, str]:
    """Return whether the run trains the tokens' rows in embedding and head, and what else to do if it does not."""
    adapters = inputs.adapters()
    if not adapters and not inputs.freezes_ends():
        return True, ""
    model = inputs.spec.skeleton
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [next(path for path, other in model.named_modules() if other is part) for part in parts]
    endings: set[str] = set()
    providers = inputs.view.pipeline.assembly.providers("sftx_adapter")
    for active in providers:
        endings.update(active.options.get("modules_to_save") or ())
    vocabulary = inputs.tokenizer.get_vocab()
    token_ids = {vocabulary[token] for token in tokens}
    if any(token_ids <= set(active.options.get("trainable_token_indices") or ()) for active in providers):
        return True, ""
    if all(any(f".{name}".endswith(f".{ending}") for ending in endings) for name in names):
        return True, ""
    short = ", ".join(name.rpartition(".")[2] for name in names)
    option = "lora.modules_to_save" if "lora" in adapters else "freeze.extra_modules" if not adapters else ""
    return False, f"; or train their embeddings: --set '{option}=[{short}]'" if option else ""


def untrained_weights(inputs: CheckInputs) -> Iterator[Finding]:
    """Find weights that this run would leave as they are, and an adapter that cannot adapt the model at all."""
    import torch

    from sftx.model.language_model import CausalLM

    adapters = inputs.adapters()
    assembly = inputs.view.pipeline.assembly
    chooses = bool(adapters or assembly.providers("sftx_trainable"))
    if not chooses and inputs.model_config.get_text_config() is inputs.model_config:
        return
    try:
        made, trainable = assembly.adapters(inputs.spec), assembly.trainable(inputs.spec)
    except ConfigError as error:
        yield Finding(
            "error", "untrained-weights", str(error), "choose what this model allows, or leave the plugin out"
        )
        return
    lm = CausalLM(inputs.spec.skeleton, inputs.tokenizer)
    with torch.device("meta"):
        lm.attach(made, trainable)
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
    untrained_tokens,
    vocabulary,
    base_model,
    untrained_weights,
    positions,
)
