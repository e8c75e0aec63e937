"""Optimizers, their groups and their state: each updates as its library or formula does, and is resumed bit for bit."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import bitsandbytes
import lion_pytorch
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.optimization import Adafactor

from optimizing import assembled, learning_rates, run_optimizer
from sftx.assembly.discovery import load_class
from sftx.assembly.entry_points import discover, find
from sftx.config.options import TrainConfig
from sftx.errors import ConfigError, ModelError, PluginError
from sftx.model.language_model import CausalLM
from sftx.trainer.optimizer import RunOptimizer
from sftx.types import Adapter, ModelSpec
from sftx_plugins.adapters.lora import Lora
from sftx_plugins.optimizers.split_adamw import SplitAdamW, _join, _split

KINDS = ["adamw", "adamw_8bit", "adafactor", "lion", "sgd", "muon", "adamw_bf16"]
NUM_STEPS = 20
BETAS, EPSILON = (0.9, 0.97), 1e-6


def config_of(optim: str, **options: Any) -> TrainConfig:
    of_some = {"adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_epsilon": EPSILON, "momentum": 0.8}
    reads = getattr(load_class(find(optim, discover())), "train_options", ())
    values: dict[str, Any] = {
        "optim": optim,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "warmup_steps": 4,
        **{name: value for name, value in of_some.items() if name in reads},
    }
    return TrainConfig(**values | options)


@pytest.mark.parametrize(
    ("optim", "option", "others"),
    [
        ("sgd", {"adam_beta1": 0.8}, "adamw or"),
        ("adafactor", {"adam_beta2": 0.8}, "adamw or"),
        ("lion", {"adam_epsilon": 1e-6}, "adamw or"),
        ("adamw", {"momentum": 0.9}, "sgd or muon"),
    ],
)
def test_an_option_that_the_optimizer_does_not_read_is_refused(optim: str, option: dict[str, Any], others: str) -> None:
    (name,) = option
    with pytest.raises(
        ConfigError, match=f"option 'train.{name}': optim {optim} has none; leave it out, or .*{others}"
    ):
        assembled(TrainConfig(optim=optim, **option))


def base(*, tied: bool = False) -> LlamaForCausalLM:
    """Matrices above and below the 4096 numbers from which bitsandbytes keeps 8 bits, and vectors."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def full(optim: str = "adamw", *, tied: bool = False) -> CausalLM:
    dtype = torch.bfloat16 if optim == "adamw_bf16" else torch.float32
    return CausalLM(base(tied=tied).to(dtype), cast(Any, None))


def with_lora(*, tied: bool = True, new_token_ids: tuple[int, ...] = (), **options: Any) -> CausalLM:
    model = base(tied=tied)
    lm = CausalLM(model, cast(Any, None))
    spec = ModelSpec("tiny", model.config, model, new_token_ids=new_token_ids)
    lm.attach({"lora": Lora(r=4, **options).sftx_adapter(spec)})
    return lm


def put_gradients(lm: CausalLM, step: int) -> None:
    """Random ones of a step, of sizes that differ, a pure function of it."""
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(p for p in lm.parameters() if p.requires_grad):
        grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (-number % 4)
        parameter.grad = grad.to(parameter.dtype)


def advance(lm: CausalLM, optimizer: RunOptimizer, config: TrainConfig, steps: range) -> None:
    for step, rate in zip(steps, learning_rates(config, NUM_STEPS, steps), strict=True):
        optimizer.zero_grad()
        optimizer.set_learning_rate(rate)
        put_gradients(lm, step)
        optimizer.step()


def weights(lm: CausalLM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lm.named_parameters() if p.requires_grad}


Make = Callable[[CausalLM, TrainConfig], list[torch.optim.Optimizer]]


def split(lm: CausalLM, decay: float, names: Callable[[str], bool] = lambda name: True) -> list[dict[str, Any]]:
    chosen = [p for name, p in lm.named_parameters() if names(name)]
    groups = [
        {"params": [p for p in chosen if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in chosen if p.ndim == 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def is_hidden(name: str) -> bool:
    return "proj" in name


def adamw(lm: CausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(split(lm, 0.1), lr=1.0, betas=BETAS, eps=EPSILON)]


def adamw_8bit(lm: CausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    given = {"lr": 1.0, "betas": BETAS, "eps": EPSILON}
    embedding = split(lm, 0.1, lambda name: "embed" in name)
    others = split(lm, 0.1, lambda name: "embed" not in name)
    return [bitsandbytes.optim.AdamW8bit(others, **given), bitsandbytes.optim.AdamW(embedding, **given)]


def adafactor(lm: CausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    return [Adafactor(split(lm, 0.1), lr=1.0, scale_parameter=False, relative_step=False)]


def lion(lm: CausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    return [lion_pytorch.Lion(split(lm, 0.1), lr=1.0, betas=BETAS)]


class DecayedByHand(torch.optim.SGD):
    """torch's SGD, whose own weight decay is not decoupled, with the decoupled one before it."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(1 - self.param_groups[0]["lr"] * 0.1)
        return super().step(closure)


def sgd(lm: CausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    matrices, vectors = (group["params"] for group in split(lm, 0.1))
    return [DecayedByHand(matrices, lr=1.0, momentum=0.8), torch.optim.SGD(vectors, lr=1.0, momentum=0.8)]


def muon(lm: CausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    hidden = split(lm, 0.1, is_hidden)
    others = split(lm, 0.1, lambda name: not is_hidden(name))
    return [
        torch.optim.Muon(hidden, lr=1.0, momentum=0.8, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.0, betas=BETAS, eps=EPSILON),
    ]


@pytest.mark.parametrize("make", [adamw, adamw_8bit, adafactor, lion, sgd, muon], ids=lambda make: make.__name__)
def test_the_first_steps_are_those_of_the_library(make: Make) -> None:
    config = config_of(make.__name__)
    ours, theirs = full(), full()
    optimizer, oracles = run_optimizer(ours, config), make(theirs, config)
    before = weights(ours)
    for step, rate in enumerate(learning_rates(config, NUM_STEPS)):
        advance(ours, optimizer, config, range(step, step + 1))
        put_gradients(theirs, step)
        for oracle in oracles:
            for group in oracle.param_groups:
                group["lr"] = rate
            oracle.step()
        expected = weights(theirs)
        for name, value in weights(ours).items():
            if make in (adamw, muon):  # ours is fused: another order of the same operations in fp32
                torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=f"{name}, step {step}")
            else:
                assert torch.equal(value, expected[name]), (name, step)
    assert all(not torch.equal(value, before[name]) for name, value in weights(ours).items())


def test_adamw_bf16_is_the_formula_in_double_precision() -> None:
    """With the first moment rounded to bfloat16 between steps, as it is stored; nothing else may be lost."""
    config = config_of("adamw_bf16")
    lm = full("adamw_bf16")
    optimizer = run_optimizer(lm, config)
    exact = {name: value.double() for name, value in weights(lm).items()}
    first = {name: torch.zeros_like(value) for name, value in exact.items()}
    second = {name: torch.zeros_like(value) for name, value in exact.items()}
    for step, rate in enumerate(learning_rates(config, NUM_STEPS)):
        advance(lm, optimizer, config, range(step, step + 1))
        count = step + 1
        for name, p in lm.named_parameters():
            grad = cast(Tensor, p.grad).double()
            moment = BETAS[0] * first[name] + (1 - BETAS[0]) * grad
            first[name] = moment.bfloat16().double()
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * grad**2
            scale = (second[name] / (1 - BETAS[1] ** count)).sqrt() + EPSILON
            decay = 0.1 if p.ndim > 1 else 0.0
            exact[name] = exact[name] * (1 - rate * decay) - rate * moment / (1 - BETAS[0] ** count) / scale
    low = {name: optimizer.optimizers[0].state[p]["low_bits"] for name, p in lm.named_parameters()}
    for name, value in weights(lm).items():
        # A moment near the middle of two bfloat16 numbers may be rounded the other way: 2^-9 of one update.
        torch.testing.assert_close(_join(value, low[name]).double(), exact[name], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(value.double(), exact[name], rtol=2**-8, atol=2e-6)


def test_two_halves_of_a_number_lose_none_of_it() -> None:
    """Ties, signs, zeros and the smallest numbers too; the upper half is the nearest bfloat16 number."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).int()
    ties = (torch.arange(0x3F80, 0x4000, dtype=torch.int32) << 16) + 0x8000
    numbers = torch.cat([bits, ties, -(2**31) + ties, torch.tensor([0, -(2**31), 1, -(2**31) + 1], dtype=torch.int32)])
    numbers = numbers.view(torch.float32)
    numbers = numbers[numbers.isfinite() & (numbers.abs() < 3e38)]
    high, low = torch.zeros_like(numbers, dtype=torch.bfloat16), torch.zeros_like(numbers, dtype=torch.int16)
    _split(numbers, high, low)
    assert torch.equal(_join(high, low).view(torch.int32), numbers.view(torch.int32))
    assert torch.equal((high.float() - numbers).abs(), (numbers.bfloat16().float() - numbers).abs())


def test_adamw_bf16_does_what_plain_bfloat16_cannot() -> None:
    """Updates far below the spacing of bfloat16 numbers add up, to what fp32 weights would have become."""

    def moved(p: nn.Parameter, optimizer: Any) -> float:
        for _ in range(400):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return 1.0 - p.item()

    given: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}
    plain, ours = (nn.Parameter(torch.ones(1, dtype=torch.bfloat16)) for _ in range(2))
    assert moved(plain, torch.optim.AdamW([plain], **given)) == 0
    assert moved(ours, SplitAdamW([{"params": [ours]}], **given)) == pytest.approx(0.04, abs=2**-8)


# adamw_bf16 is for full fine-tuning only: see test_what_cannot_be_is_told.
@pytest.mark.parametrize(
    ("kind", "adapted"),
    [(kind, adapted) for kind in KINDS for adapted in (False, True) if kind != KINDS[-1] or not adapted],
)
def test_a_resumed_optimizer_goes_on_bit_for_bit(kind: str, adapted: bool, tmp_path: Path) -> None:
    def make() -> CausalLM:
        return with_lora(tied=False, modules_to_save=("lm_head", "embed_tokens")) if adapted else full(kind)

    config = config_of(kind, embedding_learning_rate=1e-3)
    straight = make()
    optimizer = run_optimizer(straight, config)
    advance(straight, optimizer, config, range(10))

    half = make()
    stopped = run_optimizer(half, config)
    advance(half, stopped, config, range(5))
    tensors, values = stopped.state_dict()
    save_file(tensors, tmp_path / "optimizer.safetensors")
    (tmp_path / "optimizer.json").write_text(json.dumps(values))

    resumed = make()
    resumed.load_state_dict(half.state_dict())
    again = run_optimizer(resumed, config)
    again.load_state_dict(
        load_file(tmp_path / "optimizer.safetensors"), json.loads((tmp_path / "optimizer.json").read_text())
    )
    advance(resumed, again, config, range(5, 10))
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(resumed).items())
    (ours, our_values), (theirs, their_values) = again.state_dict(), optimizer.state_dict()
    assert our_values == their_values
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        assert (value.dtype, value.device) == (theirs[key].dtype, theirs[key].device), key
        assert torch.equal(value, theirs[key]), key


def test_a_state_is_copied_when_it_is_loaded() -> None:
    config, lm = config_of("adamw"), full()
    optimizer = run_optimizer(lm, config)
    advance(lm, optimizer, config, range(2))
    tensors, values = optimizer.state_dict()
    kept = {key: value.clone() for key, value in tensors.items()}
    other = full()
    again = run_optimizer(other, config)
    again.load_state_dict(kept, values)
    expected = {key: value.clone() for key, value in kept.items()}
    advance(other, again, config, range(2, 4))
    assert all(torch.equal(value, expected[key]) for key, value in kept.items())


def test_a_state_of_something_else_is_refused() -> None:
    config = config_of("adamw")
    lm = with_lora()
    optimizer = run_optimizer(lm, config)
    advance(lm, optimizer, config, range(1))
    tensors, values = optimizer.state_dict()
    first = next(iter(weights(lm)))

    def refused(tensors: dict[str, Tensor], values: dict[str, Any], lm: CausalLM, config: TrainConfig) -> str:
        fresh = run_optimizer(lm, config)
        with pytest.raises(ModelError) as caught:
            fresh.load_state_dict(tensors, values)
        assert not any(fresh.state_dict()[0]), "nothing may have been taken"
        return str(caught.value)

    assert "adamw, this run has lion" in refused(tensors, values, with_lora(), config_of("lion"))
    wider = with_lora(modules_to_save=("lm_head", "embed_tokens"))
    assert "lacks model.model.embed_tokens.weight" in refused(tensors, values, wider, config)
    narrower = with_lora(target_modules=("k_proj",))
    assert "q_proj.lora_A, which does not train in this run" in refused(tensors, values, narrower, config)
    parameters = {**values["parameters"], first: {**values["parameters"][first], "shape": [1, 2]}}
    message = refused(tensors, {**values, "parameters": parameters}, with_lora(), config)
    assert f"{first} of shape [1, 2]; here it has [4, 64]" in message
    lost = {key: value for key, value in tensors.items() if key != f"{first}/exp_avg"}
    assert f"lacks the tensor {first}/exp_avg" in refused(lost, values, with_lora(), config)
    more = {**tensors, f"{first}/other": torch.zeros(1)}
    assert f"too many: {first}/other" in refused(more, values, with_lora(), config)


def rates(lm: CausalLM, optimizer: RunOptimizer) -> dict[str, tuple[float, float]]:
    """The rate and the decay of every parameter that is updated."""
    names = {id(p): name for name, p in lm.named_parameters()}
    groups = [group for one in optimizer.optimizers for group in one.param_groups]
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("kind", KINDS)
def test_groups_keep_their_scale_while_the_rate_moves(kind: str) -> None:
    lm, config = full(kind), config_of(kind, embedding_learning_rate=3e-4)
    optimizer = run_optimizer(lm, config)
    for rate in (1e-3, 5e-4):
        optimizer.set_learning_rate(rate)
        found = rates(lm, optimizer)
        assert set(found) == set(weights(lm))
        for name, (got, decay) in found.items():
            is_end = "embed_tokens" in name or "lm_head" in name
            assert got == pytest.approx(rate * (0.1 if is_end else 1.0)), name
            assert decay == (0.0 if "norm" in name else 0.1), name


def test_rows_of_added_tokens_have_the_rate_of_the_embedding() -> None:
    lm = with_lora(new_token_ids=(90, 91))
    optimizer = run_optimizer(lm, config_of("muon", embedding_learning_rate=3e-4))
    optimizer.set_learning_rate(3e-3)
    found = rates(lm, optimizer)
    (rows,) = (name for name in found if "rows_AD" in name)
    assert {name for name, (rate, _) in found.items() if rate == pytest.approx(3e-4)} == {rows}
    assert len(found) == 1 + 2 * 2 * 7
    muon, rest = optimizer.optimizers
    assert [p.shape for group in rest.param_groups for p in group["params"]] == [(2, 64)]
    assert len([p for group in muon.param_groups for p in group["params"]]) == 2 * 2 * 7


def test_lora_plus_has_the_groups_of_peft() -> None:
    lm = with_lora(loraplus_lr_ratio=16.0)
    optimizer = run_optimizer(lm, config_of("adamw"))
    optimizer.set_learning_rate(1e-4)
    ours = {name.removeprefix("model."): value for name, value in rates(lm, optimizer).items()}
    model = get_peft_model(base(tied=True), LoraConfig(r=4, target_modules="all-linear"))
    oracle = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    names = {id(p): name for name, p in model.named_parameters()}
    theirs = {
        names[id(p)].removeprefix("base_model.model.").removesuffix(".default.weight"): (
            pytest.approx(group["lr"]),
            group["weight_decay"],
        )
        for group in oracle.param_groups
        for p in group["params"]
    }
    assert ours == theirs
    assert {rate for rate, _ in ours.values()} == {1e-4, 16e-4}


def test_a_scale_that_is_none_is_refused() -> None:
    lm = with_lora()
    for scale in (0.0, -1.0, math.nan, math.inf, None, "2"):
        cast(Any, lm.adapters["lora"]).rate_scale = lambda name, scale=scale: scale
        with pytest.raises(PluginError, match=r"rate_scale of .*lora_A is .*, expected a number above 0"):
            run_optimizer(lm, config_of("adamw"))


def test_an_adapter_without_a_scale_has_the_rate_itself() -> None:
    assert Adapter.rate_scale(cast(Adapter, SimpleNamespace()), "any") == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "paged_adamw"}, "paged_adamw needs a GPU.*use adamw"),
        ({"optim": "paged_adamw_8bit"}, "needs a GPU.*use adamw_8bit"),
        ({"optim": "lion", "momentum": 0.9}, "train.momentum.*lion has none"),
        ({"optim": "adamw_bf16"}, "full fine-tuning with bf16.*trains in float32"),
        ({"optim": "adamw", "embedding_learning_rate": 1e-3}, "neither the embedding nor the head trains"),
    ],
)
def test_what_cannot_be_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_optimizer(with_lora(), config_of(**options))


def test_muon_without_a_matrix_is_told() -> None:
    lm = full()
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(ConfigError, match="muon trains the layers' matrices"):
        run_optimizer(lm, config_of("muon"))


def test_a_missing_bitsandbytes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        run_optimizer(with_lora(), config_of("adamw_8bit"))


def test_a_model_that_is_frozen_is_told() -> None:
    lm = full()
    lm.requires_grad_(False)
    with pytest.raises(ModelError, match="nothing is left to train"):
        run_optimizer(lm, config_of("adamw"))
