"""How a tokenizer is written in GGUF, so that llama.cpp makes the same tokens of a text.

llama.cpp knows each way of splitting text by a name; a file with the wrong name loads and gives other tokens in
silence. So the parts of a tokenizer are compared with those that are known, and everything else is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from sftx import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_REST: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
_DEEPSEEK3: Final = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" + "\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[" + "\r\n" + r"]*|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+",
)
_DIGITS: Final = "each digit"
_GPT2: Final = "GPT-2's words"
"""The regular expression that is built into the pre-tokenizer ByteLevel."""

PRE_TOKENIZERS: Final[dict[tuple[tuple[str, ...], bool], str]] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_LLAMA3.replace("{1,3}", ""),), False): "qwen2",
    ((f"{_WORDS[0]}|{_WORDS[1]}" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST,), True): "tekken",
    (
        (
            f"{_WORDS[0]}{_CONTRACTIONS}?|{_WORDS[1]}{_CONTRACTIONS}?"
            + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
            + _REST,
        ),
        False,
    ): "gpt-4o",
    (_DEEPSEEK3, False): "deepseek-v3",
}
"""llama.cpp's names of what splits the text of byte-level tokenizers, by its expressions and `ignore_merges`."""

PHI_3: Final = re.compile(r"phi-?3", re.IGNORECASE)
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_PREFIX: Final = "▁"


def write(
    writer: GGUFWriter,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    stop_ids: Sequence[int],
    more: Sequence[int],
) -> None:
    """Write the tokenizer with its chat template, padded to the model's `num_tokens` embeddings.

    `stop_ids`: all of them stop an answer; of `more`, as many as there is room for, which is three with the
    tokenizer's own end. Raises ConfigError for a tokenizer of which llama.cpp would make other tokens.
    """
    from gguf import TokenType

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _refused(tokenizer, f"its model is {model['type']}, and only BPE is known")
    steps = _steps(state["pre_tokenizer"])
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    tokens = {number: token for token, number in model["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for token in state["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if (last := max(tokens)) >= num_tokens:
        raise _refused(tokenizer, f"its last token is {last}, and the model has {num_tokens} embeddings")
    for number in range(num_tokens):
        if number not in tokens:
            tokens[number], types[number] = f"[PAD{number}]", TokenType.UNUSED
    if len(set(tokens.values())) < num_tokens:  # llama.cpp would abort the process that loads it
        twice = next(text for text, times in Counter(tokens.values()).items() if times > 1)
        raise _refused(tokenizer, f"two of its tokens are {twice!r}")
    if is_byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tokenizer, state, steps))
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        has_template = tokenizer.chat_template is not None
        writer.add_add_space_prefix(_space_prefix(tokenizer, state, steps, has_template=has_template))
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(model["merges"]):
            ranks.setdefault("".join(merge), rank)
        # llama.cpp joins the pair of the highest score first, as tokenizers does that of the lowest rank.
        writer.add_token_scores([-float(ranks.get(tokens[number], 0)) for number in range(num_tokens)])
        for number, text in tokens.items():
            if number == tokenizer.unk_token_id:
                types[number] = TokenType.UNKNOWN
            elif types[number] == TokenType.NORMAL and _BYTE.fullmatch(text):
                types[number] = TokenType.BYTE
    writer.add_token_list([tokens[number] for number in range(num_tokens)])
    writer.add_token_types([types[number] for number in range(num_tokens)])
    _write_special(writer, tokenizer, stop_ids, more)


def model_name(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name that the file gives its model: that of the base, but where llama.cpp would read more into it.

    Control tokens swallow the white space after them, as those of Phi-3 do, if the name holds phi-3 or phi3.
    """
    swallow = any(token.special and token.rstrip for token in tokenizer.added_tokens_decoder.values())
    if swallow == (PHI_3.search(name) is not None):
        return name
    return f"{name}-phi-3" if swallow else PHI_3.sub("phi_3", name)


def pre_tokenizer(name: str) -> PreTokenizer | None:
    """Return what splits text as llama.cpp does under this name, None for a name that is not known here."""
    from tokenizers import Regex, pre_tokenizers

    expressions = next((expressions for (expressions, _), known in PRE_TOKENIZERS.items() if known == name), None)
    if expressions is None:
        return None
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if expression == _DIGITS
        else pre_tokenizers.Split(Regex(expression), behavior="isolated")
        for expression in expressions
        if expression != _GPT2
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_GPT2 in expressions)
    return pre_tokenizers.Sequence([*steps, byte_level])


def _refused(tokenizer: PreTrainedTokenizerBase, reason: str) -> ConfigError:
    return ConfigError(f"the tokenizer of {tokenizer.name_or_path} cannot be written as GGUF: {reason}")


def _steps(part: Any) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer in a flat list."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part.get("normalizers", part.get("pretokenizers", ())) for step in _steps(inner)]
    return [part]


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """Return llama.cpp's name of how a byte-level tokenizer splits text. Raises ConfigError for an unknown way."""
    model = state["model"]
    # llama.cpp does not normalise: text that is not NFC already gets other tokens, as it does from its own converter.
    others = [step["type"] for step in _steps(state["normalizer"]) if step["type"] != "NFC"]
    if others:
        raise _refused(tokenizer, f"it normalises text with {', '.join(others)}, which llama.cpp does not")
    for option in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise _refused(tokenizer, f"its {option} is {model[option]!r}, and llama.cpp knows none of byte-level BPE")
    expressions = []
    for step in steps:
        if step["type"] == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
            expressions.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            expressions.append(_DIGITS)
        elif step["type"] == "ByteLevel" and step is steps[-1] and not step["add_prefix_space"]:
            expressions += [_GPT2] if step["use_regex"] else []
        else:
            expressions.append(f"an unknown {step['type']}")
    name = PRE_TOKENIZERS.get((tuple(expressions), bool(model.get("ignore_merges"))))
    if name is None:
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        raise _refused(tokenizer, f"it splits text in none of the ways that are known here: {known}")
    return name


def _space_prefix(
    tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], steps: list[dict[str, Any]], *, has_template: bool
) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before a text. Raises ConfigError for an unknown one."""
    match [_simple(step) for step in (*_steps(state["normalizer"]), *steps)]:
        case [("Prepend", "▁"), ("Replace", " ", "▁")]:
            return True
        case [("Replace", " ", "▁")] | [("Replace", " ", "▁"), ("Split", " ")] | [("Metaspace", "never")]:
            return False
        case [("Metaspace", "always")]:
            return True
        case [("Metaspace", "first")]:
            # A rendered conversation begins with a control token, after which there is no first text.
            return not has_template
    raise _refused(tokenizer, "its normalizer and pre-tokenizer are none of those that SentencePiece's models have")


def _simple(step: dict[str, Any]) -> tuple[str, ...]:
    """Return what matters of a step of a SentencePiece tokenizer."""
    match step:
        case {"type": "Prepend", "prepend": text}:
            return "Prepend", text
        case {"type": "Replace", "pattern": {"String": text}, "content": content}:
            return "Replace", text, content
        case {"type": "Split", "pattern": {"String": text}, "behavior": "MergedWithPrevious", "invert": False}:
            return "Split", text
        case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
            return "Metaspace", scheme
    return (step["type"], "unknown")


def _write_special(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], more: Sequence[int]
) -> None:
    own = tokenizer.eos_token_id  # templates write it by this name, so it must stay the end of the file's tokenizer
    ends = list(dict.fromkeys([*([own] if isinstance(own, int) else []), *stop_ids, *more]))
    if unwritten := [number for number in ends[3:] if number in stop_ids]:
        texts = ", ".join(tokenizer.convert_ids_to_tokens(unwritten))
        raise _refused(tokenizer, f"GGUF has three tokens that end an answer, and the run has more of them: {texts}")
    for number, add in zip(
        ends, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False
    ):
        add(number)
    begins = begins_with_bos(tokenizer)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether text begins with bos: prompts as the chat template writes them, else what the tokenizer adds.

    llama.cpp puts it before each prompt, and takes away the one that the template writes.
    """
    if not isinstance(tokenizer.bos_token, str):
        return False
    if isinstance(tokenizer.chat_template, str):
        question = [{"role": "user", "content": "a"}]
        try:
            text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        except (
            Exception
        ):  # a template raises anything for a conversation that it does not write, such as one without tools
            pass
        else:
            return str(text).startswith(tokenizer.bos_token)
    return bool(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
