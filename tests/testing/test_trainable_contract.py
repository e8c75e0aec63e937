"""Tests of the contract of plugins that choose what trains: good ones, and bad ones that break one clause each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import HiddenOut, ModelSpec, hookimpl
from sftx.testing.kit import built_in
from sftx.testing.trainable import SUITE


class Norms:
    """Trains the norms; the classes below change one thing."""

    @hookimpl
    def sftx_trainable(self, spec: ModelSpec) -> Any:
        return {name for name in spec.parameter_names if "norm" in name}


class GivesList(Norms):
    @hookimpl
    def sftx_trainable(self, spec: ModelSpec) -> Any:
        return list(super().sftx_trainable(spec))


class GivesNothing(Norms):
    @hookimpl
    def sftx_trainable(self, spec: ModelSpec) -> Any:
        return set()


class Misspells(Norms):
    @hookimpl
    def sftx_trainable(self, spec: ModelSpec) -> Any:
        return {"model.norm", *super().sftx_trainable(spec)}


class Alternates(Norms):
    calls: ClassVar[Iterator[int]] = itertools.count()

    @hookimpl
    def sftx_trainable(self, spec: ModelSpec) -> Any:
        return {f"model.layers.{next(self.calls) % 2}.mlp.up_proj.weight"}


class FreezesItself(Norms):
    @hookimpl
    def sftx_trainable(self, spec: ModelSpec) -> Any:
        names = super().sftx_trainable(spec)
        for name, parameter in spec.skeleton.named_parameters():
            parameter.requires_grad_(name in names)
        return names


BAD = [
    (GivesList, "made", "sftx_trainable returned list, expected a Set"),
    (GivesNothing, "names-parameters", "returned no name"),
    (Misspells, "names-parameters", "1 name that no parameter of the language model has (first: 'model.norm')"),
    (Alternates, "repeats", "it chose 2 parameters once only (first: model.layers.0.mlp.up_proj.weight)"),
    (FreezesItself, "plans-on-meta", "the hook changed"),
]


@pytest.mark.parametrize(
    "plugin", [Norms(), built_in("full"), built_in("freeze"), built_in("freeze", trainable_layers=-1)]
)
def test_good_choices_keep_every_clause(plugin: object) -> None:
    assert_passes(SUITE, plugin)


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_choice_fails_its_clause_with_a_message(bad: Any, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_choice_fails_nothing_else(bad: Any, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_a_parameter_that_no_forward_uses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a model that has parameters for another task: here the head alone is used."""
    from sftx.model.language_model import CausalLM

    hidden = CausalLM.hidden

    def detached(lm: CausalLM, batch: Any) -> HiddenOut:
        return HiddenOut(hidden(lm, batch).hidden_BTD.detach(), None)

    monkeypatch.setattr(CausalLM, "hidden", detached)
    chosen = built_in("freeze", trainable_layers=0, extra_modules=["norm", "lm_head"])
    assert_fails(SUITE, chosen, "trains-what-it-names", "1 of the parameters that it names get no gradient (first: mod")


def test_each_clause_has_a_bad_choice() -> None:
    assert_every_clause_is_broken(SUITE, [*(clause for _, clause, _ in BAD), "trains-what-it-names"])
