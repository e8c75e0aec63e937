"""This module makes the models that the clauses about adapters look at: attached, trained or saved.

Dimensions: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
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

from sftx.data.collate import groups_of
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec
from sftx.testing.kit import Kit, built_in, make_stage
from sftx.types import IGNORE_INDEX, Adapter, Batch, ModelSpec

STEPS: Final = 2
LEARNING_RATE: Final = 1e-2  # high, so that a few steps change the logits visibly
_ROWS: Final = 3


@dataclass
class Base:
    """The loaded model before an adapter is attached; the same for every `Attached`."""

    logits_BTV: Tensor
    """fp32"""
    names: frozenset[str]
    """Names of its parameters according to the architecture."""
    draws: bool
    """Whether it draws from torch's generator in training mode, as a model with dropout does."""


@dataclass
class Attached:
    """A model with the adapter attached."""

    lm: CausalLM
    adapter: Adapter
    batch: Batch
    base: Base

    def logits(self) -> Tensor:
        """Return the logits in evaluation mode, [B, T, V]."""
        return logits_of(self.lm, self.batch)

    def loss(self, seed: int) -> Tensor:
        """Return the mean cross-entropy of the label tokens in training mode, with `seed` as the model's seed."""
        self.lm.train()
        self.lm.seed.fill_(seed)
        return self._cross_entropy(self.lm.logits(self.lm.hidden(self.batch).hidden_BTD))

    def eval_loss(self) -> float:
        return self._cross_entropy(self.logits()).item()

    def _cross_entropy(self, logits_BTV: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), self.batch.labels_BT.flatten(), ignore_index=IGNORE_INDEX
        )

    def train(self) -> None:
        """Train a few steps, and keep the gradients of the last one."""
        optimizer = torch.optim.AdamW(self.trainable().values(), lr=LEARNING_RATE)
        for step in range(STEPS):
            optimizer.zero_grad()
            self.loss(seed=step).backward()
            optimizer.step()

    def gradients(self, *, seed: int, torch_seed: int) -> dict[str, Tensor]:
        """Return the gradients of one forward. `torch_seed` seeds torch's generator unless the base draws from it."""
        self.lm.zero_grad()
        torch.manual_seed(0 if self.base.draws else torch_seed)
        self.loss(seed).backward()
        return {name: p.grad.clone() for name, p in self.trainable().items() if p.grad is not None}

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.lm.named_parameters() if p.requires_grad}

    def state(self, *, frozen_only: bool = False) -> dict[str, Tensor]:
        """Return copies of all parameters and buffers, or of those that do not require a gradient."""
        tensors = [*self.lm.named_parameters(), *self.lm.named_buffers()]
        return {name: t.detach().clone() for name, t in tensors if not (frozen_only and t.requires_grad)}


@dataclass
class Training:
    """A model and what was measured before and after it was trained."""

    model: Attached
    frozen: Mapping[str, Tensor]
    """Tensors that do not require a gradient, before the first step."""
    loss_before: float
    loss_after: float


@dataclass
class Saved:
    """A trained model that was saved, with its logits and tensors from before."""

    model: Attached
    directory: Path
    logits_BTV: Tensor
    state: Mapping[str, Tensor]


class Case:
    """One plugin, from which models with its adapter are made. `begun` is the first, so that a hook may fail early."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        groups = groups_of(kit.examples)[:_ROWS]
        self.examples = [example for group in groups for example in group]
        self.batch = kit.collator.collate(self.examples)
        self._base: Base | None = None
        self.begun = self.attached()
        with self.begun.lm.ignoring_extras():
            self.begun_BTV = self.begun.logits()

    def attached(self, *, seed: int = 0, new_token_ids: tuple[int, ...] = ()) -> Attached:
        """Load the model again and attach a new adapter, as a run does. `seed` seeds torch while it is attached."""
        spec = dataclasses.replace(load_spec(str(self.kit.model_dir)), new_token_ids=new_token_ids)
        names = frozenset(name for name, _ in spec.skeleton.named_parameters())
        adapter: Adapter = make_stage(self.kit.plugin, "sftx_adapter", spec=spec)
        lm = self._load(spec, adapter)
        if self._base is None:
            self._base = Base(logits_of(lm, self.batch), names, _draws(lm, self.batch))
        torch.manual_seed(seed)
        lm.attach({"adapter": adapter})
        return Attached(lm, adapter, self.batch, self._base)

    def beside_lora(self) -> tuple[Attached, Tensor]:
        """Return a model with a lora that changes its logits, the adapter not yet attached; and these logits."""
        spec = load_spec(str(self.kit.model_dir))
        lora: Adapter = make_stage(built_in("lora"), "sftx_adapter", spec=spec)
        adapter: Adapter = make_stage(self.kit.plugin, "sftx_adapter", spec=spec)
        lm = self._load(spec, lora, adapter)
        lm.attach({"lora": lora})
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05)
        return Attached(lm, adapter, self.batch, self.begun.base), logits_of(lm, self.batch)

    def rounding(self) -> float:
        """Return the error of the base model's logits in fp32 against fp64, relative to the largest of them."""
        exact_BTV, rounded_BTV = (
            logits_of(self._load(self.kit.spec, dtype=dtype), self.batch) for dtype in (torch.float64, torch.float32)
        )
        return ((exact_BTV - rounded_BTV).abs().max() / exact_BTV.abs().max()).item()

    def _load(self, spec: ModelSpec, *adapters: Adapter, dtype: torch.dtype = torch.float32) -> CausalLM:
        model = load_model(spec, list(adapters), dtype=dtype, device=torch.device("cpu"))
        return CausalLM(model, self.kit.tokenizer)

    def trained(self) -> Attached:
        """Return a newly trained model, which a clause may change. Every call returns the same parameters."""
        model = self.attached()
        model.train()
        return model

    @cached_property
    def training(self) -> Training:
        """`begun`, after training; clauses must not change it."""
        model = self.begun
        frozen, loss_before = model.state(frozen_only=True), model.eval_loss()
        model.train()
        return Training(model, frozen, loss_before, model.eval_loss())

    @cached_property
    def saved(self) -> Saved:
        """A trained model that was saved; clauses must not change it."""
        model = self.trained()
        saved = Saved(model, Path(tempfile.mkdtemp(prefix="sftx-adapter-")), model.logits(), model.state())
        weakref.finalize(self, shutil.rmtree, saved.directory, ignore_errors=True)
        model.adapter.save(saved.directory)
        return saved


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
