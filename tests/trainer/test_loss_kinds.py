"""Losses of other kinds than cross-entropy: statistics of a step, metrics with their own count, declarations."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sessions import session_of
from sftx import ConfigError, PluginError
from sftx.config.loading import load
from sftx.testing.loss import SUITE
from sftx.trainer.session import Session
from sftx.training import assemble

PACKAGES = Path(__file__).parents[1] / "packages"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = random.Random(0)
    answers = [
        " ".join(rng.choices(["red", "green", "blue", "seven", "please"], k=rng.randint(1, 9))) for _ in range(8)
    ]
    rows = [{"prompt": f"Question {n}?", "completion": text, "label": n % 3 != 0} for n, text in enumerate(answers)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run_of(
    data: Path, tiny_model: Path, install_plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Session]:
    """Return an assembled run whose adapter has an effect."""
    for name in ("bco", "dft"):
        monkeypatch.syspath_prepend(PACKAGES / f"sftx-{name}")
        install_plugin(f"{name}-here", f"from sftx_{name} import {name.upper()}", {name: name.upper()})

    def make(*plugins: str, **options: Any) -> Session:
        session = session_of(tiny_model, data, *plugins, train__use_cpu=True, train__num_train_epochs=1, **options)
        with torch.no_grad():
            for name, parameter in session.lm.named_parameters():
                if name.endswith("lora_B"):
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return session

    return make


def first_step(session: Session) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    trainer = session.trainer
    micro_batches = trainer.micro_batches(next(iter(session.sampler)))
    denominator = sum(one.denominator for one in micro_batches)
    loss, sums = trainer.accumulate(micro_batches, denominator, 0)
    metrics = trainer.loss.metric_means({name: value.item() for name, value in sums.items()}, denominator)
    gradients = {name: p.grad.clone() for name, p in session.lm.named_parameters() if p.grad is not None}
    return loss.item(), metrics, gradients


def test_a_statistic_is_that_of_the_whole_step_however_it_is_split(run_of: Callable[..., Session]) -> None:
    size = "train__per_device_train_batch_size"
    expected = first_step(run_of("bco", train__train_batch_size=8, **{size: 8}))
    assert abs(expected[1]["shift"]) > 0.01
    for micro_batch in (4, 2, 1):
        loss, metrics, gradients = first_step(run_of("bco", train__train_batch_size=8, **{size: micro_batch}))
        assert loss == pytest.approx(expected[0], rel=1e-6)
        # Rewards are small differences of log-likelihoods of about 50 nats in fp32.
        assert metrics == pytest.approx(expected[1], rel=1e-5, abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[2][name], rtol=1e-4, atol=1e-7)


def test_a_metric_with_a_count_is_the_mean_over_that_count(run_of: Callable[..., Session]) -> None:
    """Three of the eight answers are bad; a step of good ones alone reports no mean of the bad ones."""
    session = run_of("bco", train__train_batch_size=8, train__per_device_train_batch_size=8)
    _, metrics, _ = first_step(session)
    (micro_batch,) = session.trainer.micro_batches(next(iter(session.sampler)))
    batch = micro_batch.batch
    with torch.no_grad():
        rewards_E, _ = session.trainer.loss._loss._rewards(session.lm, batch)  # type: ignore[attr-defined]
    good_E = batch.extras["bco_good_E"]
    assert int((~good_E).sum()) == 3
    assert metrics["rewards/bad"] == pytest.approx(rewards_E[~good_E].mean().item(), rel=1e-5)
    assert metrics["rewards/good"] == pytest.approx(rewards_E[good_E].mean().item(), rel=1e-5)

    session = run_of("bco", train__train_batch_size=1, train__per_device_train_batch_size=1)
    reports: list[Any] = []
    session.trainer.train(session.sampler, 0, lambda report: not reports.append(report))  # type: ignore[func-returns-value]
    seen = [frozenset(report.metrics) & {"rewards/good", "rewards/bad"} for report in reports]
    assert sorted(map(len, seen)) == [1] * 8
    assert sum("rewards/bad" in names for names in seen) == 3
    assert all(math.isfinite(value) for report in reports for value in report.metrics.values())


def test_held_out_rows_have_one_statistic_whatever_the_batch_size(run_of: Callable[..., Session], data: Path) -> None:
    means = []
    for size in (8, 3):
        session = run_of("bco", data__eval=str(data), data__max_overlap=1.0, train__per_device_eval_batch_size=size)
        means.append(session.evaluator(session.lm, 0).metrics)
    assert means[0] == pytest.approx(means[1], rel=1e-5)
    assert {"loss", "shift", "rewards/good", "rewards/bad"} <= means[0].keys()


def test_what_a_loss_declares_is_exempt_from_the_contract_and_the_rest_is_checked(
    run_of: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftx_bco import BCO  # type: ignore[import-not-found]
    from sftx_dft import DFT, DFTLoss  # type: ignore[import-not-found]

    assert {finding.status for finding in SUITE.findings(BCO())} == {"ok"}
    of_dft = {finding.clause: finding.status for finding in SUITE.findings(DFT())}
    assert of_dft.pop("right-gradient") == "exempt"
    assert set(of_dft.values()) == {"ok"}
    monkeypatch.setattr(DFTLoss, "detached", False)
    assert {f.clause for f in SUITE.findings(DFT()) if f.status == "failed"} == {"right-gradient"}


def test_a_loss_that_a_run_cannot_compute_is_refused(
    data: Path, tiny_model: Path, install_plugin: Any, run_of: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftx_dft import DFTLoss

    options = {"model": str(tiny_model), "data.train": str(data), "train.use_cpu": True}
    loaded = load(None, add=["chatml", "bco"], assignments=[(name, value, name) for name, value in options.items()])
    with pytest.raises(ConfigError, match=r"without its adapters.*--plugin lora"):
        assemble(loaded)
    monkeypatch.setattr(DFTLoss, "batch_statistic", True, raising=False)
    plain = [
        {key: row[key] for key in ("prompt", "completion")} for row in map(json.loads, data.read_text().splitlines())
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in plain))
    for rows, size, advice in ((1, 1, "--train-batch-size"), (4, 2, "--per-device-train-batch-size 4")):
        with pytest.raises(ConfigError, match=f"dft.*one another.*{advice}"):
            run_of("dft", train__train_batch_size=rows, train__per_device_train_batch_size=size)
    run_of("dft", train__train_batch_size=4, train__per_device_train_batch_size=4)
    monkeypatch.setattr(DFTLoss, "needs_adapter", "yes", raising=False)
    with pytest.raises(PluginError, match="needs_adapter is 'yes'"):
        run_of("dft")


def test_statistics_are_checked(run_of: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx_bco import BCOLoss

    session = run_of("bco")
    for wrong, message in (
        (None, "statistics returned NoneType"),
        ({}, "statistics returned dict"),
        ({"kl": 1.0}, r"statistics\['kl'\] is float"),
        ({"kl": torch.zeros(2)}, r"statistics\['kl'\] is a tensor of shape \[2\]"),
    ):
        monkeypatch.setattr(BCOLoss, "statistics", lambda *_, wrong=wrong: wrong)
        with pytest.raises(PluginError, match=message):
            first_step(session)


# --- extras of a loss -----------------------------------------------------------------------------

MARGIN = """
from dataclasses import dataclass
from sftx import LossSum, hookimpl, sum_by_example

@dataclass(frozen=True, eq=False)
class Margin:
    answers_only = True

    @hookimpl
    def sftx_loss(self):
        return self

    def extras(self, batch):
        import torch

        good = {e.group: n for n, e in enumerate(batch.examples) if e.extras["preference"] == "chosen"}
        other = {e.group: n for n, e in enumerate(batch.examples) if e.extras["preference"] == "rejected"}
        return {"pair_P2": torch.tensor([(good[group], other[group]) for group in good])}

    def denominator(self, batch):
        return float(len(batch.extras["pair_P2"]))

    def __call__(self, lm, batch):
        import torch

        hidden = lm.hidden(batch)
        nll_N = lm.cross_entropy(
            hidden.hidden_BTD, batch.labels_BT, num_valid=batch.num_label_tokens, reduction="none"
        ).loss
        good_P, other_P = sum_by_example(batch, nll_N)[batch.extras["pair_P2"]].unbind(1)
        return LossSum(-torch.nn.functional.logsigmoid(0.1 * (other_P - good_P)).sum(), hidden.aux_loss)
"""


def test_a_loss_finds_its_pairs_in_whatever_the_collator_makes(
    run_of: Callable[..., Session], install_plugin: Any, data: Path, tiny_model: Path
) -> None:
    from sftx.inspection.memory_plan.planner import Planner
    from sftx.inspection.memory_plan.target_device import parse

    install_plugin("margin-here", MARGIN, {"margin": "Margin"})
    answers = [row["completion"] for row in map(json.loads, data.read_text().splitlines())]
    pairs = [
        {"prompt": f"Question {n}?", "chosen": text, "rejected": f"{answers[n - 1]} or not"}
        for n, text in enumerate(answers)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    batches: dict[str, Any] = {"train__train_batch_size": 8, "data__eval": str(data), "train__eval_steps": 100}
    seen = []
    for collator, size in (("padded", 8), ("padded", 3), ("packed", 1)):
        options = batches | {"train__per_device_train_batch_size": size, "train__per_device_eval_batch_size": size}
        options |= {"train__train_batch_size": 1, "packed__length": 2048} if collator == "packed" else {}
        session = run_of("margin", "preference", collator, **options)
        loss, _, gradients = first_step(session)
        seen.append((loss, session.evaluator(session.lm, 0).metrics["loss"], gradients))
    for loss, held_out, gradients in seen[1:]:
        assert loss == pytest.approx(seen[0][0], rel=1e-6)
        assert held_out == pytest.approx(seen[0][1], rel=1e-6)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, seen[0][2][name], rtol=1e-4, atol=1e-7), name
    given = {"model": str(tiny_model), "data.train": str(data), "data.eval": str(data), "data.max_length": 64}
    assignments = [(name, value, name) for name, value in given.items()]
    for collator in ("padded", "packed"):
        loaded = load(None, add=["chatml", "lora", "margin", "preference", collator], assignments=assignments)
        assert Planner(loaded, parse("h100")).estimate().total > 0


# --- the values of TRL ---------------------------------------------------------------------------


def copy_adapter(session: Session, peft_model: Any) -> dict[str, torch.nn.Parameter]:
    """Copy our LoRA weights into PEFT's layers, and return what PEFT trains."""
    ours = dict(session.lm.model.named_parameters())
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours[name.removeprefix("base_model.model.").replace(".default.weight", "")])
    return {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


def trl_trainer(kind: str, model: Path, directory: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    """Return TRL's trainer on the same model with PEFT's LoRA. Its own data set is never read."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    return getattr(trl, f"{kind}Trainer")(
        AutoModelForCausalLM.from_pretrained(model),
        args=getattr(trl, f"{kind}Config")(output_dir=str(directory / "trl"), **plain, **options),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def steps_beside(session: Session, oracle: Any, inputs_of: Callable[[list[Any]], Any], num_items: Any = None) -> int:
    """Train both for the steps of an epoch, and compare loss and gradient norm of each; return their number."""
    trained = copy_adapter(session, oracle.model)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.01)
    oracle.model.train()
    number = 0
    for number, planned in enumerate(session.sampler, 1):
        examples = [planned.examples[index] for row in planned.rows for index in row]
        report = session.trainer.train_step(number, planned.epoch, session.trainer.micro_batches(planned))
        optimizer.zero_grad()
        more = {} if num_items is None else {"num_items_in_batch": num_items(examples)}
        loss = oracle.compute_loss(oracle.model, inputs_of(examples), **more)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        assert report.loss == pytest.approx(loss.item(), abs=1e-5, rel=0)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-3)
    return number


TRAINING: dict[str, Any] = {
    "train__train_batch_size": 4,
    "train__learning_rate": 1e-3,
    "train__lr_scheduler_type": "constant",
    "train__weight_decay": 0.01,
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_dft_gives_the_losses_of_trl(
    run_of: Callable[..., Session], data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    plain = [
        {key: row[key] for key in ("prompt", "completion")} for row in map(json.loads, data.read_text().splitlines())
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in plain))
    session = run_of("dft", train__per_device_train_batch_size=2, **TRAINING)
    oracle = trl_trainer("SFT", tiny_model, tmp_path, [{"text": "a b"}], loss_type="dft")

    def inputs_of(examples: list[Any]) -> Any:
        longest = max(len(example.token_ids) for example in examples)
        ids, mask, labels = (torch.zeros(len(examples), longest, dtype=torch.int64) for _ in range(3))
        labels.fill_(-100)
        for row, example in enumerate(examples):
            length = len(example.token_ids)
            ids[row, :length] = torch.tensor(example.token_ids.tolist())
            mask[row, :length] = 1
            labels[row, :length] = torch.where(torch.tensor(example.loss_mask.tolist()), ids[row, :length], -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    num_items = lambda examples: torch.tensor(sum(example.num_label_tokens for example in examples))  # noqa: E731
    assert steps_beside(session, oracle, inputs_of, num_items) == 2
