"""The engine that generates answers gives those of transformers' `generate`, whichever rows share a batch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sftx.errors import ConfigError
from sftx.model import decoding
from sftx.model.decoding import Decoder, Request, Sampling
from sftx.model.language_model import CausalLM
from sftx.model.text_stream import TextStream

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gemma3_text": SMALL | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": SMALL | {"sliding_window": 5},
    "gemma2": SMALL | {"sliding_window": 4, "final_logit_softcapping": 5.0},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "deepseek_v3": {name: value for name, value in SMALL.items() if name != "head_dim"}
    | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
    | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1},
    "gpt_oss": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "cohere": SMALL | {"logit_scale": 0.3},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "minimax": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4},
    "qwen3_next": SMALL
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16},
}
STOPS = (3, 4)


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return make("llama")


def make(family: str) -> CausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not name.endswith("embed_tokens.weight"):
            parameter.data.mul_(4)  # so that the most likely token is one by a distance
    return CausalLM(model, None)  # type: ignore[arg-type]


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 64, (length,), generator=generator).tolist() for length in lengths]


def generated(lm: CausalLM, prompt: list[int], max_new_tokens: int, **settings: Any) -> list[int]:
    """Return transformers' own greedy answer to one prompt."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(STOPS), pad_token_id=0, **settings
    )
    has_router = hasattr(lm.model.config, "output_router_logits")
    more = {"output_router_logits": False} if has_router else {}
    ids = lm.model.generate(torch.tensor([prompt]), generation_config=config, **more)[0, len(prompt) :].tolist()
    end = next((at for at, token in enumerate(ids) if token in STOPS), len(ids))
    return ids[:end]


def answers(lm: CausalLM, requests: list[Request], max_rows: int) -> list[list[int]]:
    done = list(Decoder(lm, stop_ids=STOPS, max_rows=max_rows).run(requests))
    assert Counter(map(id, done)) == Counter(map(id, requests))  # each once
    return [request.answer_ids for request in requests]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family: str) -> None:
    lm = make(family)
    asked = prompts(3, 9, 1, 6, 12, 2, 7)
    expected = [generated(lm, prompt, 12) for prompt in asked]
    assert any(len(answer) == 12 for answer in expected)
    for max_rows in (1, 4):  # alone, and in a batch that rows leave and join
        requests = [Request(prompt, Sampling(12)) for prompt in asked]
        assert answers(lm, requests, max_rows) == expected
        assert {request.finish_reason for request in requests} <= {"stop", "length"}
    assert not lm.model.training


def test_a_repetition_penalty_is_that_of_transformers(lm: CausalLM) -> None:
    asked = prompts(3, 9)
    requests = [Request(prompt, Sampling(10, repetition_penalty=1.7)) for prompt in asked]
    expected = [generated(lm, prompt, 10, repetition_penalty=1.7) for prompt in asked]
    assert answers(lm, requests, 2) == expected
    assert expected != [generated(lm, prompt, 10) for prompt in asked]


def test_what_is_drawn_depends_on_the_seed_alone(lm: CausalLM) -> None:
    sampling = Sampling(20, temperature=1.3, seed=5)
    asked = prompts(4, 8, 2, 6, 5)
    together = answers(lm, [Request(prompt, sampling) for prompt in asked], 3)
    alone = [answers(lm, [Request(prompt, sampling)], 1)[0] for prompt in asked]
    assert together == alone
    other = answers(lm, [Request(prompt, dataclasses.replace(sampling, seed=6)) for prompt in asked], 3)
    assert other != together


def test_drawn_tokens_have_the_probabilities_of_the_model(lm: CausalLM) -> None:
    prompt = prompts(5)[0]
    with torch.no_grad():
        logits = lm.model(torch.tensor([prompt])).logits[0, -1]
    settings = {"temperature": 2.0, "top_k": 12, "top_p": 0.7, "min_p": 0.02}
    scores = logits[None]
    for warper in (TemperatureLogitsWarper(2.0), TopKLogitsWarper(12), TopPLogitsWarper(0.7), MinPLogitsWarper(0.02)):
        scores = warper(None, scores)
    expected = torch.softmax(scores[0], -1)
    kept = expected.nonzero().flatten().tolist()
    assert 2 <= len(kept) < 12
    requests = [Request(prompt, Sampling(1, seed=seed, **settings)) for seed in range(3000)]  # type: ignore[arg-type]
    list(Decoder(lm, stop_ids=(), max_rows=500).run(requests))
    counts = Counter(request.answer_ids[0] for request in requests)
    assert set(counts) == set(kept)
    for token, probability in zip(kept, expected[kept].tolist(), strict=True):
        spread = (probability * (1 - probability) / 3000) ** 0.5
        assert abs(counts[token] / 3000 - probability) < 5 * spread


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.9}, {"min_p": 0.02}, {"top_p": 0.999, "min_p": 1e-4}, {"top_k": 40, "top_p": 0.5}]
)
def test_few_tokens_are_sorted_where_no_other_can_be_drawn(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(4000)

    def drawn() -> list[int]:
        chosen = [Sampling(9, temperature=0.9, seed=seed, **settings) for seed in range(80)]
        return [decoding._draw(logits, Request([1], sampling)) for sampling in chosen]

    few = drawn()
    monkeypatch.setattr(decoding, "_FEW_TOKENS", 4000)
    assert few == drawn()


def test_tokens_drawn_without_a_filter_have_the_probabilities_of_the_model_with_other_requests_beside() -> None:
    torch.manual_seed(0)
    logits_BV = torch.randn(3, 8).repeat(1000, 1)
    temperatures = (2.0, 0.0, 0.5)
    requests = [Request([1], Sampling(1, temperature=temperatures[n % 3], seed=n)) for n in range(3000)]
    for request in requests[2::3][:500]:
        request.finish_reason = "stop"
    tokens = decoding._next_tokens(logits_BV, requests)
    assert set(tokens[1::3]) == {int(logits_BV[1].argmax())}
    for row, drawn in ((0, tokens[0::3]), (2, tokens[2::3][500:])):
        counts = Counter(drawn)
        for token, probability in enumerate(torch.softmax(logits_BV[row] / temperatures[row], -1).tolist()):
            spread = (probability * (1 - probability) / len(drawn)) ** 0.5
            assert abs(counts[token] / len(drawn) - probability) < 5 * spread


def test_rounding_of_nearly_equal_logits_changes_no_drawn_token() -> None:
    """As two processes, or another size of the batch, round them."""
    requests = [Request([1], Sampling(1, temperature=1.0, seed=seed)) for seed in range(300)]
    torch.manual_seed(0)
    logits_V = 1e-7 * torch.randn(1000)
    other_V = logits_V + 1e-7 * torch.randn(1000)
    assert logits_V.argsort().tolist() != other_V.argsort().tolist()
    tokens = decoding._next_tokens(logits_V.expand(300, -1), requests)
    assert tokens == decoding._next_tokens(other_V.expand(300, -1), requests)
    assert len(set(tokens)) > 200


def test_an_answer_ends_at_a_stop_text_and_its_row_makes_room(tiny_model_dir: Path) -> None:
    lm = CausalLM(AutoModelForCausalLM.from_pretrained(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir))
    asked = prompts(4, 9, 6)
    free = [Request(prompt, Sampling(12), TextStream(lm.tokenizer)) for prompt in asked]
    list(Decoder(lm, stop_ids=(), max_rows=2).run(free))
    texts = [request.text.text for request in free if request.text]
    assert texts == [lm.tokenizer.decode(request.answer_ids, skip_special_tokens=True) for request in free]
    stop = texts[0][4:7]
    stopped = [Request(prompt, Sampling(12), TextStream(lm.tokenizer, [stop])) for prompt in asked]
    list(Decoder(lm, stop_ids=(), max_rows=2).run(stopped))
    assert [request.text.text for request in stopped if request.text] == [text.partition(stop)[0] for text in texts]
    assert stopped[0].finish_reason == "stop"
    assert len(stopped[0].answer_ids) < 12


def test_log_probabilities_are_those_of_the_model(lm: CausalLM) -> None:
    request = Request(prompts(6)[0], Sampling(8, temperature=0.7, top_k=20))
    list(Decoder(lm, stop_ids=STOPS, max_rows=1, with_log_probabilities=True).run([request]))
    ids = [*request.prompt_ids, *request.answer_ids]
    with torch.no_grad():
        log_probabilities = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(log_probabilities[at - 1, ids[at]]) for at in range(6, len(ids))]
    assert request.log_probabilities[: len(expected)] == pytest.approx(expected, abs=1e-5)
    assert len(request.log_probabilities) == len(expected) + (request.finish_reason == "stop")


def test_the_next_turn_of_a_chat_begins_with_the_cache_of_the_last(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    decoder = lm.model.get_decoder()
    forward = type(decoder).forward

    def counted(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    engine = Decoder(lm, stop_ids=STOPS, max_rows=1)
    first = Request(prompts(10)[0], Sampling(6))
    list(engine.run([first]))
    turn = [*first.prompt_ids, *first.answer_ids, *prompts(4)[0]]
    second = Request(turn, Sampling(6))
    monkeypatch.setattr(decoder, "forward", counted.__get__(decoder))
    list(engine.run([second]))
    assert lengths[0] <= 5  # the new tokens, and the last of the answer, which was never an input
    assert second.answer_ids == generated(lm, turn, 6)
    lengths.clear()
    third = Request([*turn[:12], 9, 9], Sampling(6))  # another course of the same chat
    list(engine.run([third]))
    assert lengths[0] == 2
    assert third.answer_ids == generated(lm, third.prompt_ids, 6)  # type: ignore[arg-type]


def test_a_cancelled_request_ends_and_the_others_do_not_notice(lm: CausalLM) -> None:
    asked = prompts(4, 8, 6)
    requests = [Request(prompt, Sampling(12)) for prompt in asked]
    engine = Decoder(lm, stop_ids=(), max_rows=2)
    for request in requests:
        engine.submit(request)
    engine.step()
    engine.step()
    engine.cancel(requests[0])
    while engine.step():
        pass
    assert requests[0].finish_reason == "cancelled"
    assert len(requests[0].answer_ids) == 2
    assert engine.num_open == 0
    alone = [Request(prompt, Sampling(12)) for prompt in asked[1:]]
    list(Decoder(lm, stop_ids=(), max_rows=1).run(alone))
    assert [request.answer_ids for request in requests[1:]] == [request.answer_ids for request in alone]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "option 'max_new_tokens': got 0, expected a number at least 1"),
        ({"temperature": -1.0}, "option 'temperature': got -1.0, expected a number 0 or more"),
        ({"temperature": float("nan")}, "option 'temperature': got nan"),
        ({"top_p": 0.0}, "option 'top_p': got 0.0, expected a number above 0 and at most 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(**{"max_new_tokens": 1, **settings})
    assert message in str(caught.value)


def test_a_prompt_without_tokens_is_refused(lm: CausalLM) -> None:
    with pytest.raises(ConfigError, match="the prompt has no tokens"):
        Decoder(lm, stop_ids=(), max_rows=1).submit(Request([], Sampling(1)))
