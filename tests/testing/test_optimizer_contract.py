"""Tests of the optimizer contract: a good optimizer, and bad ones that break one clause each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import RunInfo, TrainableParam, hookimpl, parameter_groups
from sftx.testing.optimizer import SUITE


class Momentum(torch.optim.Optimizer):
    """Follows the sign of a momentum; subclasses in the plugins below change one thing."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if self.is_due(p):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(self.direction(p), alpha=self.rate(group))

    def is_due(self, p: Tensor) -> bool:
        return p.grad is not None

    def rate(self, group: dict[str, Any]) -> float:
        return float(group["lr"])

    def direction(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum: Tensor = state["momentum"]
        assert p.grad is not None
        return momentum.lerp_(p.grad, 0.1).sign()


class Good:
    state_bytes: Any = 4.0
    elementwise: Any = True
    Optimizer: type[Momentum] = Momentum
    weight_decay = 0.0

    @hookimpl
    def sftx_optimizer(self, run: RunInfo) -> Any:
        made = type(self)()
        made.weight_decay = run.config["train"]["weight_decay"]
        return made

    def build(self, params: Sequence[TrainableParam]) -> Any:
        return [self.Optimizer(parameter_groups(params, self.weight_decay))]


class GivesNone(Good):
    @hookimpl
    def sftx_optimizer(self, run: RunInfo) -> Any:
        return None


class DeclaresText(Good):
    state_bytes = "4"


class BuildsNothing(Good):
    def build(self, params: Sequence[TrainableParam]) -> Any:
        return []


class LeavesOneOut(Good):
    def build(self, params: Sequence[TrainableParam]) -> Any:
        return super().build(params[1:])


class HasOneTwice(Good):
    def build(self, params: Sequence[TrainableParam]) -> Any:
        return super().build(params) + super().build(params[:1])


class LosesTheScale(Good):
    def build(self, params: Sequence[TrainableParam]) -> Any:
        return [self.Optimizer([{"params": [p.parameter for p in params], "weight_decay": 0.0, "scale": 1.0}])]


class HasNoScale(Good):
    def build(self, params: Sequence[TrainableParam]) -> Any:
        return [self.Optimizer([{"params": [p.parameter for p in params], "weight_decay": 0.0}])]


class KeepsText(Good):
    class Optimizer(Momentum):
        def direction(self, p: Tensor) -> Tensor:
            direction = super().direction(p)
            self.state[p]["phase"] = "warm"
            return direction


class CountsInItsGroups(Good):
    class Optimizer(Momentum):
        def rate(self, group: dict[str, Any]) -> float:
            group["count"] = group.get("count", 0) + 1
            return super().rate(group)


class Climbs(Good):
    class Optimizer(Momentum):
        def rate(self, group: dict[str, Any]) -> float:
            return -super().rate(group)


class SkipsVectors(Good):
    class Optimizer(Momentum):
        def is_due(self, p: Tensor) -> bool:
            return p.ndim > 1 and super().is_due(p)


class TakesNoneForZero(Good):
    class Optimizer(Momentum):
        def is_due(self, p: Tensor) -> bool:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            return True


class AlwaysDecays(Good):
    class Optimizer(Momentum):
        def direction(self, p: Tensor) -> Tensor:
            return super().direction(p) + 0.01 * p


class IgnoresTheRate(Good):
    class Optimizer(Momentum):
        def rate(self, group: dict[str, Any]) -> float:
            return 1e-3


class Shakes(Good):
    class Optimizer(Momentum):
        def direction(self, p: Tensor) -> Tensor:
            import secrets

            return super().direction(p) * (1 + secrets.randbelow(1000) / 1000)


class CountsItself(Good):
    class Optimizer(Momentum):
        count = 0

        def step(self, closure: None = None) -> None:  # type: ignore[override]
            self.count += 1
            super().step()

        def rate(self, group: dict[str, Any]) -> float:
            return super().rate(group) / self.count


class NeedsMore(Good):
    state_bytes = 8.0


class HasANorm(Good):
    class Optimizer(Momentum):
        def direction(self, p: Tensor) -> Tensor:
            super().direction(p)
            momentum: Tensor = self.state[p]["momentum"]
            return momentum / (momentum.norm() + 1e-12)


class Draws(Good):
    class Optimizer(Momentum):
        def is_due(self, p: Tensor) -> bool:
            torch.rand(())
            return super().is_due(p)


BAD: list[tuple[Any, str, str]] = [
    (GivesNone, "made", "is its `return` missing?"),
    (DeclaresText, "made", "state_bytes is '4', expected a number of at least 0"),
    (BuildsNothing, "builds", "build returned [], expected a list of torch optimizers"),
    (LeavesOneOut, "builds", "leaves out 1 of 5 parameters, which would not be trained (first: embed_tokens.weight)"),
    (HasOneTwice, "builds", "has embed_tokens.weight in two optimizers"),
    (LosesTheScale, "builds", "has the scale 2.0, its group 1"),
    (HasNoScale, "builds", "whose scale is None, expected a number"),
    (KeepsText, "builds", "has 'warm' as 'phase', expected tensors and finite numbers"),
    (CountsInItsGroups, "builds", "a step changed 'count' of a parameter group"),
    (Climbs, "lowers-a-loss", "follow -gradient"),
    (SkipsVectors, "updates-every-parameter", "layers.0.norm.weight is what it was"),
    (TakesNoneForZero, "skips-what-has-no-gradient", "skip parameters whose grad is None"),
    (AlwaysDecays, "rests", "decay by train.weight_decay alone"),
    (IgnoresTheRate, "obeys-its-scale", "read the rate from group['lr']"),
    (Shakes, "repeats", "differs from one run to the next"),
    (CountsItself, "resumes", "keep all state in self.state[parameter]"),
    (NeedsMore, "declares-its-state", "has 4 bytes a parameter, and state_bytes is 8"),
    (HasANorm, "is-elementwise", "set elementwise to False"),
    (Draws, "leaves-the-process", "it changed torch's random numbers"),
]
ALSO_BROKEN = {
    Shakes: {"obeys-its-scale"},
}
"""What cannot be kept either: with other numbers each time, no two runs compare."""


def test_a_good_optimizer_keeps_every_clause() -> None:
    assert_passes(SUITE, Good())


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_optimizer_fails_its_clause_with_a_message(bad: Any, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases([case for case in BAD if case[0] not in ALSO_BROKEN]))
def test_a_bad_optimizer_fails_nothing_else(bad: Any, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_each_clause_has_a_bad_optimizer() -> None:
    assert_every_clause_is_broken(SUITE, [clause for _, clause, _ in BAD])
