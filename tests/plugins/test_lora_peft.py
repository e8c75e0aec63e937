"""Each option of lora against the installed PEFT: files both ways, logits, gradients, a step, and merged weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from architectures import SHAPE, write_model
from sftx.checkpoint.load_run import load_run
from sftx.errors import ConfigError, ModelError
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec, load_tokenizer
from sftx_plugins.adapters.lora import Lora
from sftx_plugins.adapters.lora_adapter import LoraAdapter
from sftx_plugins.adapters.lora_layers import LoraLinear

UNTIED = {**SHAPE, "tie_word_embeddings": False}
PLAIN = {name: value for name, value in UNTIED.items() if name not in ("head_dim", "num_key_value_heads")}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**UNTIED),
    "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in UNTIED.items() if k != "head_dim"}),
    "qwen3": lambda: transformers.Qwen3Config(**UNTIED),
    "gemma3": lambda: transformers.Gemma3TextConfig(**UNTIED, sliding_window=16),
    "mistral": lambda: transformers.MistralConfig(**UNTIED),
    "phi3": lambda: transformers.Phi3Config(**{k: v for k, v in UNTIED.items() if k != "head_dim"}),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**PLAIN),
}
LINEAR = ["q_proj", "down_proj", "query_key_value", "dense", "qkv_proj", "o_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "lora-bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj", "query_key_value", "qkv_proj"]},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "patterns": {"rank_pattern": {r"layers.1.*": 2}, "alpha_pattern": {r".*(q|down)_proj": 5, "query_key_value": 5}},
    "some-layers": {"layers_to_transform": [1], "target_modules": LINEAR},
    "some-layers-by-name": {"layers_to_transform": [0], "layers_pattern": ["layers"], "target_modules": LINEAR},
    "excluded": {"exclude_modules": ["down_proj", "dense_4h_to_h"]},
    "excluded-by-pattern": {"exclude_modules": r".*layers\.0\..*"},
    "regex": {"target_modules": r".*\.1\..*(q_proj|qkv_proj|query_key_value)"},
    "embedding": {"target_modules": ["embed_tokens", "embed_in", "up_proj", "gate_up_proj", "dense_h_to_4h"]},
    "head": {"target_modules": ["lm_head", "embed_out", "up_proj", "gate_up_proj", "dense_h_to_4h"]},
    "head-dora": {"target_modules": ["lm_head", "embed_out", "up_proj", "dense_h_to_4h"], "use_dora": True},
    "in-full": {"modules_to_save": ["model.norm", "final_layer_norm"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 17], "embed_in": [3, 17]}},
    "tokens-of-both": {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3, 8]}},
}
"""Options by PEFT's names. Names of modules that a model has not are left out, as are options for nothing in it."""


def for_model(options: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the options without the names that this model has not."""
    paths = [name for name, _ in model.named_modules()]

    def found(name: str) -> bool:
        return any(path == name or path.endswith(f".{name}") for path in paths)

    kept = dict(options)
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(kept.get(name), list):
            kept[name] = [ending for ending in kept[name] if found(ending)]
    if "trainable_token_indices" in kept:
        kept["trainable_token_indices"] = {n: ids for n, ids in kept["trainable_token_indices"].items() if found(n)}
    for name in ("rank_pattern", "alpha_pattern"):
        if name in kept:
            kept[name] = {p: v for p, v in kept[name].items() if any(re.match(rf"(.*\.)?({p})$", x) for x in paths)}
    return kept


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write_model(MODELS[name](), tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def attached(model: Path, **options: Any) -> tuple[CausalLM, LoraAdapter]:
    plugin: Any = Lora(**{name: tuple(v) if isinstance(v, list) else v for name, v in options.items()})
    spec = load_spec(str(model))
    adapter = plugin.sftx_adapter(spec)
    lm = CausalLM(
        load_model(spec, [adapter], dtype=torch.float32, device=torch.device("cpu")), load_tokenizer(str(model))
    )
    torch.manual_seed(0)
    lm.attach({"lora": adapter})
    return lm, adapter


def peft_of(model: Path, **options: Any) -> PeftModel:
    targets = options.pop("target_modules", "all-linear")
    torch.manual_seed(0)
    return get_peft_model(base(model), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options))


def shake(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


IDS = torch.arange(24).view(2, 12) * 7 % 199 + 1  # never 0, whose row of the embedding PEFT does not train


def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


def loss(model: Any) -> Tensor:
    return nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def peft_name(name: str) -> str:
    """Return the name in PEFT's files of one of its parameters, without the prefix."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default", "")


def compare(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    theirs = peft_of(model, **options)
    shake(p for _, p in sorted(theirs.named_parameters()))
    theirs.save_pretrained(tmp_path / "theirs")
    lm, adapter = attached(model, r=4, lora_alpha=8, **options)
    before = logits(lm.model.eval())
    adapter.load(tmp_path / "theirs")
    assert (logits(lm.model) - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(lm.model), logits(theirs.eval()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load_run(tmp_path / "theirs").lm.model), logits(theirs), rtol=1e-5, atol=1e-5)
    # A step of each of a tenth in all: as long as its gradient it would be nothing here, or show the rounding there.
    loaded = logits(lm.model)
    for one in (lm.model, theirs):
        loss(one).backward()
    own = adapter._tensors()
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            gradient = own.pop(peft_name(key)).grad
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    assert not own, "PEFT does not train these"
    for one in (lm.model, theirs):
        trained = [p for p in one.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        torch.optim.SGD(trained, lr=0.1 / norm.item()).step()
    after = logits(lm.model)
    assert (after - loaded).abs().max() > 1e-4
    torch.testing.assert_close(after, logits(theirs), rtol=1e-5, atol=1e-5)
    # Saved here, loaded there.
    (tmp_path / "ours").mkdir()
    adapter.save(tmp_path / "ours")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base(model), tmp_path / "ours").eval()), after, rtol=1e-5, atol=1e-5
    )
    adapter.merge(lm)
    merged = theirs.merge_and_unload().state_dict()
    for key, tensor in lm.model.state_dict().items():
        torch.testing.assert_close(tensor, merged[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def cases() -> Iterator[Any]:
    """Each option on one model and each model with one option; all others are slow."""
    on_qwen2 = {"lora-bias", "bias-all", "bias-lora"}
    for model in MODELS:
        for name in OPTIONS:
            is_first = name == "plain" or model == ("qwen2" if name in on_qwen2 else "llama")
            yield pytest.param(model, name, id=f"{model}-{name}", marks=() if is_first else pytest.mark.slow)


@pytest.mark.parametrize(("model", "name"), [*cases()])
def test_it_computes_and_saves_what_peft_does(
    model: str, name: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = models(model)
    options = for_model(OPTIONS[name], load_spec(str(directory)).skeleton)
    has_biases = any(name.endswith(".bias") for name, _ in load_spec(str(directory)).skeleton.named_parameters())
    if not has_biases and "bias" in name:
        with pytest.raises(ConfigError, match="bias"):
            attached(directory, r=4, **options)
    else:
        compare(options, directory, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_list_of_token_ids_that_peft_saved_is_for_the_embedding(tied: bool, tmp_path: Path) -> None:
    directory = write_model(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied), tmp_path / "model")
    theirs = peft_of(directory, trainable_token_indices=[3, 17])
    shake(theirs.parameters())
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(
        logits(load_run(tmp_path / "theirs").lm.model), logits(theirs.eval()), rtol=1e-5, atol=1e-5
    )


INITS = ("gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora")


@pytest.mark.parametrize("init", INITS)
def test_it_begins_as_the_identity_and_draws_as_peft_does(
    init: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = models("llama")
    lm, _ = attached(model, r=4, lora_alpha=8, init_lora_weights=init)
    torch.testing.assert_close(logits(lm.model.eval()), logits(base(model)), rtol=1e-5, atol=1e-5)
    theirs = peft_of(model, init_lora_weights=init)
    names = [name for name, _ in theirs.named_parameters() if name.endswith(("lora_A.default.weight",))]
    for name in names:
        path = peft_name(name).removesuffix(".lora_A.weight")
        own, other = lm.model.get_submodule(path), theirs.get_submodule(f"base_model.model.{path}")
        assert isinstance(own, LoraLinear)
        product, expected = own.lora_B @ own.lora_A, other.lora_B["default"].weight @ other.lora_A["default"].weight
        if init in ("pissa", "olora"):  # nothing is drawn
            torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)
        elif init in ("gaussian", "orthogonal"):
            assert product.abs().max() < 1e-6
            ratio = own.lora_A.std() / other.lora_A["default"].weight.std()
            assert 0.6 < ratio < 1.6
        else:
            exact = torch.linalg.matrix_norm(torch.linalg.svdvals(own.weight)[4:].diag())
            assert torch.linalg.matrix_norm(own.weight - own.scaling * product) < 1.02 * exact


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_that_keeps_its_weights_trains_like_peft_s_residual(
    init: str, options: dict[str, Any], models: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT takes the initial update off the base's weights; here it is a frozen part of the update."""
    model = models("llama")
    lm, adapter = attached(model, r=4, lora_alpha=8, init_lora_weights=init, **options)
    theirs = peft_of(model, init_lora_weights=init, **options)
    with torch.no_grad():  # singular vectors have no sign
        for name, layer in adapter._layers.items():
            other = theirs.get_submodule(f"base_model.model.{name}")
            assert isinstance(layer, LoraLinear)
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)
    steps = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (lm.model, theirs)]
    losses = []
    for _ in range(4):
        for optimizer, one in zip(steps, (lm.model, theirs), strict=True):
            optimizer.zero_grad()
            value = loss(one)
            value.backward()
            losses.append(value.item())
            optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    ours = logits(lm.model)
    torch.testing.assert_close(ours, logits(theirs), rtol=1e-3, atol=2e-4)
    assert torch.equal(
        lm.model.get_submodule("model.layers.0.mlp.up_proj").weight, base(model).model.layers[0].mlp.up_proj.weight
    )
    # The file is a plain one of twice the rank, from which both go on.
    adapter.save(tmp_path)
    loaded = PeftModel.from_pretrained(base(model), tmp_path)
    assert loaded.peft_config["default"].r == 8
    torch.testing.assert_close(logits(loaded.eval()), ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load_run(tmp_path).lm.model), ours, rtol=1e-5, atol=1e-5)
    again, other_adapter = attached(model, r=4, lora_alpha=8, init_lora_weights=init, **options)
    other_adapter.load(tmp_path)
    assert torch.equal(logits(again.model), ours)
    assert all(map(torch.equal, adapter._tensors().values(), other_adapter._tensors().values()))


@pytest.mark.parametrize("init", [True, "pissa"])
def test_dora_drops_out_as_peft_does(init: Any, models: Callable[[str], Path]) -> None:
    """In fp64, with PEFT's dropout replaced by the mask that is drawn here."""
    model = models("qwen2")
    lm, adapter = attached(model, r=4, use_dora=True, lora_dropout=0.4, init_lora_weights=init)
    lm.model.double().train()
    lm.seed.fill_(5)
    shake(p for _, p in sorted(lm.model.named_parameters()))
    layer: Any = adapter._layers["model.layers.1.self_attn.q_proj"]
    with torch.no_grad():
        layer.squared_norms = layer.weight.square().sum(1)
        x = torch.randn(3, 5, layer.in_features, dtype=torch.float64)
    from sftx_kernels import seeded_dropout

    dropped = seeded_dropout(x, 0.4, layer.dropout_seed())
    share = (dropped == 0).double().mean()
    assert 0.2 < share < 0.6
    A, B = layer.factors()
    weight = layer.weight
    if init == "pissa":
        weight = weight - layer.scaling * layer.initial_B @ layer.initial_A
        A, B = layer.lora_A, layer.lora_B
    update = layer.scaling * B @ A
    scale = layer.lora_magnitude_vector / (weight + update).norm(dim=1)
    expected = x @ weight.T + layer.bias + (scale - 1) * (dropped @ weight.T) + scale * (dropped @ update.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_what_peft_began_in_the_weights_is_refused_with_advice(models: Callable[[str], Path], tmp_path: Path) -> None:
    peft_of(models("llama"), init_lora_weights="pissa").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"init_lora_weights pissa.*path_initial_model_for_weight_conversion"):
        load_run(tmp_path)


@pytest.mark.parametrize("save_projection", [True, False])
def test_vera_computes_and_saves_what_peft_does(
    save_projection: bool, models: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import VeraConfig

    model = models("qwen2")
    torch.manual_seed(0)
    config = VeraConfig(
        r=8, target_modules=["q_proj", "k_proj", "down_proj"], save_projection=save_projection, projection_prng_key=3
    )
    theirs = get_peft_model(base(model), config)
    shake(p for _, p in sorted(theirs.named_parameters()))
    theirs.save_pretrained(tmp_path / "theirs")
    lm = load_run(tmp_path / "theirs").lm
    assert (logits(lm.model) - logits(base(model))).abs().max() > 1e-3
    torch.testing.assert_close(logits(lm.model), logits(theirs.eval()), rtol=1e-5, atol=1e-5)
    for one in (lm.model, theirs):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("vera_lambda" in name)
        loss(one).backward()
    gradients = {peft_name(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in lm.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=1e-4, atol=1e-6)
    assert not gradients
    (tmp_path / "ours").mkdir()
    lm.adapters["vera"].save(tmp_path / "ours")
    again = PeftModel.from_pretrained(base(model), tmp_path / "ours")
    torch.testing.assert_close(logits(again.eval()), logits(theirs), rtol=1e-5, atol=1e-5)
    lm.adapters["vera"].merge(lm)
    merged = theirs.merge_and_unload().state_dict()
    for key, tensor in lm.model.state_dict().items():
        torch.testing.assert_close(tensor, merged[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["lm_head"], "lora_dropout": 0.1}, "lm_head.*lora_dropout"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "embed_tokens.*use_dora"),
        ({"target_modules": ["embed_tokens"], "trainable_token_indices": [3]}, "embed_tokens.*trainable_token_indices"),
        ({"layers_to_transform": [2]}, r"layers_to_transform: \[2\].*layers 0 to 1"),
        ({"layers_pattern": ["layers"]}, "layers_pattern.*without layers_to_transform"),
        ({"layers_to_transform": [1], "target_modules": ".*q_proj"}, "list of target_modules"),
        ({"exclude_modules": ["wq"]}, r"exclude_modules \['wq'\]"),
        ({"exclude_modules": ".*"}, "exclude_modules.*every layer"),
        ({"rank_pattern": {"wq": 2}}, "rank_pattern 'wq' matches none"),
        ({"init_lora_weights": "pissa", "r": 24}, "pissa needs a rank of at most 16.*k_proj"),
        ({"bias": "all"}, "bias: all trains nothing"),
        ({"trainable_token_indices": {"wq": [1]}}, "'wq' is neither the embedding"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str, models: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=said):
        attached(models("llama"), **{"r": 4, **options})


def test_a_run_says_how_much_of_the_model_is_reached(models: Callable[[str], Path]) -> None:
    lm, _ = attached(models("llama"), r=4, target_modules=["q_proj", "lm_head"])
    weights = dict(base(models("llama")).named_parameters())
    total = sum(p.numel() for p in weights.values())
    queries = sum(p.numel() for name, p in weights.items() if "q_proj" in name)
    ups = sum(p.numel() for name, p in weights.items() if "up_proj" in name)
    assert lm.reach is not None
    share = 100 * (queries + weights["lm_head.weight"].numel()) / total
    assert lm.reach.startswith(f"adapters reach {share:.1f} % of the model's weights; not ")
    assert f"mlp.up_proj {100 * ups / total:.1f} %" in lm.reach
    assert lm.reach.endswith(" (name them in target_modules)")
