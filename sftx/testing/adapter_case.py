"""What the clauses of an adapter look at: models with the adapter on them, fresh, trained, or saved.

Dimensions: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from sftx.assembly.stages import make
from sftx.data.collate import groups_of
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec
from sftx.testing.kit import Kit, built_in
from sftx.types import IGNORE_INDEX, Adapter, Batch

STEPS: Final = 2
LEARNING_RATE: Final = 1e-2  # high: what a few steps train must be seen in the logits
_ROWS: Final = 3


@dataclass
class Base:
    """The model as it was read, before an adapter is attached: the same each time."""

    logits_BTV: Tensor
    """fp32"""
    names: frozenset[str]
    """Its parameters, as the architecture names them."""
    draws: bool
    """Whether it has a dropout of its own, which draws from torch's generator."""


@dataclass
class Attached:
    """A model with the adapter on it."""

    lm: CausalLM
    adapter: Adapter
    batch: Batch
    base: Base

    def logits(self) -> Tensor:
        """[B, T, V], in evaluation mode."""
        return logits_of(self.lm, self.batch)

    def loss(self, seed: int) -> Tensor:
        """Mean cross-entropy of the trained tokens, in training mode, with what is random drawn from `seed`."""
        self.lm.train()
        self.lm.seed.fill_(seed)
        return self._cross_entropy(self.lm.logits(self.lm.hidden(self.batch).hidden_BTD))

    def quiet_loss(self) -> float:
        """The same in evaluation mode."""
        return self._cross_entropy(self.logits()).item()

    def _cross_entropy(self, logits_BTV: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), self.batch.labels_BT.flatten(), ignore_index=IGNORE_INDEX
        )

    def train(self) -> None:
        """A few steps. The gradients of the last one stay."""
        optimizer = torch.optim.AdamW(self.trainable().values(), lr=LEARNING_RATE)
        for step in range(STEPS):
            optimizer.zero_grad()
            self.loss(seed=step).backward()
            optimizer.step()

    def gradients(self, *, seed: int, elsewhere: int) -> dict[str, Tensor]:
        """Of one forward at `seed`, with torch's own generator at `elsewhere` if the model itself draws nothing."""
        self.lm.zero_grad()
        torch.manual_seed(0 if self.base.draws else elsewhere)
        self.loss(seed).backward()
        return {name: p.grad.clone() for name, p in self.trainable().items() if p.grad is not None}

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.lm.named_parameters() if p.requires_grad}

    def state(self, *, frozen: bool = False) -> dict[str, Tensor]:
        """Copies of the parameters and buffers, or of those that do not require grad."""
        tensors = [*self.lm.named_parameters(), *self.lm.named_buffers()]
        return {name: t.detach().clone() for name, t in tensors if not (frozen and t.requires_grad)}


class Case:
    """One plugin's adapters on fresh models. Making it makes one, so that a hook that fails is told as such."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        rows = groups_of(kit.examples)[:_ROWS]
        self.batch = kit.collator.collate([example for row in rows for example in row])
        self._base: Base | None = None
        self.begun = self.attached()
        self.begun_BTV = self.begun.logits()

    def attached(self, *, seed: int = 0) -> Attached:
        """The model read anew with a new adapter, in the order of a run. `seed`: torch's, while it is attached."""
        spec = load_spec(str(self.kit.model_dir))
        names = frozenset(name for name, _ in spec.skeleton.named_parameters())
        adapter: Adapter = make(self.kit.plugin, "sftx_adapter", spec=spec)
        model = load_model(spec, [adapter], dtype=torch.float32, device=torch.device("cpu"))
        lm = CausalLM(model, self.kit.tokenizer)
        if self._base is None:
            self._base = Base(logits_of(lm, self.batch), names, _draws(lm, self.batch))
        torch.manual_seed(seed)
        lm.attach({"adapter": adapter})
        return Attached(lm, adapter, self.batch, self._base)

    def beside_lora(self) -> tuple[Attached, Tensor]:
        """A model with lora, which is not the identity, whose adapter is yet to be attached; and its logits."""
        spec = load_spec(str(self.kit.model_dir))
        first: Adapter = make(built_in("lora"), "sftx_adapter", spec=spec)
        second: Adapter = make(self.kit.plugin, "sftx_adapter", spec=spec)
        model = load_model(spec, [first, second], dtype=torch.float32, device=torch.device("cpu"))
        lm = CausalLM(model, self.kit.tokenizer)
        lm.attach({"lora": first})
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05)
        before_BTV = logits_of(lm, self.batch)
        return Attached(lm, second, self.batch, self.begun.base), before_BTV

    def rounding(self) -> float:
        """The error of the base model's logits in fp32, by fp64, relative to the largest: deep models have more."""
        exact_BTV, rounded_BTV = (
            logits_of(
                CausalLM(load_model(self.kit.spec, [], dtype=dtype, device=torch.device("cpu")), self.kit.tokenizer),
                self.batch,
            )
            for dtype in (torch.float64, torch.float32)
        )
        return ((exact_BTV - rounded_BTV).abs().max() / exact_BTV.abs().max()).item()

    def trained(self) -> Attached:
        """The same each time: a clause may do with it what it wants."""
        model = self.attached()
        model.train()
        return model

    @cached_property
    def training(self) -> Training:
        """The first of them, with what was seen on the way; no clause changes it."""
        model = self.begun
        frozen, before = model.state(frozen=True), model.quiet_loss()
        model.train()
        return Training(model, frozen, before, model.quiet_loss())

    @cached_property
    def saved(self) -> Saved:
        """One that was saved; no clause changes it either."""
        model = self.trained()
        before = Saved(model, Path(tempfile.mkdtemp(prefix="sftx-adapter-")), model.logits(), model.state())
        weakref.finalize(self, shutil.rmtree, before.directory, ignore_errors=True)
        model.adapter.save(before.directory)
        return before


@dataclass
class Saved:
    model: Attached
    directory: Path
    logits_BTV: Tensor
    """Before it was saved."""
    state: Mapping[str, Tensor]
    """All of its tensors, before it was saved."""


@dataclass
class Training:
    model: Attached
    frozen: Mapping[str, Tensor]
    """What did not require grad, before the first step."""
    loss_before: float
    loss_after: float


@torch.no_grad()
def logits_of(lm: CausalLM, batch: Batch) -> Tensor:
    lm.eval()
    return lm.logits(lm.hidden(batch).hidden_BTD)


@torch.no_grad()
def _draws(lm: CausalLM, batch: Batch) -> bool:
    before = torch.get_rng_state()
    lm.train()
    lm.hidden(batch)
    return not torch.equal(torch.get_rng_state(), before)
