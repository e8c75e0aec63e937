"""What is loaded trains every row that its data has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sftx.data.collate import pad
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec, load_tokenizer
from sftx.types import Example

END, OTHER = 2, 7  # <|im_end|> of the tokenizer, and any other token


@pytest.fixture
def padded_with_end(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model, its embedding untied, whose padding is the token that ends a turn."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    model = AutoModelForCausalLM.from_pretrained(directory, tie_word_embeddings=False)
    model.config.pad_token_id = END
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    assert (config["pad_token_id"], config["tie_word_embeddings"]) == (END, False)
    return directory


def gradient_of_rows(lm: CausalLM) -> torch.Tensor:
    """[V, D]: of the input embedding, for two rows of different lengths that hold the token in their middle."""
    examples = [
        Example([5, END, 9, 11, END], [False, True, True, True, True], "a", 0),
        Example([6, END, OTHER], [False, True, True], "b", 1),
    ]
    batch = pad(examples)
    logits_BTV = lm.logits(lm.hidden(batch).hidden_BTD)
    torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum").backward()
    gradient: torch.Tensor = lm.model.get_input_embeddings().weight.grad
    return gradient


def test_the_row_of_the_padding_token_is_trained_as_any_other(padded_with_end: Path) -> None:
    tokenizer = load_tokenizer(str(padded_with_end))
    theirs = AutoModelForCausalLM.from_pretrained(padded_with_end)
    assert theirs.get_input_embeddings().padding_idx == END, "transformers no longer does what this test is about"
    spec = load_spec(str(padded_with_end))
    ours = load_model(spec, [], dtype=torch.float32, device=torch.device("cpu"))
    reference = AutoModelForCausalLM.from_pretrained(padded_with_end, pad_token_id=None)
    assert reference.get_input_embeddings().padding_idx is None

    found, expected, lost = (gradient_of_rows(CausalLM(model, tokenizer)) for model in (ours, reference, theirs))
    assert torch.equal(found, expected)
    assert found[END].abs().max() > 0
    assert not lost[END].any(), "which is what was wrong"
    changed = [row for row in range(len(found)) if not torch.equal(found[row], lost[row])]
    assert changed == [END]


def test_the_forward_is_the_same_and_the_padding_itself_has_no_gradient(padded_with_end: Path) -> None:
    spec = load_spec(str(padded_with_end))
    ours = load_model(spec, [], dtype=torch.float32, device=torch.device("cpu"))
    theirs: Any = AutoModelForCausalLM.from_pretrained(padded_with_end)
    ids = torch.tensor([[5, END, 9, END]])
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    gradient = gradient_of_rows(CausalLM(ours, load_tokenizer(str(padded_with_end))))
    assert not gradient[0].any(), "id 0 lies under the padding alone"
