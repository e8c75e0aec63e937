"""The contract of a plugin that chooses which of the model's parameters train: it names some, and these train."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from sftx.assembly.stages.adapter_stage import check_trainable as check_names
from sftx.data.collate import groups_of
from sftx.errors import PluginError
from sftx.model.load import load_spec
from sftx.testing.adapter import layout_of
from sftx.testing.adapter_case import LEARNING_RATE, STEPS
from sftx.testing.clauses import ClauseError, Suite, must_not_raise
from sftx.testing.kit import Kit, make_stage
from sftx.types import IGNORE_INDEX, ModelSpec

_ROWS: Final = 4


class _Case:
    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.names = self.choose(load_spec(str(kit.model_dir)))

    def choose(self, spec: ModelSpec) -> Any:
        return make_stage(self.kit.plugin, "sftx_trainable", spec=spec)


SUITE: Suite[_Case] = Suite("trainable", _Case, made="The hook sftx_trainable returns a set.")


@SUITE.clause("It returns names of parameters of the language model, at least one.")
def names_parameters(case: _Case) -> None:
    try:
        check_names(case.names, case.kit.spec)
    except PluginError as error:
        raise ClauseError(str(error)) from error


@SUITE.clause("It returns the same names each time.", needs=["names-parameters"])
def repeats(case: _Case) -> None:
    if changed := set(case.choose(case.kit.spec)) ^ set(case.names):
        raise ClauseError(
            f"called twice, it chose {len(changed)} parameters once only (first: {min(changed)}); draw random numbers "
            "from a generator with a fixed seed, and keep nothing between two calls"
        )


@SUITE.clause("The hook needs only the configuration and the skeleton, and leaves the skeleton unchanged on meta.")
def plans_on_meta(case: _Case) -> None:
    with tempfile.TemporaryDirectory(prefix="sftx-trainable-") as directory:
        shutil.copy(case.kit.model_dir / "config.json", directory)
        spec = load_spec(directory)
        before = layout_of(spec.skeleton)
        with must_not_raise("with a configuration and no weights the hook", "choose by names and shapes"):
            case.choose(spec)
        after = layout_of(spec.skeleton)
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise ClauseError(
            f"the hook changed {len(changed)} modules or tensors of spec.skeleton (first: {changed[0]}); only read it, "
            "and return the names"
        )


@SUITE.clause("Every parameter that it names gets a gradient; training lowers the loss.", needs=["names-parameters"])
def trains_what_it_names(case: _Case) -> None:
    kit = case.kit
    lm = kit.language_model(trainable=case.names)
    batch = kit.collator.collate([example for group in groups_of(kit.examples)[:_ROWS] for example in group])

    def loss() -> torch.Tensor:
        logits_BTV = lm.logits(lm.hidden(batch).hidden_BTD)
        return nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE_INDEX
        )

    trained = {name: parameter for name, parameter in lm.model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        now = loss()
        now.backward()
        losses.append(now.item())
        optimizer.step()
    if without := [name for name, parameter in trained.items() if parameter.grad is None]:
        raise ClauseError(
            f"{len(without)} of the parameters that it names get no gradient (first: {without[0]}); name parameters "
            "that a forward uses"
        )
    if not (after := loss().item()) < losses[0]:
        raise ClauseError(
            f"{STEPS} steps of AdamW at {LEARNING_RATE} bring the loss of their batch from {losses[0]:.6g} to "
            f"{after:.6g}; name parameters that affect the output"
        )


def check_trainable(plugin: object, *, model: Path | None = None) -> None:
    """Check the plugin's choice of what trains. Raises ContractError, which names the broken clauses.

    `model` is a model directory to use instead of the tiny one; it is loaded in fp32 on the CPU.
    """
    SUITE.check(plugin, model=model)
