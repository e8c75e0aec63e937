"""Adapters that stay as they are below the one that trains, against several active adapters of the installed PEFT."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import sftx
from architectures import MIXTURES, SHAPE, write_model
from sftx.checkpoint.load_run import load_run
from sftx.errors import ConfigError, ModelError
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec, load_tokenizer
from sftx.testing.runs import run_tiny
from sftx_plugins.adapters.lora import Lora
from sftx_plugins.adapters.lora_adapter import LoraAdapter

UNTIED = {**SHAPE, "tie_word_embeddings": False}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**UNTIED),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
    ),
    **MIXTURES,
}
IDS = torch.arange(24).view(2, 12) * 7 % 199 + 1
ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}]} for n in range(8)
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def adapter_of(model: Path, directory: Path, **options: Any) -> Path:
    """Save an adapter of PEFT with random weights, and return its directory."""
    given = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM", **options}
    shaken(get_peft_model(base(model), LoraConfig(**given))).save_pretrained(directory)
    return directory


def attached(model: Path, **options: Any) -> tuple[CausalLM, LoraAdapter]:
    plugin: Any = Lora(**options)
    spec = load_spec(str(model))
    plugin.sftx_validate(sftx.RunInfo(Path(), {}))
    adapter = plugin.sftx_adapter(spec)
    lm = CausalLM(
        load_model(spec, [adapter], dtype=torch.float32, device=torch.device("cpu")), load_tokenizer(str(model))
    )
    torch.manual_seed(0)
    lm.attach({"lora": adapter})
    return lm, adapter


def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


def loss(model: Any) -> Tensor:
    return nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def peft_with(model: Path, below: list[Path], **options: Any) -> PeftModel:
    """Return PEFT's model with several active adapters, of which the last one trains."""
    theirs = PeftModel.from_pretrained(base(model), below[0], adapter_name="below-0")
    for number, directory in enumerate(below[1:], 1):
        theirs.load_adapter(directory, adapter_name=f"below-{number}")
    theirs.add_adapter("own", LoraConfig(task_type="CAUSAL_LM", **options))
    theirs.base_model.set_adapter([*(f"below-{n}" for n in range(len(below))), "own"])
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(".own" in name)
    return theirs


CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "all layers": ("llama", [{"r": 3, "lora_alpha": 5, "use_rslora": True}], {"target_modules": ["q_proj"]}),
    "other layers": ("llama", [{"target_modules": ["q_proj", "up_proj"]}], {"target_modules": ["v_proj", "q_proj"]}),
    "two": (
        "llama",
        [{"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 2}}, {"r": 2, "lora_alpha": 7}],
        {"target_modules": ["q_proj", "down_proj"]},
    ),
    "Conv1D": (
        "gpt2",
        [{"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}],
        {"target_modules": ["c_attn"]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_peft_does_with_several_active_adapters(name: str, tmp_path: Path) -> None:
    kind, below_options, own_options = CASES[name]
    model = write_model(MODELS[kind](), tmp_path / "model")
    below = [adapter_of(model, tmp_path / str(n), **options) for n, options in enumerate(below_options)]
    compare(model, below, own_options, tmp_path)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_stacked_experts(name: str, tmp_path: Path) -> None:
    model = write_model(MODELS[name](), tmp_path / "model")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    compare(model, [adapter_of(model, tmp_path / "0", **targets)], targets, tmp_path)


def test_experts_of_which_another_weight_trains(tmp_path: Path) -> None:
    """PEFT takes only adapters of the same parameters: here merged weights are the oracle."""
    model = write_model(MODELS["mixtral"](), tmp_path / "model")
    below = adapter_of(model, tmp_path / "0", target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    PeftModel.from_pretrained(base(model), below).merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(str(model)).save_pretrained(tmp_path / "merged")
    options = {"r": 4, "target_modules": (), "target_parameters": ("experts.down_proj",)}
    (ours, adapter), (plain, _) = (
        attached(model, **options, base_adapters=(str(below),)),
        attached(tmp_path / "merged", **options),
    )
    for one in (ours, plain):
        shaken(one.model).eval()
    torch.testing.assert_close(logits(ours.model), logits(plain.model), rtol=1e-5, atol=1e-5)
    with ours.without_adapters(), plain.without_adapters():
        torch.testing.assert_close(logits(ours.model), logits(plain.model), rtol=1e-5, atol=1e-5)
    (tmp_path / "saved").mkdir()
    adapter.save(tmp_path / "saved")
    theirs = PeftModel.from_pretrained(base(model), tmp_path / "saved").eval()
    torch.testing.assert_close(logits(theirs), logits(ours.model), rtol=1e-5, atol=1e-5)


def compare(model: Path, below: list[Path], own: dict[str, Any], tmp_path: Path) -> None:
    theirs = shaken(peft_with(model, below, r=4, **own)).eval()
    theirs.save_pretrained(tmp_path / "theirs", selected_adapters=["own"])
    given = {key: tuple(value) for key, value in own.items()} | {"init_from": str(tmp_path / "theirs" / "own")}
    lm, adapter = attached(model, r=4, lora_alpha=8, base_adapters=tuple(map(str, below)), **given)
    trained = {name for name, p in lm.model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(logits(lm.model.eval()), logits(theirs), rtol=1e-5, atol=1e-5)
    theirs.base_model.set_adapter([f"below-{n}" for n in range(len(below))])
    with lm.without_adapters():
        torch.testing.assert_close(logits(lm.model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(theirs) - logits(base(model))).abs().max() > 1e-3
    theirs.base_model.set_adapter([*(f"below-{n}" for n in range(len(below))), "own"])
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(".own" in name)

    # The gradients are the same, and nothing else has one.
    for one in (lm.model, theirs):
        loss(one).backward()
    assert {name for name, p in lm.model.named_parameters() if p.grad is not None} == trained
    ours, expected = (
        torch.cat([p.grad.abs().flatten() for p in m.parameters() if p.grad is not None]).sort().values
        for m in (lm, theirs)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    for one in (lm.model, theirs):
        torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5).step()
    after = logits(lm.model)
    torch.testing.assert_close(after, logits(theirs), rtol=1e-5, atol=1e-5)

    # The file is one plain LoRA of the published model.
    (tmp_path / "ours").mkdir()
    adapter.save(tmp_path / "ours")
    again = PeftModel.from_pretrained(base(model), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load_run(tmp_path / "ours").lm.model), after, rtol=1e-5, atol=1e-5)
    adapter.merge(lm)
    torch.testing.assert_close(logits(lm.model), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.5}, {"init_lora_weights": "pissa"}, {"lora_dropout": 0.5, "init_lora_weights": "olora"}],
)
def test_it_begins_as_what_it_stands_on(options: dict[str, Any], tmp_path: Path) -> None:
    model = write_model(MODELS["llama"](), tmp_path / "model")
    below = adapter_of(model, tmp_path / "0")
    theirs = PeftModel.from_pretrained(base(model), below).eval()
    lm, adapter = attached(model, r=4, base_adapters=(str(below),), **options)
    for training in (False, "init_lora_weights" not in options):  # dropout drops inputs of A and B, which begin as none
        torch.testing.assert_close(logits(lm.model.train(training)), logits(theirs), rtol=1e-4, atol=1e-4)
    shaken(lm.model).eval()
    after = logits(lm.model)
    (tmp_path / "ours").mkdir()
    adapter.save(tmp_path / "ours")
    again, other = attached(model, r=4, base_adapters=(str(tmp_path / "ours"),), **options)
    other.load(tmp_path / "ours")
    torch.testing.assert_close(logits(again.model.eval()), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("below", "own", "said"),
    [
        ({"use_dora": True}, {}, "has use_dora, which cannot stand below another one; merge it into its base model"),
        ({"modules_to_save": ["lm_head"]}, {}, "has modules_to_save, which cannot"),
        ({"target_modules": ["embed_tokens"]}, {}, "adapts the embedding, which cannot"),
        ({}, {"use_dora": True}, "base_adapters: goes not with use_dora"),
        (
            {},
            {"modules_to_save": ("mlp",), "target_modules": ("q_proj",)},
            r"modules_to_save \['mlp'\] train .* in full",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(below: dict[str, Any], own: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = write_model(MODELS["llama"](), tmp_path / "model")
    directory = adapter_of(model, tmp_path / "0", **below)
    with pytest.raises(ConfigError, match=said):
        attached(model, base_adapters=(str(directory),), **own)


def test_an_adapter_of_another_model_is_named(tmp_path: Path) -> None:
    model = write_model(MODELS["llama"](), tmp_path / "model")
    other = write_model(transformers.LlamaConfig(**{**UNTIED, "intermediate_size": 64}), tmp_path / "other")
    below = adapter_of(other, tmp_path / "0")
    with pytest.raises(ModelError, match=r"0: the adapter of .* has the shape .*; it was made for another model"):
        attached(model, r=4, base_adapters=(str(below),))
    with pytest.raises(ConfigError, match=r"base_adapters: .*gone/adapter_config.json cannot be read.*put it back"):
        attached(model, base_adapters=(str(tmp_path / "gone"),))


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"lora.r": 4, "lora.target_modules": ["q_proj", "down_proj"], "train.learning_rate": 0.05}
    return run_tiny(["lora"], tmp_path_factory.mktemp("first"), settings=settings).output_dir


def second(first: Path, output_dir: Path, plugin: str = "lora", **options: Any) -> Any:
    model = json.loads((first / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    own = {"r": 2, "target_modules": ["q_proj", "v_proj"], "base_adapters": [str(first)]}
    return sftx.run(
        data=ROWS, model=model, plugins={"chatml": {}, plugin: own}, output_dir=str(output_dir), use_cpu=True,
        learning_rate=0.05, **options,
    )  # fmt: skip


def answers(directory: Path) -> Tensor:
    with torch.no_grad():
        return logits(load_run(directory).lm.model)


@pytest.mark.parametrize("plugin", ["lora", "qlora"])
def test_the_result_holds_all_of_them(plugin: str, first: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    full = second(copy, tmp_path / "full", plugin, max_steps=4, save_steps=2)
    assert f"- {copy / 'adapter'}" in (full.output_dir / "run.yaml").read_text()
    expected = answers(full.output_dir)
    shutil.rmtree(copy)
    assert torch.equal(answers(full.output_dir), expected)
    # It goes on from a checkpoint as if nothing had been in between.
    stopped = tmp_path / "stopped"
    shutil.copytree(full.output_dir, stopped)
    for path in (stopped / "adapter", stopped / "checkpoints" / "step-4"):
        shutil.rmtree(path)
    (stopped / "summary.json").unlink()
    resumed = sftx.resume(stopped)
    assert torch.equal(answers(resumed.output_dir), expected)
    # As a plain adapter of the published model.
    shutil.copytree(full.output_dir / "adapter", tmp_path / "plain")
    if plugin == "lora":
        torch.testing.assert_close(answers(tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)
    theirs = PeftModel.from_pretrained(base(Path(load_run(tmp_path / "plain").base_model)), tmp_path / "plain").eval()
    torch.testing.assert_close(logits(theirs), answers(tmp_path / "plain"), rtol=1e-5, atol=1e-5)


def test_a_run_whose_beginning_is_gone_goes_on_from_its_checkpoint(first: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(first / "adapter", copy)
    options = {"data": ROWS, "use_cpu": True, "max_steps": 4, "save_steps": 2}
    model = json.loads((copy / "adapter_config.json").read_text())["base_model_name_or_path"]
    plugins = {"chatml": {}, "lora": {"init_from": str(copy)}}
    full = sftx.run(model=model, plugins=plugins, output_dir=str(tmp_path / "full"), **options)
    expected = answers(full.output_dir)
    stopped = full.output_dir
    for path in (stopped / "adapter", stopped / "checkpoints" / "step-4", copy):
        shutil.rmtree(path)
    (stopped / "summary.json").unlink()
    assert torch.equal(answers(sftx.resume(stopped).output_dir), expected)
    # Without a checkpoint it is needed.
    for path in (stopped / "adapter", stopped / "checkpoints"):
        shutil.rmtree(path)
    (stopped / "summary.json").unlink()
    with pytest.raises(ModelError, match=rf"{re.escape(str(copy))}/adapter_model.safetensors: no such file"):
        sftx.resume(stopped)


def test_a_plan_counts_them(tmp_path: Path) -> None:
    """Also of a model of which few layers are planned, with an adapter whose ranks name single layers."""
    model = write_model(transformers.LlamaConfig(**{**UNTIED, "num_hidden_layers": 6}), tmp_path / "model")
    ranks = {rf"model\.layers\.5\.{name}": 2 for name in ("mlp.up_proj", "self_attn.q_proj")}
    below = adapter_of(model, tmp_path / "0", rank_pattern=ranks)
    held = sum(tensor.nbytes for tensor in load_file(below / "adapter_model.safetensors").values())

    def planned(model: Path, **options: Any) -> Any:
        plugins: dict[str, Any] = {"chatml": {}, "lora": options}
        return sftx.plan(data=ROWS, model=str(model), plugins=plugins, max_length=32).need

    plain, above = planned(model, r=3), planned(model, r=3, base_adapters=[str(below)])
    assert above.num_trainable == plain.num_trainable
    assert above.kinds["weights"] - plain.kinds["weights"] == held
    shutil.copytree(model, tmp_path / "1", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    shutil.copytree(below, tmp_path / "1", dirs_exist_ok=True)
    assert planned(tmp_path / "1").num_trainable == held / 4
