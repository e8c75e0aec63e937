"""Text that is streamed is the text of the whole answer, in whole characters, and ends before a stop string."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sftx.model import tiny
from sftx.model.text_stream import TextStream

ASSETS = Path(__file__).parents[2] / ".assets" / "tokenizers"
TEXTS = [
    "Hello, world.",
    " leading and trailing ",
    "多语言文本，包括中文。",
    "emoji 👩‍👩‍👧‍👦 and flags 🇫🇷🇩🇪, combining e\u0301",
    "line\n\n  breaks\tand\u00a0spaces",
    "",
]


@pytest.fixture(scope="module")
def tokenizers() -> list[PreTrainedTokenizerBase]:
    names = ("gemma3", "llama2", "qwen3", "mistral_nemo")  # with and without byte fallback
    return [AutoTokenizer.from_pretrained(path) for path in (tiny.model_dir(), *(ASSETS / name for name in names))]


def test_pieces_add_up_to_the_text(tokenizers: list[PreTrainedTokenizerBase]) -> None:
    for tokenizer in tokenizers:
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            stream = TextStream(tokenizer)
            pieces = [stream.add(token) for token in ids]
            assert all("\ufffd" not in piece for piece in pieces)
            pieces.append(stream.finish())
            assert "".join(pieces) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_any_tokens_add_up(tokenizers: list[PreTrainedTokenizerBase]) -> None:
    rng = random.Random(0)
    for tokenizer in tokenizers:
        for _ in range(50):
            ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(12))]
            stream = TextStream(tokenizer, skip_special_tokens=False)
            text = "".join([*map(stream.add, ids), stream.finish()])
            assert text == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((" wor",), "Hello,"),
        (("xyz",), "Hello, world. Hello again."),
        (("Hello a", "d. H"), "Hello, worl"),
        (("Hello, world. Hello again!",), "Hello, world. Hello again."),
        (("H",), ""),
        (("",), "Hello, world. Hello again."),
    ],
)
def test_an_answer_ends_before_a_stop_string(
    tokenizers: list[PreTrainedTokenizerBase], stop: tuple[str, ...], expected: str
) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer.encode("Hello, world. Hello again.", add_special_tokens=False)
        stream = TextStream(tokenizer, stop)
        shown = ""
        for token in ids:
            shown += stream.add(token)
            assert expected.startswith(shown)  # nothing is taken back
        assert shown + stream.finish() == expected
        assert stream.is_stopped == (expected != "Hello, world. Hello again.")
