"""Experts that train as a whole multiply in autocast's dtype; without autocast nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from architectures import MIXTURES
from sftx.model import experts


def gradients(model: Any, *, autocast: bool) -> dict[str, torch.Tensor]:
    """Returns the gradients of the experts' weights, by name."""
    model.zero_grad()
    ids_BT = torch.arange(24)[None] * 7 % 200
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        states_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    (states_BTD.float() * torch.linspace(-1, 1, states_BTD.shape[-1])).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if ".experts." in name and p.grad is not None}


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_follow_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = MIXTURES[name]()
    config.num_experts_per_tok = config.num_local_experts  # no rounding sends a token to another expert
    model: Any = AutoModelForCausalLM.from_config(config)
    exact, before = gradients(model, autocast=False), gradients(model, autocast=True)
    experts.use_autocast(model)
    assert model.config._experts_implementation == experts.NAME
    assert all(torch.equal(gradient, exact[key]) for key, gradient in gradients(model, autocast=False).items())
    dtypes = []
    grouped_mm = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda a, b, **k: dtypes.append((a.dtype, b.dtype)) or grouped_mm(a, b, **k)
    )
    after = gradients(model, autocast=True)
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}
    for key, gradient in after.items():
        assert gradient.dtype == torch.float32
        norm = exact[key].norm()
        assert not torch.equal(gradient, before[key])
        assert (gradient - exact[key]).norm() < 2**-6 * norm
