"""What a loss computes of each example before the first step: once, kept with the run and in the cache, never stale."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ranked import Starter
from same_run import DDP, FSDP2, of_kind
from sessions import session_of
from sftx import ConfigError, Example, ModelError, PluginError, load_model, pack, pad
from sftx.assembly.stages.loss_stage import LossStage
from sftx.cli import main
from sftx.config.loading import load
from sftx.data.example_values import Values, places_of
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model as load_weights
from sftx.model.load import load_spec, load_tokenizer
from sftx.training import _check_loss
from sftx.verify.run_differences import differences

PACKAGE = Path(__file__).parents[1] / "packages" / "sftx-reference"
STEPS = "--max-steps 6 --train-batch-size 4 --per-device-train-batch-size 2 --save-steps 2 --eval-steps 3 "


@pytest.fixture
def data(tmp_path: Path, install_plugin: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows to train on and held-out ones; the plugin `reference` is installed, and the cache is empty."""
    monkeypatch.syspath_prepend(PACKAGE)
    install_plugin("reference-here", "from sftx_reference import Reference", {"reference": "Reference"})
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    from sftx_reference import rows  # type: ignore[import-not-found]

    for name, num, seed in (("train", 14, 0), ("held", 5, 1)):
        lines = "".join(json.dumps(row) + "\n" for row in rows(num, seed))
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


@pytest.fixture
def computed(data: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the examples of which a reference was computed before training."""
    from sftx_reference import PairLoss

    ids: list[str] = []
    precompute = PairLoss.precompute

    def counted(loss: Any, lm: Any, batch: Any) -> Any:
        ids.extend(batch.row_ids)
        return precompute(loss, lm, batch)

    monkeypatch.setattr(PairLoss, "precompute", counted)
    return ids


def command(data: Path, name: str, more: str = "", *, model: str | Path = "sftx:tiny") -> list[str]:
    text = (
        f"run --model {model} --plugin chatml --plugin reference --data {data}/train.jsonl "
        f"--eval-data {data}/held.jsonl --use-cpu --learning-rate 5e-3 {STEPS} --output-dir {data}/{name} " + more
    )
    return text.split()


def run(data: Path, name: str, more: str = "", *, model: str | Path = "sftx:tiny", fails: bool = False) -> str:
    done = CliRunner().invoke(main, command(data, name, more, model=model))
    assert (done.exit_code != 0) == fails, done.output
    return done.output


def reported(data: Path, name: str) -> list[tuple[float, ...]]:
    """Return loss and margin of each step and each evaluation."""
    lines = [*of_kind(data / name, "step"), *of_kind(data / name, "evaluate")]
    return [(line["loss"], line["margin"]) for line in lines]


# --- the values -----------------------------------------------------------------------------------


def test_the_losses_are_those_with_a_reference_computed_in_each_step(data: Path, computed: list[str]) -> None:
    run(data, "each", "--plugin lora --set reference.once=false")
    assert not computed
    run(data, "once", "--plugin lora")
    assert len(computed) == len(set(computed)) == 2 * (14 + 5)
    run(data, "packed", "--plugin lora --plugin packed --train-batch-size 1 --per-device-train-batch-size 1")
    once, each = reported(data, "once"), reported(data, "each")
    assert once[0][0] == pytest.approx(np.log(2), abs=1e-6), "before training, the model equals its reference"
    assert once[5][0] < 0.68, "the model moves away from it"
    for ours, theirs in zip(once, each, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert reported(data, "packed")[0] == pytest.approx(once[0], abs=1e-5)


def test_a_prompt_that_is_computed_once_gives_the_same_losses(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    from sftx.trainer.session import Session

    batches: list[Any] = []
    packed = "--plugin lora --plugin packed --set packed.length=256 --train-batch-size 2 "
    packed += "--per-device-train-batch-size 2 --learning-rate 5e-4 "  # Adam's step is whole for rounding alone
    run(data, "apart", packed)
    with pytest.MonkeyPatch.context() as patch:
        run_all = Session._run

        def recording(session: Session, signals: Any) -> Any:
            micro_batches = session.trainer.micro_batches
            session.trainer.micro_batches = lambda *a: batches.append(made := micro_batches(*a)) or made  # type: ignore[method-assign,func-returns-value]
            return run_all(session, signals)

        patch.setattr(Session, "_run", recording)
        run(data, "shared", packed + "--set reference.share=true")
    assert all(one.batch.shared is not None for step in batches for one in step)
    for ours, theirs in zip(reported(data, "shared"), reported(data, "apart"), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
        assert ours[1] == pytest.approx(theirs[1], abs=5e-5), "a difference of sums of a hundred nats in fp32"
    output = run(data, "padded", "--plugin lora --set reference.share=true")
    assert "the prompt of several answers is computed for each of them: plugin 'padded'" in output


def test_a_full_model_is_compared_with_what_it_was(data: Path) -> None:
    run(data, "full", "--learning-rate 1e-3")
    losses = reported(data, "full")
    assert losses[0][0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[5][0] < losses[0][0]


def test_values_are_found_by_the_example_and_by_its_row_id() -> None:
    def example(number: int) -> Example:
        return Example([1] * (3 + number), [True] * (3 + number), f"row {number}", number)  # type: ignore[arg-type]

    examples = [example(n) for n in range(4)]
    values = Values({"a": np.arange(10, dtype=np.float32)})
    assert values.add_to(pad(examples), [5, 3, 9, 0], examples).extras["a"].tolist() == [5, 3, 9, 0]
    assert values.add_to(pack(examples[::-1]), [5, 3, 9, 0], examples).extras["a"].tolist() == [0, 9, 3, 5]
    copied = pad([example(2), examples[0], example(3), example(1)])
    assert places_of(copied, examples) == [2, 0, 3, 1]
    assert values.add_to(copied, [5, 3, 9, 0], examples).extras["a"].tolist() == [9, 5, 0, 3]
    twice = [examples[0], example(0), examples[1]]  # a record that a mixture has drawn twice
    assert places_of(pad(twice), twice) == [0, 1, 2]
    with pytest.raises(PluginError, match="precompute has the name 'a'"):
        values.add_to(values.add_to(pad(examples), [0, 1, 2, 3], examples), [0, 1, 2, 3], examples)


# --- cached, and never stale ----------------------------------------------------------------------


def test_values_are_computed_once_for_the_same_model_data_and_options(data: Path, computed: list[str]) -> None:
    from sftx.model.tiny import model_dir

    all_rows = 2 * (14 + 5)
    model = data / "model"
    shutil.copytree(model_dir(), model)

    def newly_computed(**options: Any) -> int:
        session = session_of(
            model,
            data / "train.jsonl",
            "reference",
            data__eval=str(data / "held.jsonl"),
            train__use_cpu=True,
            **options,
        )
        computed.clear()
        assert session.precomputation is not None
        session.precomputation(data / "values.safetensors", is_trained=False, model=str(model))
        (data / "values.safetensors").unlink()
        return len(computed)

    assert newly_computed() == all_rows
    assert newly_computed(train__learning_rate=1e-3, train__train_batch_size=2) == 0
    assert newly_computed(reference__beta=0.4) == all_rows
    assert newly_computed(data__cache=False) == all_rows
    held = data / "held.jsonl"
    held.write_text(held.read_text(encoding="utf-8").replace("red", "green", 1), encoding="utf-8")
    assert newly_computed() == 2 * 5, "the training rows are as they were"
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, weights, {"format": "pt"})
    assert newly_computed() == all_rows
    assert newly_computed() == 0
    for file in (data / "cache" / "precomputed").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert newly_computed() == all_rows


def test_another_model_is_the_reference_and_its_weights_count(data: Path, computed: list[str]) -> None:
    from sftx.model.tiny import model_dir

    reference = data / "reference"
    shutil.copytree(model_dir(), reference)
    tensors = load_file(reference / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, reference / "model.safetensors", {"format": "pt"})
    more = f"--plugin lora --set reference.reference_model={reference}"
    run(data, "other", more)
    assert abs(reported(data, "other")[0][1]) > 1e-2, "the model is another one than the reference"
    computed.clear()
    run(data, "again", more)
    assert not computed
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, reference / "model.safetensors", {"format": "pt"})
    run(data, "changed", more)
    assert len(computed) == 2 * (14 + 5)
    assert reported(data, "changed")[0] != reported(data, "other")[0]


# --- kept with the run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param("--plugin lora", id="lora", marks=pytest.mark.slow),
        pytest.param("--learning-rate 1e-3", id="full"),
    ],
)
def test_a_resumed_run_reads_the_values_and_ends_the_same(data: Path, computed: list[str], adapter: str) -> None:
    from sftx.trainer.trainer import Trainer

    run(data, "whole", adapter)
    expected = sorted(computed)

    class Killed(BaseException):
        pass

    train_step = Trainer.train_step

    def killed(trainer: Any, number: int, *rest: Any) -> Any:
        if number == 4:
            raise Killed
        return train_step(trainer, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises(Killed):
            CliRunner().invoke(main, command(data, "killed", adapter + " --set data.cache=false"))
    assert sorted(computed) == sorted(2 * expected)
    computed.clear()
    shutil.rmtree(data / "cache" / "precomputed")
    shutil.copytree(data / "killed", data / "lost")
    run(data, "killed", adapter + " --set data.cache=false --resume")
    assert not computed, "the model has been trained since"
    found = differences(data / "killed", data / "whole", ignore=frozenset({"artefact"}))
    named = ("run.yaml", "manifest.json", "loss.png")  # they name the directory, and the cache
    assert not [line for line in found if not line.startswith(named)]
    (data / "lost" / "precomputed.safetensors").unlink()
    output = run(data, "lost", adapter + " --set data.cache=false --resume", fails=True)
    assert "has not the values that plugin 'reference'" in output
    assert "has been trained since; bring the file" in output


def test_a_run_killed_while_it_computes_begins_again(data: Path, computed: list[str]) -> None:
    class Killed(BaseException):
        pass

    precompute = LossStage.precompute

    def killed(loss: Any, lm: Any, batch: Any) -> Any:
        if computed:
            raise Killed
        return precompute(loss, lm, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossStage, "precompute", killed)
        patch.setattr("sftx.trainer.run_writer.RunWriter.remove_empty_run", lambda *_: None)  # kill -9 removes nothing
        with pytest.raises(Killed):
            CliRunner().invoke(main, command(data, "killed", "--plugin lora"))
    assert not (data / "killed" / "precomputed.safetensors").exists()
    computed.clear()
    run(data, "killed", "--plugin lora --resume")
    assert len(computed) == 2 * (14 + 5)
    assert len(reported(data, "killed")) == 6 + 3


def test_a_finished_run_is_evaluated_with_its_values(data: Path, computed: list[str]) -> None:
    for name, adapter in (("lora", "--plugin lora"), ("full", "--learning-rate 1e-3")):
        run(data, name, adapter)
        computed.clear()
        done = CliRunner().invoke(main, ["evaluate", str(data / name), "--json"])
        assert done.exit_code == 0, done.output
        after = json.loads((data / name / "summary.json").read_text(encoding="utf-8"))["held_out"]["after"]
        evaluated = json.loads(done.output[done.output.index("{") :])["trained"]
        assert evaluated == pytest.approx(after, rel=1e-5)
        assert not computed
    other = ["--eval-data", str(data / "train.jsonl"), "--set", "data.max_overlap=1"]
    done = CliRunner().invoke(main, ["evaluate", str(data / "lora"), *other])
    assert done.exit_code == 0, done.output
    assert len(computed) == 2 * 14, "of other rows, by the base of the adapters"
    done = CliRunner().invoke(main, ["evaluate", str(data / "full"), *other])
    assert "has been trained since" in done.output


def _with_plugin(places: Sequence[str], rank: int) -> None:
    sys.path[:0] = places


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        (DDP, "--plugin packed --set packed.length=128 --set reference.share=true "),
        pytest.param(FSDP2, "", marks=pytest.mark.slow),
        pytest.param(FSDP2, "--plugin packed --set reference.share=true ", marks=pytest.mark.slow),
    ],
)
def test_two_processes_compute_the_values_of_one(data: Path, tmp_path: Path, strategy: str, more: str) -> None:
    from safetensors.numpy import load_file as load_arrays

    starter = Starter(tmp_path / "ranks")
    from sftx.model.tiny import model_dir

    options = f"--plugin lora --learning-rate 5e-4 --set data.cache=false {more}{strategy}"
    words = command(data, "unused", options, model=model_dir())[1:]
    arguments = [word for word in words if word not in ("--output-dir", f"{data}/unused")]
    prepare = partial(_with_plugin, [str(PACKAGE), str(tmp_path / "site-packages")])
    alone, shared = (starter.run(arguments, size, prepare=prepare).succeed() for size in (1, 2))
    values = [load_arrays(out / "precomputed.safetensors") for out in (alone, shared)]
    assert [sorted(one) for one in values] == [["held-out/reference_E", "training/reference_E"]] * 2
    for name, array in values[0].items():
        assert array.tolist() == values[1][name].tolist()
    for one, other in zip(of_kind(shared, "step"), of_kind(alone, "step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0, abs=1e-5)


# --- refused --------------------------------------------------------------------------------------


def test_a_stream_is_refused(data: Path) -> None:
    output = run(data, "stream", "--plugin lora --streaming --plan-window 8", fails=True)
    assert "plugin 'reference'" in output
    assert "computes a value of every example before the first step, and a stream has no end" in output


def test_a_rollout_is_refused(data: Path) -> None:
    from sftx_reference import PairLoss, Reference

    loaded = load(None, add=["chatml", "reference"], assignments=[("data.train", str(data / "train.jsonl"), "")])
    loss = LossStage("the loss", PairLoss(Reference()))
    with pytest.raises(ConfigError, match=r"the loss computes a value of every example .* the rollout makes"):
        _check_loss(loaded.config, loss, {}, ["the rollout"], 1, has_adapters=True)


def test_a_plan_counts_a_loss_that_precomputes(data: Path) -> None:
    for more in ("", " --set reference.reference_model=sftx:tiny"):
        words = (
            f"plan --model sftx:tiny --plugin chatml --plugin reference --plugin lora --data {data}/train.jsonl{more}"
        )
        done = CliRunner().invoke(main, words.split())
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "precompute returned NoneType, expected a dict"),
        ({"a": 1.0}, r"precompute\['a'\] is float, expected a tensor of \[2\]"),
        ({"a": torch.zeros(3)}, r"precompute\['a'\] is \[3\], expected a tensor of \[2\]"),
    ],
)
def test_what_is_computed_is_checked(made: object, message: str) -> None:
    class Wrong:
        def precompute(self, *_: object) -> object:
            return made

    examples = [Example([1, 2], [True] * 2, f"row {n}", n) for n in range(2)]  # type: ignore[arg-type]
    with pytest.raises(PluginError, match=f"the loss: {message}"):
        LossStage("the loss", Wrong()).precompute(None, pad(examples))  # type: ignore[arg-type]


def test_a_value_that_is_not_finite_names_its_row(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx_reference import PairLoss

    monkeypatch.setattr(
        PairLoss, "precompute", lambda _, lm, batch: {"a": torch.full((len(batch.row_ids),), torch.nan)}
    )
    assert "is not finite" in run(data, "nan", "--plugin lora", fails=True)


# --- another model --------------------------------------------------------------------------------


@pytest.fixture
def lm() -> CausalLM:
    from sftx.model.tiny import model_dir

    name = str(model_dir())
    cpu = torch.device("cpu")
    return CausalLM(load_weights(load_spec(name), [], dtype=torch.float32, device=cpu), load_tokenizer(name))


def test_a_loaded_model_is_frozen_and_in_the_dtype_of_the_run(lm: CausalLM) -> None:
    other: Any = load_model("sftx:tiny", like=lm)
    assert not other.training
    assert not any(p.requires_grad for p in other.parameters())
    assert other.head_weight.dtype == torch.float32
    batch = pad([Example([5, 6, 7], [True] * 3, "row", 0)])  # type: ignore[arg-type]
    assert torch.equal(other.hidden(batch).hidden_BTD, lm.eval().hidden(batch).hidden_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        assert load_model("sftx:tiny", like=lm).head_weight.dtype == torch.bfloat16
    assert len(lm.other_models) == 1
    assert all(lm.other_models.values())


def test_a_run_is_loaded_with_its_adapters(data: Path, lm: CausalLM) -> None:
    run(data, "trained", "--plugin lora --learning-rate 0.05")
    other: Any = load_model(str(data / "trained"), like=lm)
    batch = pad([Example([5, 6, 7], [True] * 3, "row", 0)])  # type: ignore[arg-type]
    base_BTD = lm.eval().hidden(batch).hidden_BTD
    assert not torch.allclose(other.hidden(batch).hidden_BTD, base_BTD, atol=1e-3)
    with other.without_adapters():
        assert torch.equal(other.hidden(batch).hidden_BTD, base_BTD)
    assert len(lm.other_models) == 2, "adapter and base"


def test_a_model_with_another_tokenizer_is_refused(lm: CausalLM, tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"its tokenizer gives other ids than that of the run.*same tokenizer"):
        load_model(str(tiny_model_dir), like=lm)
