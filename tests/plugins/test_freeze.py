"""The plugins `freeze` and `full`: what trains, what stays as it was, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from architectures import SHAPE, write_model
from killing import Runs, case
from ranked import Starter
from resuming import Sftx, interrupted
from sftx import ConfigError, ModelSpec, PluginError, RunInfo
from sftx.testing.runs import run_tiny
from sftx.verify.run_differences import differences
from sftx_plugins.trainable.freeze import Freeze
from sftx_plugins.trainable.full import Full

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers, whose embedding and head are one tensor, saved in bfloat16."""
    import torch
    import transformers

    shape = {**SHAPE, "num_hidden_layers": NUM_LAYERS, "tie_word_embeddings": True}
    directory = write_model(transformers.LlamaConfig(**shape), tmp_path_factory.mktemp("tied"))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def spec(tied: Path) -> ModelSpec:
    from sftx.model.load import load_spec

    return load_spec(str(tied))


def kinds(names: Any) -> set[str]:
    """The numbers of the layers that names are in, and the modules of the others."""
    return {name.split(".")[2] if ".layers." in name else name.split(".")[-2] for name in names}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"2", "3"}),
        ({"trainable_layers": 1}, {"3"}),
        ({"trainable_layers": -3}, {"0", "1", "2"}),
        ({"trainable_layers": 4}, {"0", "1", "2", "3"}),
        ({"trainable_layers": 1, "extra_modules": ("norm",)}, {"3", "norm"}),
        ({"trainable_layers": 0, "extra_modules": ("embed_tokens", "norm")}, {"embed_tokens", "norm"}),
        ({"trainable_layers": 0, "extra_modules": ("layers.[02].mlp", "^lm_head.weight$")}, {"0", "2", "lm_head"}),
    ],
)
def test_what_the_options_choose(spec: ModelSpec, options: dict[str, Any], expected: set[str]) -> None:
    assert kinds(Freeze(**options).sftx_trainable(spec)) == expected


def test_modules_within_layers_are_whole_names(spec: ModelSpec) -> None:
    chosen = Freeze(trainable_layers=1, trainable_modules=("mlp", "self_attn.q_proj")).sftx_trainable(spec)
    assert chosen == {
        f"model.layers.3.{name}.weight"
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
    }
    one = Freeze(trainable_layers=-1, trainable_modules="input_layernorm").sftx_trainable(spec)
    assert one == {"model.layers.0.input_layernorm.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_layers": 5}, "trainable_layers is 5, and the decoder of this model has 4 layers"),
        ({"trainable_layers": -5}, "has 4 layers"),
        ({"trainable_modules": ("mlp", "attn")}, "trainable_modules: 'attn' matches nothing .* self_attn, q_proj"),
        ({"trainable_modules": "norm"}, "trainable_modules: 'norm' matches nothing"),
        ({"extra_modules": ("head",)}, "extra_modules: 'head' matches no parameter .* embed_tokens, norm, lm_head"),
    ],
)
def test_what_matches_nothing_is_refused(spec: ModelSpec, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Freeze(**options).sftx_trainable(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_layers": 0}, "nothing would train"),
        ({"trainable_layers": 0, "extra_modules": ("norm",), "trainable_modules": "mlp"}, "trainable_layers is 0"),
        ({"trainable_modules": ()}, "trainable_modules is empty"),
        ({"extra_modules": ("layers.[0",)}, "not a regular expression"),
    ],
)
def test_options_that_cannot_be_right_are_refused_without_a_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Freeze(**options).sftx_validate(RunInfo(Path(), {}))


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_experts_train_in_their_layers(name: str, tmp_path: Path) -> None:
    from architectures import MIXTURES
    from sftx.model.load import load_spec

    spec = load_spec(str(write_model(MIXTURES[name](), tmp_path)))
    chosen = Freeze(trainable_layers=1, trainable_modules="experts").sftx_trainable(spec)
    assert {path.partition(".experts.")[0] for path in chosen} == {"model.layers.1.mlp"}


def test_frozen_weights_come_out_as_they_were_and_the_result_is_a_full_model(tied: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from sftx import load_run

    settings = {"freeze.trainable_layers": 1, "freeze.extra_modules": ["norm"], "train.learning_rate": 1e-2}
    result = run_tiny(["freeze"], tmp_path, model=tied, settings=settings)
    base, trained = load_file(tied / "model.safetensors"), load_file(result.output_dir / "model" / "model.safetensors")
    assert base.keys() == trained.keys()
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}
    moved = {name for name in base if not torch.equal(base[name], trained[name])}
    assert kinds(moved) == {"3", "norm"}
    assert {name for name in base if name.endswith("proj.weight") and ".3." in name} <= moved
    assert not (result.output_dir / "adapter").exists()

    loaded, ids_T = load_run(result.output_dir).lm, torch.arange(3, 12)
    assert not loaded.adapters
    theirs = AutoModelForCausalLM.from_pretrained(result.output_dir / "model", dtype=torch.float32)
    weights = theirs.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.model.state_dict().items())
    torch.testing.assert_close(loaded.model(ids_T[None]).logits, theirs(ids_T[None]).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_either_name_of_tied_weights_trains_both_and_it_is_said(spec: ModelSpec, tied: Path, name: str) -> None:
    import torch

    from sftx.model.language_model import CausalLM
    from sftx.model.load import load_model

    lm = CausalLM(load_model(spec, [], dtype=torch.float32, device=torch.device("cpu")), None)  # type: ignore[arg-type]
    lm.attach({}, Freeze(trainable_layers=2, trainable_modules="mlp", extra_modules=(name,)).sftx_trainable(spec))
    assert lm.head_weight is lm.model.get_input_embeddings().weight
    assert lm.head_weight.requires_grad
    trained, total = (sum(p.numel() for p in lm.parameters() if p.requires_grad or all_) for all_ in (False, True))
    assert lm.reach == (
        f"{100 * trained / total:.1f} % of the model's weights train: mlp of layers 2-3; embed_tokens = lm_head"
    )


def test_the_losses_are_those_of_a_plain_loop_over_the_same_parameters(tied: Path, spec: ModelSpec) -> None:
    """Six steps of torch's AdamW on transformers' model, with requires_grad set by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainers import ROWS_PER_STEP, planned, rows, trainer_of

    chosen = Freeze(trainable_layers=2, extra_modules=("norm",)).sftx_trainable(spec)
    trainer = trainer_of(
        tied, lora=False, trainable=chosen, learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.1,
        gradient_checkpointing=True,
    )  # fmt: skip
    oracle = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32).requires_grad_(False)
    for module in (oracle.model.layers[2], oracle.model.layers[3], oracle.model.norm):
        module.requires_grad_(True)
    trained = [p for p in oracle.parameters() if p.requires_grad]
    decays = [
        {"params": [p for p in trained if (p.ndim > 1) is is_matrix], "weight_decay": 0.1 * is_matrix}
        for is_matrix in (False, True)
    ]
    optimizer = torch.optim.AdamW(decays, lr=1e-2)
    examples = rows(ROWS_PER_STEP)
    step = tuple((at,) for at in range(ROWS_PER_STEP))
    ours, theirs = [], []
    for number in range(1, 7):
        ours.append(trainer.train_step(number, 0.0, trainer.micro_batches(planned(step, examples))).loss)
        optimizer.zero_grad()
        sums, count = torch.zeros(()), sum(len(example.token_ids) - 1 for example in examples)
        for example in examples:
            ids_T = torch.tensor(example.token_ids, dtype=torch.int64)
            logits_TV = oracle(ids_T[None]).logits[0]
            sums = sums + torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="sum")
        (sums / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        theirs.append((sums / count).item())
    assert ours == pytest.approx(theirs, abs=1e-5, rel=0)
    assert ours[-1] < ours[0] - 0.1, "nothing was learnt, so equal losses would prove little"
    for (name, mine), other in zip(trainer.lm.model.named_parameters(), oracle.parameters(), strict=True):
        assert mine.requires_grad == other.requires_grad, name
        if not other.requires_grad:
            assert torch.equal(mine, other), name


FROZEN = case(
    "frozen",
    "--plugin chatml --plugin freeze --set freeze.trainable_layers=-1 --set freeze.extra_modules=[norm] "
    "--learning-rate 1e-2 --data {data}/train.jsonl --per-device-train-batch-size 2 --gradient-accumulation-steps 2 "
    "--save-steps 2 --max-steps 4 --max-dropped 0.2",
)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(runs: Runs, sftx: Sftx) -> None:
    directory, whole = interrupted(runs, sftx, FROZEN, 3)
    result = sftx(FROZEN, directory, "--resume")
    assert result.exit_code == 0, result.output
    assert "resumed after step 2" in result.output
    assert not differences(whole, directory / "out")


@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["ddp", "fsdp2"])
def test_two_processes_train_the_same_and_leave_frozen_shards_alone(
    distributed: str, tied: Path, tmp_path: Path
) -> None:
    import torch

    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = (
        f"--model {tied} --plugin chatml --plugin freeze --set freeze.extra_modules=[lm_head] --use-cpu --max-steps 3 "
        f"--data {tmp_path}/rows.jsonl --train-batch-size 4 --per-device-train-batch-size 1 --learning-rate 1e-2 "
        f"--gradient-checkpointing --save-dtype float32 --distributed {distributed}"
    ).split()
    starter = Starter(tmp_path)
    alone, two = starter.alone(arguments), starter.run(arguments, 2).succeed()
    base, one, other = (load_file(path / "model.safetensors") for path in (tied, alone / "model", two / "model"))
    for name, tensor in base.items():
        if kinds([name]) <= {"0", "1", "norm"}:
            assert torch.equal(other[name], tensor.float()), name
        else:
            assert not torch.equal(other[name], tensor.float()), name
            torch.testing.assert_close(other[name], one[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("optim", ["adamw_bf16", "muon", "adafactor"])
def test_other_optimizers_leave_frozen_weights_alone(optim: str, tied: Path, tmp_path: Path) -> None:
    result = run_tiny(["freeze"], tmp_path, model=tied, settings={"train.optim": optim, "train.learning_rate": 1e-2})
    base, trained = load_file(tied / "model.safetensors"), load_file(result.output_dir / "model" / "model.safetensors")
    assert kinds(name for name in base if not trained[name].equal(base[name])) == {"2", "3"}


def test_full_trains_everything_and_neither_goes_with_an_adapter(spec: ModelSpec, sftx: Sftx, runs: Runs) -> None:
    assert Full().sftx_trainable(spec) == {*spec.parameter_names}
    pairs = {
        ("full", "lora"): "plugin 'full' .* trains weights of the model, and plugin 'lora' .* leave one out",
        ("vera", "freeze"): "plugin 'freeze' .* trains weights of the model, and plugin 'vera'",
        ("freeze", "full"): "both implement sftx_trainable",
    }
    for pair, message in pairs.items():
        with pytest.raises(PluginError, match=message):
            run_tiny(pair, Path("nowhere"))


def test_a_loss_that_compares_with_the_base_refuses_a_run_without_adapter(
    install_plugin: Callable[..., Any], tmp_path: Path
) -> None:
    code = """
from dataclasses import dataclass

from sftx import Loss, hookimpl
from sftx_plugins.losses.masked_ce import MaskedCE


class Compared(MaskedCE):
    needs_adapter = True


@dataclass(frozen=True, eq=False)
class Compares:
    @hookimpl
    def sftx_loss(self) -> Loss:
        return Compared()
"""
    install_plugin("sftx-compares", code, {"compares": "Compares"})
    with pytest.raises(ConfigError, match="model without its adapters, and there is none"):
        run_tiny(["compares", "freeze"], tmp_path)


def test_added_tokens_need_embedding_and_head(tied: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"add_tokens": True, "train.max_steps": 1}
    with pytest.raises(
        ConfigError, match=r"'freeze' .* rows of the added tokens untrained in embedding and output head"
    ):
        run_tiny(["llama3", "freeze"], tmp_path / "refused", model=tied, settings=settings)
    settings["freeze.extra_modules"] = ["lm_head"]
    run_tiny(["llama3", "freeze"], tmp_path / "trained", model=tied, settings=settings)
