"""A loss that trains a module of its own: with adapters and without, saved beside the weights, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sftx
from sftx import ModelError, PluginError
from sftx.checkpoint.load_run import load_run
from sftx.testing.loss import SUITE
from sftx.testing.runs import run_tiny

CALIBRATED = '''
from dataclasses import dataclass
from sftx import LossSum, hookimpl

@dataclass(frozen=True, eq=False)
class Calibrated:
    """Cross-entropy, and a linear layer that learns to predict the loss of each token."""

    @hookimpl
    def sftx_loss(self):
        return self

    def module(self, lm):
        import torch
        return torch.nn.Linear(lm.head_weight.shape[1], 1)

    def denominator(self, batch):
        return float(batch.num_label_tokens)

    def __call__(self, lm, batch):
        import torch
        hidden_BTD = lm.hidden(batch).hidden_BTD
        nll_N = lm.cross_entropy(hidden_BTD, batch.labels_BT, reduction="none").loss
        weights_BT = torch.ones_like(nll_N) if batch.token_weights_BT is None else batch.token_weights_BT
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            guess_N = lm.loss_module(hidden_BTD.to(lm.loss_module.weight.dtype)).flatten()
        error_N = torch.where(batch.labels_BT.flatten() != -100, (guess_N - nll_N).square(), 0)
        total = (weights_BT.flatten() * (nll_N + error_N)).sum()
        return LossSum(total, metrics={"error": error_N.sum()})
'''


@pytest.fixture(autouse=True)
def plugin(install_plugin: Any) -> None:
    install_plugin("calibrated_here", CALIBRATED, {"calibrated": "Calibrated"})


def trained(directory: Path, *names: str, steps: int = 4, **settings: Any) -> Path:
    options = {"train.max_steps": steps, "train.learning_rate": 0.02, "train.lr_scheduler_type": "constant"}
    more = {name.replace("__", "."): value for name, value in settings.items()}
    return run_tiny([*names, "calibrated"], directory, settings=options | more).output_dir


@pytest.mark.parametrize(("names", "artefact"), [((), "model"), (("lora",), "adapter")], ids=["full", "lora"])
def test_it_trains_and_the_result_loads_without_it(names: tuple[str, ...], artefact: str, tmp_path: Path) -> None:
    out = trained(tmp_path, *names)
    saved = load_file(out / artefact / "loss" / "module.safetensors")
    first = load_file(trained(tmp_path / "one", *names, steps=1) / artefact / "loss" / "module.safetensors")
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == {"weight": [1, 32], "bias": [1]}
    assert (saved["weight"] - first["weight"]).abs().max() > 0.02
    loaded = load_run(out)
    assert loaded.lm.loss_module is None
    ids = torch.tensor([[5, 6, 7]])
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model" if names else out / artefact)
    if names:
        theirs = PeftModel.from_pretrained(theirs, out / artefact)
    expected = theirs(ids).logits
    torch.testing.assert_close(loaded.lm.model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [(), ("lora",)], ids=["full", "lora"])
def test_it_goes_on_from_a_checkpoint(names: tuple[str, ...], tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", *names)
    part = trained(tmp_path / "part", *names, steps=2, train__save_steps=2)
    sftx.resume(part, max_steps=4)
    for file in sorted(path.relative_to(whole) for path in whole.glob("*/**/*.safetensors")):
        if file.parts[0] != "checkpoints":
            ours, theirs = load_file(part / file), load_file(whole / file)
            assert {name: tensor.equal(theirs[name]) for name, tensor in ours.items()} == dict.fromkeys(theirs, True)
    assert (part / "checkpoints" / "step-4" / "loss" / "module.safetensors").exists()


def test_a_module_that_cannot_train_is_refused(install_plugin: Any, tmp_path: Path) -> None:
    for name, made in {"none": "None", "wide": "torch.nn.Linear(3, 1).double()", "empty": "torch.nn.ReLU()"}.items():
        text = CALIBRATED.replace("torch.nn.Linear(lm.head_weight.shape[1], 1)", made)
        install_plugin(f"calibrated_{name}", text, {f"calibrated-{name}": "Calibrated"})
        with pytest.raises(PluginError, match=f"calibrated-{name}.*: module (returned|has)"):
            run_tiny([f"calibrated-{name}"], tmp_path / name)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    out = trained(tmp_path, "lora")
    from sftx.checkpoint.checkpoint import load_loss_module

    lm = load_run(out).lm
    lm.loss_module = torch.nn.Linear(5, 1)
    with pytest.raises(ModelError, match=r"loss/module\.safetensors: the weights of the run's loss"):
        load_loss_module(lm, out / "adapter")


def test_its_gradient_is_checked_too() -> None:
    import calibrated_here  # type: ignore[import-not-found]

    findings = SUITE.findings(calibrated_here.Calibrated())
    assert [(finding.clause, finding.message) for finding in findings if finding.status != "ok"] == []
