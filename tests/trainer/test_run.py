"""Whole runs of the tiny model: what they leave behind, how they stop, and that they repeat."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sftx import Observer, StepReport
from sftx.config.loading import load
from sftx.errors import OutputError, TrainingError
from sftx.training import assemble, run
from trainers import planned


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, count in (("train", 20), ("held", 6)):
        rows = [{"prompt": f"{name} {n} plus one", "completion": f"{n + 1}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def options(model: Path, data: Path, **more: Any) -> Any:
    given = {
        "model": str(model),
        "data.train": str(data / "train.jsonl"),
        "output_dir": str(data / "out"),
        "train.per_device_train_batch_size": 4,
        "train.learning_rate": 1e-2,
        "generation.max_new_tokens": 4,
    } | {name.replace("__", "."): value for name, value in more.items()}
    plugins = given.pop("plugins", ["chatml", "lora"])
    return load(None, add=plugins, assignments=[(name, value, f"--set {name}") for name, value in given.items()])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_directory_holds_all_that_the_run_was(tiny_model_dir: Path, data: Path) -> None:
    result = run(
        options(
            tiny_model_dir,
            data,
            plugins=["chatml", "lora", "exact-match"],
            data__eval=str(data / "held.jsonl"),
            train__num_train_epochs=2,
            train__save_steps=3,
            train__save_total_limit=2,
            train__eval_steps=4,
        )
    )
    out = data / "out"
    assert result.output_dir == out
    assert {p.name for p in out.iterdir()} == {
        "adapter", "checkpoints", "evidence.json", "generated_predictions.jsonl", "ledger.jsonl",
        "ledger-held-out.jsonl", "loss.png", "manifest.json", "metrics.jsonl", "report.html", "run.yaml",
        "summary.json", "trainer_state.json",
    }  # fmt: skip
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-9", "step-10"}
    for artefact in (out / "adapter", *(out / "checkpoints").iterdir()):
        names = {p.name for p in artefact.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        assert {p.stat().st_mode & 0o777 for p in artefact.iterdir()} == {0o644}
        config = json.loads((artefact / "adapter_config.json").read_text())
        assert config["target_modules"] == sorted(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )
        assert "named SmolLM" not in (artefact / "chat_template.jinja").read_text(), "not what was trained"

    events = lines(out / "metrics.jsonl")
    steps = [e for e in events if e["event"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, 11))
    assert steps[-1]["epoch"] == 2
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [e["step"] for e in events if e["event"] == "evaluate"] == [0, 4, 8, 10]

    summary = json.loads((out / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert summary["num_steps"] == 10
    held = summary["held_out"]
    assert held["after"]["loss"] < held["before"]["loss"]
    assert held["after"]["perplexity"] == pytest.approx(math.exp(held["after"]["loss"]))
    assert 0 <= held["after"]["token_accuracy"] <= 1
    assert "exact-match" in held["before"]
    assert [set(s) for s in summary["samples"]] == [{"row", "prompt", "reference", "before", "after"}] * 3

    manifest = json.loads((out / "manifest.json").read_text())
    assert {p["plugin"] for p in manifest["plugins"]} >= {
        "chatml",
        "lora",
        "padded",
        "masked-ce",
        "exact-match",
        "jsonl",
    }
    assert len(manifest["model"]["sha256"]) == 64
    assert [len(value["fingerprint"]) for value in (*manifest["data"], *manifest["eval_data"])] == [64, 64]


def test_the_resolved_run_file_is_the_run(tiny_model_dir: Path, data: Path) -> None:
    run(options(tiny_model_dir, data, train__max_steps=2, lora__r=4))
    again = load(data / "out" / "run.yaml", assignments=[("output_dir", str(data / "again"), "--output-dir")])
    assert again.config.plugins["lora"]["r"] == 4
    run(again)
    drop = {"seconds", "tokens_per_second", "peak_bytes"}
    first, second = (
        [{k: v for k, v in line.items() if k not in drop} for line in lines(data / name / "metrics.jsonl")]
        for name in ("out", "again")
    )
    assert first == second
    weights = [(data / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1], "the same run twice must give the same bytes"


def test_without_an_adapter_the_whole_model_trains_and_transformers_loads_it(tiny_model_dir: Path, data: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    session = assemble(options(tiny_model_dir, data, plugins=["chatml"], train__max_steps=2))
    before = session.lm.head_weight.detach().clone()
    session.run()
    assert not torch.equal(session.lm.head_weight, before)
    loaded = AutoModelForCausalLM.from_pretrained(data / "out" / "model")
    ours = session.lm.model.state_dict()
    theirs = loaded.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    AutoTokenizer.from_pretrained(data / "out" / "model")


def test_bf16_keeps_a_frozen_base_in_bf16_and_trains_in_fp32(tiny_model_dir: Path, data: Path) -> None:
    import torch

    losses = {}
    for bf16 in (False, True):
        session = assemble(options(tiny_model_dir, data, train__bf16=bf16, train__max_steps=5))
        frozen = {p.dtype for p in session.lm.parameters() if not p.requires_grad}
        trained = {p.dtype for p in session.lm.parameters() if p.requires_grad}
        assert (frozen, trained) == ({torch.bfloat16 if bf16 else torch.float32}, {torch.float32})
        losses[bf16] = [
            session.trainer.train_step(n, e, session.trainer.micro_batches(planned(s, session.data.examples))).loss
            for n, (e, s, *_) in enumerate(session.sampler, 1)
        ]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[True] != losses[False]
    full = assemble(options(tiny_model_dir, data, plugins=["chatml"], train__bf16=True, train__max_steps=1))
    assert {p.dtype for p in full.lm.parameters()} == {torch.float32}
    full.run()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tiny_model_dir: Path, data: Path) -> None:
    import torch

    session = assemble(options(tiny_model_dir, data, train__save_steps=2))
    step = session.trainer.train_step

    def poisoned(number: int, *args: Any) -> StepReport:
        if number == 3:
            with torch.no_grad():
                session.trainer.parameters[0].fill_(float("nan"))
        return step(number, *args)

    session.trainer.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as caught:
        session.run()
    message = str(caught.value)
    assert message.startswith("step 3: the loss is nan")
    assert "train.jsonl:" in message
    assert f"last saved: {data}/out/checkpoints/step-2" in message
    assert not (data / "out" / "adapter").exists()
    assert (data / "out" / "checkpoints" / "step-2" / "adapter_model.safetensors").exists()


class Broken(Observer):
    calls = 0

    def on_step(self, report: StepReport) -> None:
        Broken.calls += 1
        raise RuntimeError("no space in my head")


def test_an_observer_that_fails_is_named_once_and_switched_off(
    tiny_model_dir: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = assemble(options(tiny_model_dir, data, train__max_steps=3))
    info = session.observers._observers[0][0]
    session.observers._observers.insert(0, (info, Broken()))
    session.run()
    assert Broken.calls == 1
    named = [r.getMessage() for r in caplog.records if "switched off" in r.getMessage()]
    assert named == [f"{info} failed and is switched off: RuntimeError: no space in my head"]
    assert len(lines(data / "out" / "metrics.jsonl")) == 3


def test_norms_and_biases_do_not_decay(tiny_model_dir: Path, data: Path) -> None:
    session = assemble(options(tiny_model_dir, data, plugins=["chatml"], train__weight_decay=0.1))
    names = {id(p): name for name, p in session.lm.named_parameters()}
    decayed, others = session.trainer.optimizer.optimizers[0].param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all("norm" in names[id(p)] for p in others["params"])
    assert len(others["params"]) == 5
    assert not [names[id(p)] for p in decayed["params"] if "norm" in names[id(p)]]


def test_default_directories_never_collide(tiny_model_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    places = []
    for _ in range(2):
        loaded = options(tiny_model_dir, data, train__max_steps=1, output_dir=None)
        places.append(run(loaded, name="train").output_dir)
    assert places == [Path("runs/train-1"), Path("runs/train-2")]


def test_runs_that_start_at_once_take_different_directories(
    tiny_model_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    sessions = [assemble(options(tiny_model_dir, data, train__max_steps=1, output_dir=None)) for _ in range(2)]
    assert {s.writer.directory.path for s in sessions} == {Path("runs/run-1")}, "both chose it before either made it"
    places = [session.run().output_dir for session in sessions]
    assert places == [Path("runs/run-1"), Path("runs/run-2")]
    assert all(len(lines(place / "metrics.jsonl")) == 1 for place in places)


def test_a_directory_taken_meanwhile_is_not_touched(tiny_model_dir: Path, data: Path) -> None:
    first, second = (assemble(options(tiny_model_dir, data, train__max_steps=1)) for _ in range(2))
    first.run()
    before = {p: p.stat().st_mtime_ns for p in (data / "out").rglob("*")}
    with pytest.raises(OutputError, match="holds a run already"):
        second.run()
    assert {p: p.stat().st_mtime_ns for p in (data / "out").rglob("*")} == before


def test_the_run_info_of_an_observer_is_the_resolved_run(tiny_model_dir: Path, data: Path) -> None:
    session = assemble(options(tiny_model_dir, data))
    plugins = session.writer._resolved["plugins"]
    assert plugins["lora"]["r"] == 16
    assert plugins["padded"]["group_by_length"] is True
