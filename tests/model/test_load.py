"""What is loaded trains every row that its data has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sftx import ModelError, ModelSpec
from sftx.data.collate import pad
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec, load_tokenizer
from sftx.types import Example

QUANTISED = "model.layers.0.mlp.up_proj.weight"
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


# --- damaged files ----------------------------------------------------------------------------------


def test_the_first_weight_of_another_shape_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    spec, tensors = copied(tiny_model_dir, tmp_path)
    tensors[QUANTISED] = torch.zeros(3, 5)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    said = (
        r"0 tensors are missing and 1 have another shape \(first: model\.layers\.0\.mlp\.up_proj\.weight is \[3, 5\], "
    )
    with pytest.raises(ModelError, match=said + r"expected \[\d+, \d+\]\); the files do not fit its config\.json$"):
        load_model(spec, [], dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("tokenizer.json", '{"version": ', "its tokenizer.json cannot be read: Expecting value"),
        ("tokenizer.json", "{}", "cannot load its tokenizer: KeyError: 'added_tokens'"),
        ("tokenizer.json", None, "has no tokenizer.json; copy the tokenizer's files"),
        ("tokenizer_config.json", "[]", "its tokenizer_config.json is no JSON object"),
        ("special_tokens_map.json", "[", "its special_tokens_map.json cannot be read: Expecting value"),
    ],
)
def test_the_damaged_file_of_a_tokenizer_is_named(
    tiny_model_dir: Path, tmp_path: Path, file: str, text: str | None, said: str
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    if text is None:
        (tmp_path / "model" / file).unlink()
    else:
        (tmp_path / "model" / file).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(tmp_path / "model"))
    assert str(caught.value).startswith(f"model {tmp_path / 'model'}: {said}")


# --- quantised weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.int8, r"its files hold model\.layers\.0\.mlp\.up_proj\.weight as I8"),
        (torch.uint8, r"its files hold model\.layers\.0\.mlp\.up_proj\.weight as U8"),
        (torch.float8_e4m3fn, r"its files hold model\.layers\.0\.mlp\.up_proj\.weight as F8_E4M3"),
    ],
)
def test_weights_that_are_quantised_are_refused_without_a_configuration_that_says_so(
    tiny_model_dir: Path, tmp_path: Path, dtype: torch.dtype, said: str
) -> None:
    spec, tensors = copied(tiny_model_dir, tmp_path)
    tensors[QUANTISED] = tensors[QUANTISED].to(dtype)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=said + ", and sftx does not train on weights quantised so"):
        load_model(spec, [], dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("beside", ["SCB", "weight_scale_inv", "absmax", "qzeros"])
def test_what_quantisation_keeps_beside_weights_is_refused(tiny_model_dir: Path, tmp_path: Path, beside: str) -> None:
    spec, tensors = copied(tiny_model_dir, tmp_path)
    name = QUANTISED.replace("weight", beside)
    save_file(tensors | {name: torch.ones(4)}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"its files hold {name}, and sftx does not train on weights quantised so"):
        load_model(spec, [], dtype=torch.float32, device=torch.device("cpu"))


def copied(model: Path, tmp_path: Path) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    shutil.copytree(model, tmp_path / "model")
    return load_spec(str(tmp_path / "model")), load_file(model / "model.safetensors")
