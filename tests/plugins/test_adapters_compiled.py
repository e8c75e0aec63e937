"""Adapters whose layers are compiled, or computed again, have the gradients that they have in eager mode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from architectures import MIXTURES, SHAPE, write_model
from sessions import session_of
from sftx.trainer import layers
from trainers import denominator, planned

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WIDE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "experts": ("mixtral", "lora", {"r": 4}),
    "quantised experts": ("mixtral", "qlora", {"r": 4}),
    "dora": ("llama", "lora", {"r": 4, "use_dora": True, "lora_dropout": 0.2}),
    "pissa": ("llama", "lora", {"r": 4, "init_lora_weights": "pissa", "lora_dropout": 0.2}),
    "vera": ("llama", "vera", {"r": 8}),
    "qlora": ("llama", "qlora", {"r": 4, "use_dora": True}),
    "sinks": ("gpt-oss", "qlora", {"r": 4}),
}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend `eager` runs the traced graphs in torch; inductor takes a minute a case."""
    assert layers.compile_layers.__kwdefaults__ is not None
    monkeypatch.setitem(layers.compile_layers.__kwdefaults__, "backend", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(kind: str, directory: Path) -> Path:
    config = transformers.LlamaConfig(**SHAPE | WIDE) if kind == "llama" else MIXTURES[kind]()
    for name, value in WIDE.items():
        setattr(config, name, value)
    if kind == "gpt-oss":
        config.layer_types = config.layer_types[:1]
    return write_model(config, directory / "model")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "quantised experts" else pytest.mark.slow) for name in CASES]
)
def test_compiled_and_computed_again_it_has_the_same_gradients(name: str, tmp_path: Path) -> None:
    kind, adapter, options = CASES[name]
    model, data = made(kind, tmp_path), tmp_path / "rows.jsonl"
    rows = [{"prompt": f"what is {n} plus one", "completion": f"{n + 1} " * (n % 5 + 1)} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: list[dict[str, Tensor]] = []
    for compiled, again in ((False, False), (True, False), (False, True), (True, True)):
        given = {f"{adapter}__{key}": value for key, value in options.items()}
        given |= {"train__torch_compile": compiled, "train__gradient_checkpointing": again}
        session = session_of(model, data, adapter=adapter, **given)
        generator = torch.Generator().manual_seed(3)
        for _, parameter in sorted((n.replace("_orig_mod.", ""), p) for n, p in session.lm.named_parameters()):
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        session.lm.train()
        batches = session.trainer.micro_batches(planned(session.sampler.epoch(0)[0], session.data.examples))
        session.trainer.accumulate(batches, denominator(batches), 0)
        named = session.lm.named_parameters()
        found.append({n.replace("_orig_mod.", ""): p.grad.clone() for n, p in named if p.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, gradient in other.items():
            torch.testing.assert_close(gradient, found[0][key], rtol=1e-4, atol=1e-6, msg=key)
