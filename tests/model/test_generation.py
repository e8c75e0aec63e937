"""Greedy answers in left-padded batches are those of one row at a time, and of transformers without padding."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sftx.data.collate import pad
from sftx.model.generation import (
    generate_greedy,
    generation_defaults,
    load_generation_config,
    read_generation_settings,
    token_ids,
)
from sftx.model.language_model import CausalLM
from sftx.model.load import load_spec
from sftx.testing.kit import built_in
from sftx.types import Example
from trainers import answers_in_order

NEW = 12


def load(directory: Path, *, adapter: bool = False, **settings: Any) -> CausalLM:
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.generation_config.update(**settings)
    lm = CausalLM(model, AutoTokenizer.from_pretrained(directory))
    if adapter:
        lm.attach({"lora": built_in("lora").sftx_adapter(load_spec(str(directory)))})
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return lm


def prompts(lm: CausalLM) -> list[list[int]]:
    """Prompts of 1 to 90 tokens, in no order."""
    rng = random.Random(1)
    return [[rng.randrange(len(lm.tokenizer)) for _ in range(length)] for length in (7, 90, 1, 33, 2, 60, 7, 18, 41)]


def by_hand(lm: CausalLM, prompt: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """Generates an answer token by token, without a cache."""
    ids = list(prompt)
    lm.eval()
    for _ in range(NEW):
        batch = pad([Example(ids, [True] * len(ids), "row", 0)])
        with torch.no_grad():
            token = int(lm.logits(lm.hidden(batch).hidden_BTD)[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_batch_answers_as_one_row_at_a_time(tiny_model_dir: Path, adapter: bool) -> None:
    lm = load(tiny_model_dir, adapter=adapter)
    asked = prompts(lm)
    free = [by_hand(lm, prompt, ()) for prompt in asked]
    stop_ids = (free[0][3], free[1][7])  # so that rows end at different tokens
    expected = [by_hand(lm, prompt, stop_ids) for prompt in asked]
    lengths = {len(answer) for answer in expected}
    assert min(lengths) < NEW == max(lengths), "some rows stop, and some do not"
    for batch_size in (1, 4, len(asked)):
        found = answers_in_order(lm, asked, max_new_tokens=NEW, stop_ids=stop_ids, batch_size=batch_size)
        assert found == expected, f"{batch_size} rows at once"
    for prompt, answer in zip(asked, expected, strict=True):
        settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=list(stop_ids), pad_token_id=0)
        theirs: Any = lm.model.generate(torch.tensor([prompt]), generation_config=settings)
        ids = theirs[0, len(prompt) :].tolist()
        assert ids[: len(answer)] == answer
        assert ids[len(answer) :] == [] or ids[len(answer)] in stop_ids


def test_the_adapter_changes_the_answers(tiny_model_dir: Path) -> None:
    lm = load(tiny_model_dir, adapter=True)
    ask = {"max_new_tokens": NEW, "stop_ids": (), "batch_size": 4}
    attached = answers_in_order(lm, prompts(lm), **ask)
    with lm.without_adapters():
        assert answers_in_order(lm, prompts(lm), **ask) != attached


def test_rows_of_added_tokens_are_written_into_the_weights_once_a_batch(tiny_model_dir: Path) -> None:
    lm = CausalLM(AutoModelForCausalLM.from_pretrained(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir))
    spec = dataclasses.replace(load_spec(str(tiny_model_dir)), new_token_ids=(5, 6))
    lm.attach({"lora": built_in("lora").sftx_adapter(spec)})
    asked = prompts(lm)
    expected = [by_hand(lm, prompt, ()) for prompt in asked]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert answers_in_order(lm, asked, max_new_tokens=NEW, stop_ids=(), batch_size=len(asked)) == expected
    copies = {event.key: event.count for event in profile.key_averages()}["aten::index_copy"]
    assert copies == 2, "one for the embedding and one for the head, however many tokens are generated"


def test_settings_of_the_model_do_not_make_answers_depend_on_padding(tiny_model_dir: Path) -> None:
    plain, odd = load(tiny_model_dir), load(tiny_model_dir, repetition_penalty=5.0, max_length=3, num_beams=2)
    asked = prompts(plain)
    expected = [by_hand(plain, prompt, ()) for prompt in asked]
    assert answers_in_order(odd, asked, max_new_tokens=NEW, stop_ids=(), batch_size=4) == expected
    assert odd.model.generation_config.repetition_penalty == 5, "what the artefact will say is as it was"


def test_answers_come_when_they_are_complete_and_stop_where_asked(tiny_model_dir: Path) -> None:
    lm = load(tiny_model_dir)
    lm.train()
    settings = lm.model.generation_config
    asked = prompts(lm)
    given = generate_greedy(lm, asked, max_new_tokens=3, stop_ids=(), batch_size=4)
    first = [next(given)[0] for _ in range(4)]
    assert first == [1, 5, 8, 3], "the longest first"
    assert sorted(first + [index for index, _ in given]) == list(range(len(asked)))

    calls = 0

    def stop_in_the_second() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # before each of three tokens, and of the first one of the next rows
            raise KeyboardInterrupt

    got = []

    def ask() -> None:
        for index, _ in generate_greedy(
            lm, asked, max_new_tokens=3, stop_ids=(), batch_size=4, check_stop=stop_in_the_second
        ):
            got.append(index)

    with pytest.raises(KeyboardInterrupt):
        ask()
    assert got == first
    assert lm.training
    assert lm.model.generation_config is settings


@pytest.mark.parametrize(
    ("own", "pad", "stop", "expected_ends", "expected_pad"),
    [
        (0, None, (2,), [2, 0], 2),
        ([0, 5], 7, (2,), [2, 0, 5], 7),
        (2, None, (2,), 2, 2),
        (None, None, (2, 3), [2, 3], 2),
        (None, None, (), None, 2),
    ],
)
def test_the_saved_settings_stop_at_the_template_s_tokens(
    tiny_model_dir: Path, own: Any, pad: Any, stop: tuple[int, ...], expected_ends: Any, expected_pad: int
) -> None:
    lm = load(tiny_model_dir, temperature=0.6, do_sample=True)
    lm.model.generation_config.eos_token_id = own
    lm.model.generation_config.pad_token_id = pad
    assert lm.tokenizer.pad_token_id == 2
    settings = generation_defaults(lm, stop)
    assert settings.eos_token_id == expected_ends
    assert settings.pad_token_id == expected_pad
    assert settings.temperature == 0.6, "the rest is the model's own"
    assert lm.model.generation_config.eos_token_id == own, "which is not changed itself"


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "{", "", "7"])
def test_generation_settings_that_are_no_json_object_are_said_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    assert load_generation_config(str(tmp_path)) is not None, "transformers would read the file itself, and fail"
    assert read_generation_settings(str(tmp_path)) is None
    assert [r.getMessage() for r in caplog.records] == [
        f"model {tmp_path}: its generation_config.json is no JSON object, and is not used"
    ]


@pytest.mark.parametrize("wrong", ["x", -5, 1.5, True, [1, None, "a"], [[2]], {}, 2**40])
@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
def test_what_is_no_token_id_is_left_out_of_the_settings_and_said(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, wrong: Any
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: wrong, "bos_token_id": 0}), encoding="utf-8")
    settings: Any = load_generation_config(str(tmp_path))
    assert (getattr(settings, name), settings.bos_token_id) == (None, 0)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"model {tmp_path}: its generation settings {name}={wrong!r} are left out")
    assert line.endswith("(a token id is a whole number from 0)")
    with pytest.raises(ValueError, match="a token id is a whole number from 0"):
        token_ids(wrong)


def test_a_saved_model_stops_by_itself(tiny_model_dir: Path, tmp_path: Path) -> None:
    lm = load(tiny_model_dir)
    prompt = prompts(lm)[0]
    stop = by_hand(lm, prompt, ())[3]
    expected = by_hand(lm, prompt, (stop,))
    lm.model.save_pretrained(tmp_path)
    generation_defaults(lm, (stop,)).save_pretrained(tmp_path)
    assert "_from_model_config" not in (tmp_path / "generation_config.json").read_text()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    out = saved.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    assert out[0, len(prompt) :].tolist() == [*expected, stop]
