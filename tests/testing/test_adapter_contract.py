"""Tests of the adapter contract: bad adapters that break one clause each, and the built-in ones, which break none."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from architectures import SHAPE, write_model
from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, whole_suite_cases
from sftx import Batch, LanguageModel, ModelSpec, hookimpl
from sftx.assembly.discovery import hooks_of, load_class
from sftx.assembly.entry_points import discover
from sftx.testing import ContractError
from sftx.testing.adapter import SUITE, check_adapter
from sftx.testing.kit import built_in
from sftx_kernels import QuantizedLinear, quantize_int8
from sftx_plugins.adapters.lora import Lora
from sftx_plugins.adapters.lora_adapter import LoraAdapter
from sftx_plugins.adapters.lora_layers import LayerOptions, LoraLinear
from sftx_plugins.adapters.peft_files import WEIGHTS
from sftx_plugins.adapters.targets import find_token_rows


class Good(LoraAdapter):
    """A correct LoRA; the classes below change one thing. `layers` holds the attached layers."""

    @property
    def layers(self) -> list[LoraLinear]:
        return cast(list[LoraLinear], list(self._layers.values()))


class NoAdapter:
    def __init__(self, *args: Any, **options: Any) -> None:
        pass


class CannotAttach(Good):
    def attach(self, lm: LanguageModel) -> None:
        raise ValueError("no layer found")


class StartsNoisy(Good):
    def attach(self, lm: LanguageModel) -> None:
        super().attach(lm)
        for layer in self.layers:
            nn.init.normal_(layer.lora_B, std=0.1)


class Frozen(Good):
    def attach(self, lm: LanguageModel) -> None:
        super().attach(lm)
        lm.requires_grad_(False)


class Unused(Good):
    def attach(self, lm: LanguageModel) -> None:
        super().attach(lm)
        lm.model.register_parameter("gate", nn.Parameter(torch.zeros(3)))


class Outside(Good):
    def attach(self, lm: LanguageModel) -> None:
        super().attach(lm)
        shift = torch.zeros(self.layers[0].out_features, requires_grad=True)
        self.layers[0].register_forward_hook(lambda layer, inputs, output: output + shift)


class WithoutEffect(Good):
    def attach(self, lm: LanguageModel) -> None:
        super().attach(lm)
        for layer in self.layers:
            layer.scaling = 0.0


class Counts(Good):
    def attach(self, lm: LanguageModel) -> None:
        super().attach(lm)
        lm.model.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))
        self.layers[0].register_forward_hook(lambda *_: lm.model.num_forwards.add_(1) and None)


class Decays(Good):
    def attach(self, lm: LanguageModel) -> None:
        super().attach(lm)

        def decay(layer: Any, _: Any) -> None:
            if layer.training:
                layer.weight.data.mul_(0.99)

        self.layers[0].register_forward_pre_hook(decay)


class NeverAside(Good):
    def disabled(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


class StaysAside(Good):
    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        for layer in self.layers:
            layer.enabled = False
        yield
        for layer in self.layers:
            layer.enabled = True


class Swallows(Good):
    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        with contextlib.suppress(RuntimeError), super().disabled():
            yield


class ForgetsTheOuter(Good):
    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        try:
            for layer in self.layers:
                layer.enabled = False
            yield
        finally:
            for layer in self.layers:
                layer.enabled = True


class Toggles(Good):
    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        self.toggle()
        try:
            yield
        finally:
            self.toggle()

    def toggle(self) -> None:
        for layer in self.layers:
            layer.enabled = not layer.enabled


class Pickles(Good):
    def save(self, directory: Path) -> None:
        super().save(directory)
        torch.save({"r": 16}, directory / "options.bin")


class WritesNothing(Good):
    def save(self, directory: Path) -> None:
        (directory / "adapter_config.json").write_text("{}")


class WritesPython(Good):
    def save(self, directory: Path) -> None:
        super().save(directory)
        (directory / "options.json").write_text(str({"r": 16}))


class RoundsInPlace(Good):
    def save(self, directory: Path) -> None:
        for layer in self.layers:
            layer.lora_B.data = layer.lora_B.data.bfloat16().float()
        super().save(directory)


class RoundsTheFile(Good):
    def save(self, directory: Path) -> None:
        super().save(directory)
        tensors = load_file(directory / WEIGHTS)
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, directory / WEIGHTS)


class LoadsToServe(Good):
    def load(self, directory: Path) -> None:
        super().load(directory)
        for layer in self.layers:
            layer.requires_grad_(False)


class DrawsAndForgets(Good):
    """Draws lora_A and never trains it, as VeRA does, but does not save it either."""

    def attach(self, lm: LanguageModel) -> None:
        super().attach(lm)
        for layer in self.layers:
            layer.lora_A.requires_grad_(False)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super()._tensors().items() if "lora_A" not in name}

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        for name, own in self._tensors().items():
            own.copy_(tensors[f"base_model.model.{name}"])


class Lenient(Good):
    """Loads the tensors under its own names, and checks nothing."""

    def found(self, directory: Path) -> dict[str, Tensor]:
        tensors = load_file(directory / WEIGHTS)
        return {name: tensors[f"base_model.model.{name}"] for name in self._tensors()}

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        for name, value in self.found(directory).items():
            self._tensors()[name].copy_(value)


class SkipsTheMissing(Lenient):
    def found(self, directory: Path) -> dict[str, Tensor]:
        tensors = load_file(directory / WEIGHTS)
        return {n: tensors[key] for n in self._tensors() if (key := f"base_model.model.{n}") in tensors}


class TakesStrangers(Good):
    def load(self, directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        tensors.pop("stranger", None)
        save_file(tensors, directory / WEIGHTS)
        super().load(directory)


class Spreads(Good):
    def load(self, directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        own = {f"base_model.model.{name}": tensor for name, tensor in self._tensors().items()}
        spread = {n: t.expand_as(own[n]).contiguous() if n in own else t for n, t in tensors.items()}
        save_file(spread, directory / WEIGHTS)
        super().load(directory)


class MergesHalf(Good):
    def merge(self, lm: LanguageModel) -> None:
        for layer in self.layers:
            layer.scaling /= 2
        super().merge(lm)


class MergesInPlace(Good):
    @torch.no_grad()
    def merge(self, lm: LanguageModel) -> None:
        for layer in self.layers:
            layer.weight += layer.scaling * (layer.lora_B @ layer.lora_A)
            layer.lora_B.zero_()


class MergesToTrain(Good):
    def merge(self, lm: LanguageModel) -> None:
        super().merge(lm)
        lm.head_weight.requires_grad_()


class DrawsAnywhere(Good):
    def attach(self, lm: LanguageModel) -> None:
        super().attach(lm)
        self.layers[-1].register_forward_hook(
            lambda layer, _, output: nn.functional.dropout(output, 0.2, layer.training)
        )


class CountsLayers(Good):
    """Draws a layer's mask from lm.seed and a count that restarts with each forward, but not with a recomputation."""

    count = 0

    def attach(self, lm: LanguageModel) -> None:
        super().attach(lm)

        def begin(*_: Any) -> None:
            self.count = 0

        def drop(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
            self.count += 1
            generator = torch.Generator().manual_seed(int(lm.seed) + self.count)
            kept = torch.rand(output.shape, generator=generator) > 0.2
            return output * kept / 0.8 if layer.training else output

        lm.model.get_decoder().register_forward_pre_hook(begin)
        for layer in self.layers:
            layer.register_forward_hook(drop)


class ReadsWeights(Good):
    def __init__(self, base: str, *args: Any, **options: Any) -> None:
        super().__init__(base, *args, **options)
        self.norms = [p.norm() for p in AutoModelForCausalLM.from_pretrained(base).parameters()]


@dataclass(frozen=True, eq=False)
class Plugin(Lora):
    """A plugin with the options of LoRA that returns another adapter."""

    made: ClassVar[type] = Good

    @hookimpl
    def sftx_adapter(self, spec: ModelSpec) -> Any:
        return self.made(
            spec.name,
            dict.fromkeys(self.find_targets(spec.skeleton), LayerOptions(self.r, self.lora_alpha)),
            self.find_saved(spec.skeleton),
            find_token_rows(spec, ()),
            peft=self.peft_config(),
        )


class QuantizesWhatHasWeights(Good):
    def quantize(self, name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear) or name == "lm_head" or module.weight.is_meta:
            return None
        return QuantizedLinear(quantize_int8(module.weight), module.bias)


class QuantizesAsItTrains(Good):
    def quantize(self, name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.LayerNorm) or not name.endswith("norm"):
            return None
        return copy.deepcopy(module)


class PreparesTheSkeleton(Plugin):
    @hookimpl
    def sftx_adapter(self, spec: ModelSpec) -> Any:
        for parameter in spec.skeleton.get_input_embeddings().parameters():
            parameter.requires_grad_(False)
        return super().sftx_adapter(spec)


class FillsTheSkeleton(Plugin):
    @hookimpl
    def sftx_adapter(self, spec: ModelSpec) -> Any:
        spec.skeleton.get_input_embeddings().to_empty(device="cpu")
        return super().sftx_adapter(spec)


def plugin_of(made: type) -> Plugin:
    return made() if issubclass(made, Plugin) else type("Made", (Plugin,), {"made": made})()


class IgnoresAddedTokens(Good):
    def __init__(self, base: str, targets: Any, saved: Any, new_token_ids: Any, **options: Any) -> None:
        super().__init__(base, targets, saved, **options)


class ForgetsAddedTokens(Good):
    """It trains their rows, and neither saves nor loads them."""

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super()._tensors().items() if "token_adapter" not in name}


class TakesTheLayersOfOthers(Good):
    def attach(self, lm: LanguageModel) -> None:
        for name in self._targets:
            found = lm.model.get_submodule(name)
            plain = nn.Linear(found.in_features, found.out_features, bias=False)
            plain.weight = found.weight
            lm.model.set_submodule(name, plain)
        super().attach(lm)


class Mixes(Good):
    """Its embeddings depend on the other rows of the batch."""

    def embed(self, batch: Batch, embeds_BTD: Tensor) -> Tensor:
        return embeds_BTD + embeds_BTD.mean((0, 1))


class Notes(Good):
    def embed(self, batch: Batch, embeds_BTD: Tensor) -> Tensor:
        batch.extras["seen"] = embeds_BTD
        return embeds_BTD


BAD = [
    (TakesTheLayersOfOthers, "keeps-other-adapters", "attached after lora, it changes the logits by"),
    (NoAdapter, "made", "returned NoAdapter, expected an Adapter"),
    (CannotAttach, "made", "ValueError: no layer found"),
    (StartsNoisy, "begins-as-identity", "it changes the logits by"),
    (Frozen, "trains-something", "no parameter of the model requires grad"),
    (Unused, "trains-something", r"1 parameters require grad and get no gradient \(first: model.gate\)"),
    (Outside, "trains-something", r"no parameters of the model \(the first has the shape \[32\]\)"),
    (WithoutEffect, "trains-something", "bring the loss of their batch from (.*) to (\\1);"),
    (Counts, "leaves-the-base", r"1 tensors that do not require grad \(first: model.num_forwards\)"),
    (Decays, "leaves-the-base", r"first: model.model.layers.0.self_attn.q_proj.weight"),
    (NeverAside, "disabled-is-the-base", r"within disabled\(\) the logits differ from the base's"),
    (StaysAside, "disabled-is-the-base", r"after an exception within disabled\(\)"),
    (Swallows, "disabled-is-the-base", "swallowed an exception"),
    (ForgetsTheOuter, "disabled-is-the-base", r"after an inner disabled\(\), still within the outer one"),
    (Toggles, "disabled-is-the-base", r"within disabled\(\) twice"),
    (Pickles, "saves-data-only", "save wrote options.bin"),
    (WritesNothing, "saves-data-only", "no .safetensors file"),
    (WritesPython, "saves-data-only", "options.json, which save wrote, cannot be read"),
    (RoundsInPlace, "saves-data-only", "save changed model.model.layers.0.self_attn.q_proj.lora_B"),
    (RoundsTheFile, "round-trips", "after save and load the logits differ by"),
    (DrawsAndForgets, "round-trips", "drawn at random and then frozen"),
    (LoadsToServe, "round-trips", "no longer require grad"),
    (Lenient, "loads-strictly", "is missing raised KeyError"),
    (SkipsTheMissing, "loads-strictly", "load took a file in which (.*) is missing"),
    (TakesStrangers, "loads-strictly", "'stranger' is too many"),
    (Spreads, "loads-strictly", r"load took a file in which (.*) has the shape \[1, 64\] for \[16, 64\]"),
    (MergesHalf, "merges", "merged, the logits differ"),
    (MergesInPlace, "merges", "28 parameters that the base has not and lacks 0"),
    (MergesToTrain, "merges", "1 parameters still require grad"),
    (DrawsAnywhere, "recomputes-the-same", "two forwards with the same lm.seed"),
    (CountsLayers, "recomputes-the-same", "with gradient checkpointing, .* the gradients differ"),
    (ReadsWeights, "plans-on-meta", "with a configuration and no weights the hook raised OSError"),
    (PreparesTheSkeleton, "plans-on-meta", r"changed 1 .* \(first: model.embed_tokens.weight\)"),
    (IgnoresAddedTokens, "trains-added-tokens", "leaves their rows untrained in embedding and output head"),
    (ForgetsAddedTokens, "trains-added-tokens", "has other rows of added tokens"),
    (Mixes, "embeds-each-document-alone", "embed gives samples:1 embeddings that differ by"),
    (Notes, "embeds-each-document-alone", r"embed changed extras\['seen'\] of its batch"),
    (QuantizesWhatHasWeights, "quantizes-by-shape", r"replaces \d+ modules and on the meta device 0 \(first: model"),
    (QuantizesAsItTrains, "quantizes-by-shape", "let nothing in it require a gradient"),
    (FillsTheSkeleton, "plans-on-meta", r"modules or tensors of spec.skeleton"),
]


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_adapter_fails_its_clause_with_a_message(bad: type, clause: str, message: str) -> None:
    assert_fails(SUITE, plugin_of(bad), clause, re.compile(message))


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_adapter_fails_nothing_else(bad: type, clause: str) -> None:
    assert_fails_only(SUITE, plugin_of(bad), clause)


def test_each_clause_has_a_bad_adapter() -> None:
    assert_every_clause_is_broken(SUITE, (clause for _, clause, _ in BAD))


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.3},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"r": 1, "target_modules": ["v_proj"]},
        {"use_dora": True, "lora_dropout": 0.3, "init_lora_weights": "pissa", "r": 8},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"use_dora": True, "use_rslora": True},
                {"init_lora_weights": "pissa_niter_4", "r": 8, "lora_dropout": 0.3},
                {"init_lora_weights": "olora", "r": 4, "use_rslora": True},
                {"init_lora_weights": "orthogonal"},
                {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*": 5}, "layers_to_transform": [1]},
                {"trainable_token_indices": [3, 5], "exclude_modules": ["mlp.up_proj"]},
            )
        ),
    ],
    ids=json.dumps,
)
def test_lora_keeps_the_contract_with_any_options(options: dict[str, Any]) -> None:
    findings = SUITE.findings(built_in("lora", **options))
    assert {f.status for f in findings} == {"ok"}, findings


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["lm_head"], "use_dora": True, "r": 8, "init_lora_weights": "pissa"},
        {"bias": "all"},
        {"bias": "lora_only", "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=json.dumps,
)
def test_lora_keeps_the_contract_on_an_untied_model_with_biases(options: dict[str, Any], tmp_path: Path) -> None:
    config = Qwen2Config(**{name: value for name, value in SHAPE.items() if name != "head_dim"})
    config.tie_word_embeddings = False
    check_adapter(built_in("lora", **options), model=write_model(config, tmp_path))


ADAPTERS = [
    info.name
    for info in discover()
    if info.value.startswith("sftx_plugins") and "sftx_adapter" in hooks_of(info, load_class(info))
]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_built_in_adapter_keeps_the_contract(name: str) -> None:
    check_adapter(built_in(name))


def test_it_can_be_checked_on_another_model(tiny_model: Path, tmp_path: Path) -> None:
    """The model directory holds a model with untied weights and with dropout."""
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False, attention_dropout=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    check_adapter(built_in("lora", modules_to_save=["lm_head"]), model=tmp_path)
    with pytest.raises(ContractError, match="adapter / merges: ") as caught:
        check_adapter(plugin_of(MergesHalf), model=tmp_path)
    assert [f.clause for f in caught.value.findings if f.status == "failed"] == ["merges"]
