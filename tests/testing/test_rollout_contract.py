"""Tests of the rollout contract: good rollouts, and bad ones that break one clause each."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import Rollouts, hookimpl
from sftx.testing.rollout import SUITE


class Sampled:
    """Trains on each of two answers; the classes below change one thing."""

    steps_per_rollout = 1
    num_iterations = 1
    num_answers: Any = 2
    max_new_tokens = 4

    @hookimpl
    def sftx_rollout(self) -> Any:
        return self

    def __call__(self, policy: Any, questions: Any) -> Any:
        groups = policy.generate(questions, num_answers=2, max_new_tokens=4)
        answers = [answer for group in groups for answer in group]
        examples = [answer.example(number // 2, self.extras(answer)) for number, answer in enumerate(answers)]
        return Rollouts(examples, answers, {"reward": sum(answer.reward for answer in answers)})

    def extras(self, answer: Any) -> Any:
        return {"advantage": answer.reward}


class Scored(Sampled):
    """Also asks for log-probabilities, and draws by the step."""

    def __call__(self, policy: Any, questions: Any) -> Any:
        made = super().__call__(policy, questions)
        values = policy.log_probs(made.examples, temperature=0.7)
        noise = random.Random(policy.step).random()
        return dataclasses.replace(
            made,
            examples=[
                dataclasses.replace(example, extras={"old": of.tolist(), "noise": noise})
                for example, of in zip(made.examples, values, strict=True)
            ],
        )


class Remembers(Sampled):
    """Has a coefficient that it changes after each window, in its state; and sums that it computes of each token."""

    def __init__(self) -> None:
        self.coefficient = 1.0

    def state_dict(self) -> Any:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Any) -> None:
        self.coefficient = state["coefficient"]

    def __call__(self, policy: Any, questions: Any) -> Any:
        made = super().__call__(policy, questions)
        sums = policy.per_token(made.examples, lambda lm, batch: {"sum": lm.hidden(batch).hidden_BTD.sum(-1)})
        examples = [
            dataclasses.replace(one, extras={"sum": of["sum"].tolist(), "coefficient": self.coefficient})
            for one, of in zip(made.examples, sums, strict=True)
        ]
        assert [len(one.extras["sum"]) for one in examples] == [len(one.token_ids) for one in examples]
        self.coefficient *= 1.5
        return dataclasses.replace(made, examples=examples)


class RemembersTensor(Remembers):
    def state_dict(self) -> Any:
        return {"coefficient": torch.tensor(1.0)}


class RemembersElsewhere(Remembers):
    def load_state_dict(self, state: Any) -> None:
        pass


class KeepsTheBest(Sampled):
    """Trains on the best answers so far, which no state has: asked again at once it finds the same ones."""

    @hookimpl
    def sftx_rollout(self) -> Any:
        return KeepsTheBest()

    def __init__(self) -> None:
        self.best: dict[tuple[str, int], Any] = {}

    def __call__(self, policy: Any, questions: Any) -> Any:
        made = super().__call__(policy, questions)
        examples = [self.best.setdefault((one.row_id, number % 2), one) for number, one in enumerate(made.examples)]
        return dataclasses.replace(made, examples=examples, metrics={})


class GivesVectors(Sampled):
    def __call__(self, policy: Any, questions: Any) -> Any:
        made = super().__call__(policy, questions)
        policy.per_token(made.examples, lambda lm, batch: {"hidden": lm.hidden(batch).hidden_BTD})
        return made


class DeclaresText(Sampled):
    num_answers = "two"


class GivesNothing(Sampled):
    def __call__(self, policy: Any, questions: Any) -> Any:
        return None


class LeavesOut(Sampled):
    def __call__(self, policy: Any, questions: Any) -> Any:
        made = super().__call__(policy, questions)
        return dataclasses.replace(made, examples=made.examples[2:])


class TrainsNothing(Sampled):
    def __call__(self, policy: Any, questions: Any) -> Any:
        made = super().__call__(policy, questions)
        examples = [dataclasses.replace(one, loss_mask=[False] * len(one.token_ids)) for one in made.examples]
        return dataclasses.replace(made, examples=examples)


class KeepsTensor(Sampled):
    def extras(self, answer: Any) -> Any:
        return {"advantage": torch.tensor(1.0)}


class GivesMore(Sampled):
    num_answers = 1


class GivesLonger(Sampled):
    max_new_tokens = 2


class NeedsTwo(Sampled):
    def __call__(self, policy: Any, questions: Any) -> Any:
        return super().__call__(policy, [questions[0], questions[1], *questions[2:]])


class Draws(Sampled):
    def extras(self, answer: Any) -> Any:
        return {"advantage": random.random()}


class Counts(Sampled):
    calls: ClassVar[Iterator[int]] = itertools.count()

    def extras(self, answer: Any) -> Any:
        return {"advantage": next(self.calls)}


class Trains(Sampled):
    def __call__(self, policy: Any, questions: Any) -> Any:
        made = super().__call__(policy, questions)
        policy.lm.train()
        return made


class SetsThreads(Sampled):
    def __call__(self, policy: Any, questions: Any) -> Any:
        torch.set_num_threads(torch.get_num_threads() + 1)
        return super().__call__(policy, questions)


BAD = [
    (DeclaresText, "made", "num_answers is 'two', expected a whole number"),
    (GivesNothing, "makes-examples", "rollout returned NoneType, expected Rollouts"),
    (LeavesOut, "makes-examples", "rollout gave no example for the questions 0 to 0, which are the rows of a step"),
    (TrainsNothing, "makes-examples", "no example has a label token"),
    (KeepsTensor, "makes-examples", "which JSON does not hold unchanged"),
    (GivesMore, "keeps-its-bounds", "a question has 2 examples, and num_answers is 1"),
    (GivesLonger, "keeps-its-bounds", "more than its question and max_new_tokens=2"),
    (NeedsTwo, "takes-one-question", "IndexError"),
    (Draws, "repeats", "it gave other examples the second time"),
    (Counts, "repeats", "keep nothing between two windows"),
    (RemembersTensor, "made", "(Tensor), which JSON does not hold unchanged"),
    (KeepsTheBest, "resumes", "remembers something that a new one does not know from its state"),
    (RemembersElsewhere, "repeats", "keep nothing between two windows but what state_dict returns"),
    (GivesVectors, "makes-examples", "return a number for each label"),
    (Trains, "leaves-the-model", "it changed the mode of the model"),
    (SetsThreads, "leaves-the-process", "it changed torch's number of threads"),
]


@pytest.mark.parametrize("plugin", [Sampled(), Scored(), Remembers()], ids=lambda plugin: type(plugin).__name__)
def test_good_rollouts_keep_every_clause(plugin: object) -> None:
    assert_passes(SUITE, plugin)


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_rollout_fails_its_clause_with_a_message(bad: Any, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_rollout_fails_nothing_else(bad: Any, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_each_clause_has_a_bad_rollout() -> None:
    assert_every_clause_is_broken(SUITE, [clause for _, clause, _ in BAD])
