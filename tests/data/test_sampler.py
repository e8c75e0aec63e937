"""The steps of a run on a whole set: epoch by epoch, and the same from wherever it goes on."""

from __future__ import annotations

import json
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftx.assembly.stages.data_stages import CollatorStage
from sftx.config.options import TrainConfig
from sftx.data import mixture
from sftx.data.sampler import EpochSampler, PlannedStep
from sftx.types import Example
from sftx_plugins.collators.packed import Packed
from sftx_plugins.collators.padded import Padded

COLLATORS = {
    "padded": CollatorStage("padded", Padded()),
    "packed": CollatorStage("packed", Packed().sftx_collator(20)),
}


def examples_of(groups: list[list[int]]) -> list[Example]:
    """One of each length, group by group."""
    return [
        Example([1] * length, [True] * length, f"a.jsonl:{number}#{part}", number)
        for number, lengths in enumerate(groups)
        for part, length in enumerate(lengths)
    ]


def plan_of(groups: list[list[int]], collator: str, weights: tuple[float, ...] = (), **options: Any) -> EpochSampler:
    """With `weights` the groups come from sources in turn, and each epoch is drawn anew."""
    examples = examples_of(groups)
    sample = None
    if weights:
        numbers = np.array([example.group for example in examples], np.int64)
        sources = (numbers % len(weights)).astype(np.int32)
        draw = partial(mixture.sample, numbers, sources, weights, "concat", seed=5)
        sample = lambda epoch: draw(epoch=epoch)  # noqa: E731
    config = TrainConfig(seed=5, per_device_train_batch_size=2, **options)
    return EpochSampler(examples, COLLATORS[collator], config, sample)


def given_by(steps: list[PlannedStep]) -> list[Any]:
    return [(epoch, step, [examples[at].row_id for row in step for at in row]) for epoch, step, examples, *_ in steps]


def resumed(plan: EpochSampler, state: dict[str, Any]) -> EpochSampler:
    plan.load_state_dict(json.loads(json.dumps(state)))
    return plan


# Of the first source in turn short and long, so that a half of it is a number of steps that is not always the same.
LENGTHS = [[1 + 16 * (n % 4 == 0) + n % 3] * (2 if n % 5 == 0 else 1) for n in range(60)]


@pytest.mark.parametrize("weights", [(), (0.5, 1.7)], ids=["once", "mixture"])
@pytest.mark.parametrize("collator", COLLATORS)
def test_a_plan_goes_on_after_any_step(collator: str, weights: tuple[float, ...]) -> None:
    make = partial(plan_of, LENGTHS, collator, weights, num_train_epochs=4.5)
    whole = make()
    all_steps = given_by(list(whole))
    lengths = [len(whole.epoch(epoch)) for epoch in range(4)]
    assert sum(lengths) < len(all_steps) == whole.num_steps
    if collator == "packed" and weights:
        assert len(set(lengths)) > 1  # what a border that is counted wrongly would show

    plan = make()
    running = iter(plan)
    for done in range(whole.num_steps + 1):
        if done:
            next(running)
            # The step that was given is not finished, and then it is.
            assert given_by(list(resumed(make(), plan.state_dict(done - 1)))) == all_steps[done - 1 :]
        state = plan.state_dict(done)
        assert given_by(list(resumed(make(), state))) == all_steps[done:]
        assert resumed(make(), state).state_dict(done) == state


@pytest.mark.parametrize("collator", COLLATORS)
def test_a_plan_that_is_stopped_after_every_step_is_the_plan_that_is_not(collator: str) -> None:
    make = partial(plan_of, LENGTHS, collator, (0.5, 1.7), max_steps=30)
    steps: list[PlannedStep] = []
    state = make().state_dict(0)
    for done in range(1, 31):
        plan = resumed(make(), state)
        steps.append(next(iter(plan)))
        state = plan.state_dict(done)
    assert given_by(steps) == given_by(list(make()))
    assert not list(resumed(make(), state))


@given(
    groups=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=3), min_size=1, max_size=15),
    weights=st.sampled_from([(), (1.4,), (2.0, 0.6)]),
    collator=st.sampled_from(sorted(COLLATORS)),
    max_steps=st.integers(1, 25),
    data=st.data(),
)
def test_any_set_is_taken_up_where_it_was_left(
    groups: list[list[int]], weights: tuple[float, ...], collator: str, max_steps: int, data: st.DataObject
) -> None:
    make = partial(plan_of, groups, collator, weights, max_steps=max_steps)
    all_steps = given_by(list(make()))
    assert len(all_steps) == max_steps
    plan, done = make(), 0
    for unfinished in data.draw(st.lists(st.booleans(), min_size=1, max_size=6)):
        taken = data.draw(st.integers(0, max_steps - done))
        assert given_by(list(islice(plan, taken))) == all_steps[done : done + taken]
        done += taken - (unfinished and taken > 0)
        plan = resumed(make(), plan.state_dict(done))
    assert given_by(list(plan)) == all_steps[done:]
