"""LoRA on stacked experts and on Conv1D against the installed PEFT: files both ways, gradients, merged weights.

PEFT adapts stacked experts by adding B A to their weights, so it has no dropout for them; there the formula is the
oracle, in fp64.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from architectures import MIXTURES, write_model
from sessions import session_of
from sftx.errors import ConfigError
from sftx.trainer.session import Session
from sftx_plugins.adapters.lora_experts import LoraExperts
from trainers import denominator, planned

GPT2 = "gpt2"
CONFIGS: dict[str, Any] = {
    GPT2: lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
    ),
    **MIXTURES,
}
TARGETS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "one weight of the experts": {"target_modules": ["down_proj"]},
    "beside attention": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
}
GPT2_TARGETS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "one weight of the experts": {"target_modules": ["c_fc"]},
    "beside attention": {"target_modules": ["c_attn", "c_proj"]},
}
"""Conv1D has no experts; the same cases are other choices of its layers."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "rows.jsonl"
    rows = [{"prompt": f"what is {n} plus one", "completion": f"{n + 1} " * (n % 5 + 1)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that gives the directory of the model of a name."""
    written: dict[str, Path] = {}

    def model(name: str) -> Path:
        if name not in written:
            written[name] = write_model(CONFIGS[name](), tmp_path_factory.mktemp("model"))
        return written[name]

    return model


def tokens() -> Tensor:
    return torch.arange(80).view(2, 40) * 7 % 500


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def draw(parameters: Any) -> None:
    """Give trained parameters other values than their first ones, so that no update is zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05, generator=generator)


def base(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def saved_gradients(session: Session, directory: Path) -> dict[str, Tensor]:
    """Return the gradients under PEFT's names, in its layout: as if they were the values that are saved."""
    values = {p: p.data for p in session.lm.parameters() if p.requires_grad}
    for parameter in values:
        assert parameter.grad is not None
        parameter.data = parameter.grad
    directory.mkdir()
    session.lm.adapters["lora"].save(directory)
    for parameter, value in values.items():
        parameter.data = value
    return load_file(directory / "adapter_model.safetensors")


def cases() -> list[Any]:
    first_tier = {(name, "all-linear") for name in (GPT2, "mixtral", "gpt-oss")}
    first_tier.add(("deepseek-v3", "one weight of the experts"))
    every = [(name, targets) for name in CONFIGS for targets in TARGETS]
    return [pytest.param(*case, marks=() if case in first_tier else pytest.mark.slow) for case in every]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("name", "targets"), cases())
def test_it_agrees_with_peft(name: str, targets: str, models: Any, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    options = {f"lora__{key}": value for key, value in (GPT2_TARGETS if name == GPT2 else TARGETS)[targets].items()}
    if "lora__target_parameters" in options and name == "deepseek-v3":
        options["lora__target_modules"] = ["q_b_proj"]
    ours = session_of(models(name), data, lora__r=4, **options)
    adapter = ours.lm.adapters["lora"]
    has_experts = any(isinstance(module, LoraExperts) for module in ours.lm.modules())
    assert has_experts == (name != GPT2)
    untrained = logits(base(models(name)))
    torch.testing.assert_close(logits(ours.lm.model), untrained, rtol=1e-5, atol=1e-5)
    draw(ours.lm.parameters())

    # What is saved here is loaded there.
    adapter.save(tmp_path)
    theirs = PeftModel.from_pretrained(base(models(name)), tmp_path, is_trainable=True)
    assert (logits(theirs) - untrained).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours.lm.model), logits(theirs), rtol=1e-5, atol=1e-5)
    with ours.lm.without_adapters():
        torch.testing.assert_close(logits(ours.lm.model), untrained, rtol=1e-6, atol=1e-6)

    # The gradients are the same.
    for model in (ours.lm.model, theirs):
        model.train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    expected = {n.replace(".default", ""): p.grad for n, p in trained.items()}
    found = saved_gradients(ours, tmp_path / "gradients")
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert gradient.any()
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=key)

    # What is saved there is loaded here.
    draw(reversed(list(theirs.parameters())))
    theirs.save_pretrained(tmp_path / "theirs")
    assert get_peft_model_state_dict(theirs).keys() == found.keys()
    adapter.load(tmp_path / "theirs")
    torch.testing.assert_close(logits(ours.lm.model), logits(theirs), rtol=1e-5, atol=1e-5)

    # The merged weights are the same, in the model's own classes.
    adapter.merge(ours.lm)
    merged = dict(theirs.merge_and_unload().named_parameters())
    assert {n for n, _ in ours.lm.model.named_parameters()} == merged.keys()
    for key, parameter in ours.lm.model.named_parameters():
        torch.testing.assert_close(parameter, merged[key], rtol=1e-5, atol=1e-6, msg=key)
    classes = [type(module) for module in base(models(name)).modules()]
    assert [type(module) for module in ours.lm.model.modules()] == classes


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_dropout_is_the_formula_in_fp64(name: str, models: Any, data: Path) -> None:
    """Each expert's rows are dropped by masks of seed and layer; PEFT refuses dropout on parameters."""
    from sftx_kernels.dropout import dropped_mask, keep_scale, threshold_of

    session = session_of(models(name), data, lora__r=4, lora__lora_dropout=0.3)
    draw(session.lm.parameters())
    experts: Any = next(module for module in session.lm.modules() if isinstance(module, LoraExperts)).double().train()
    hidden = torch.randn(30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(n))[:2] for n in range(30)])
    weights = torch.rand(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    threshold, seed = threshold_of(0.3), int(experts.dropout_seed())

    def dropped(x: Tensor, number: int) -> Tensor:
        return x.masked_fill(dropped_mask(x.shape, threshold, seed + number, x.device), 0) * keep_scale(threshold)

    def project(name: str, x: Tensor, number: int) -> Tensor:
        A, B, W = (getattr(experts, name + end) for end in ("_lora_A", "_lora_B", ""))
        x_drop = dropped(x, number)
        rows = []
        for row, (expert, _) in enumerate(in_order):
            base = x[row] @ (W[expert] if experts.is_transposed else W[expert].T)
            rows.append(base + experts.scaling * (B[expert] @ (A[expert] @ x_drop[row])))
            if experts.has_bias:
                rows[-1] = rows[-1] + getattr(experts, f"{name}_bias")[expert]
        return torch.stack(rows)

    in_order = sorted((expert, flat) for flat, expert in enumerate(chosen.flatten().tolist()))
    x = torch.stack([hidden[flat // 2] for _, flat in in_order])
    out = project("down_proj", experts._apply_gate(project("gate_up_proj", x, 0)), 1)
    expected = torch.zeros_like(hidden)
    for row, (_, flat) in enumerate(in_order):
        expected[flat // 2] += out[row] * weights[flat // 2, flat % 2]
    found = experts(hidden, chosen, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, experts.eval()(hidden, chosen, weights))


def test_experts_learn_while_attention_is_frozen(data: Path, tmp_path: Path) -> None:
    config = MIXTURES["qwen3-moe"]()
    config.initializer_range = 0.2  # with the usual 0.02, an update of the experts hardly reaches the logits
    model = write_model(config, tmp_path)
    options = {"lora__target_modules": [], "lora__target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    session = session_of(model, data, train__learning_rate=2e-2, lora__r=4, **options)
    trained = {name for name, p in session.lm.model.named_parameters() if p.requires_grad}
    assert {name.partition("_proj_")[2] for name in trained} == {"lora_A", "lora_B"}
    assert all(".mlp.experts." in name for name in trained)
    losses = []
    for number in range(1, 31):
        session.lm.train()
        batches = session.trainer.micro_batches(planned(session.sampler.epoch(0)[0], session.data.examples))
        losses.append(session.trainer.train_step(number, 0, batches).loss)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradient_checkpointing_recomputes_the_same(dropout_p: float, models: Any, data: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        options = {"train__gradient_checkpointing": checkpointing, "lora__lora_dropout": dropout_p, "lora__r": 4}
        session = session_of(models("olmoe"), data, **options)
        draw(session.lm.parameters())
        batches = session.trainer.micro_batches(planned(session.sampler.epoch(0)[0], session.data.examples))
        session.trainer.accumulate(batches, denominator(batches), 0)
        gradients.append(torch.cat([p.grad.flatten() for p in session.trainer.parameters]))
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_the_loss_of_the_router_stays(models: Any, data: Path, tmp_path: Path) -> None:
    config = MIXTURES["mixtral"]()
    config.output_router_logits = True
    model = write_model(config, tmp_path)
    session = session_of(model, data, lora__r=4)
    batch = session.trainer.collator.collate(session.data.examples[:4])
    with session.lm.without_adapters():
        expected = session.lm.hidden(batch).aux_loss
    found = session.lm.hidden(batch).aux_loss
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_loraplus_reaches_the_experts(models: Any, data: Path) -> None:
    session = session_of(models("mixtral"), data, lora__r=4, lora__loraplus_lr_ratio=16.0)
    adapter = session.lm.adapters["lora"]
    trained = [name for name, parameter in session.lm.model.named_parameters() if parameter.requires_grad]
    scales = {name.rpartition("_")[2]: adapter.rate_scale(name) for name in trained}
    assert scales == {"A": 1.0, "B": 16.0}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixtral", {"target_parameters": ["w1"]}, r"target_parameters \['w1'\] match no.*down_proj, gate_up_proj"),
        ("gpt2", {"target_parameters": ["c_fc"]}, r"target_parameters \['c_fc'\] match no weight.*this model has none"),
        ("gpt2", {"target_modules": ["q_proj"]}, r"target_modules \['q_proj'\] match no linear layer.*c_attn, c_proj"),
        ("mixtral", {"r": 97}, "r=97 .*at most 32"),
        ("mixtral", {"target_modules": []}, r"target_modules \[\] match no linear layer"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, Any], message: str, models: Any, data: Path) -> None:
    with pytest.raises(ConfigError) as error:
        session_of(models(name), data, **{f"lora__{key}": value for key, value in options.items()})
    assert re.search(message, str(error.value))
