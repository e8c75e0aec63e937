"""The contract of a rollout: its examples depend on the model, the questions and the step alone."""

from __future__ import annotations

import json

import torch

from sftx.assembly.stages.rollout_stages import RolloutStage
from sftx.errors import PluginError
from sftx.model.language_model import CausalLM
from sftx.testing.clauses import ClauseError, Suite
from sftx.testing.evaluator import equal, state_of
from sftx.testing.kit import Kit
from sftx.testing.process import RANDOM, process, random_states_kept, seed_all
from sftx.types import Question, Rollouts


class _Case:
    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self.rollout = kit.rollout
        self.questions = kit.held_out_rows
        self._first_state = json.dumps(self.rollout.state_dict())

    @property
    def lm(self) -> CausalLM:
        return self._kit.policy_model

    def rollouts(self, questions: list[Question] | None = None, *, seed: int = 0, step: int = 0) -> Rollouts:
        """Let it answer questions as a run does, after seeding. Raises ClauseError for what a run would refuse."""
        self.rollout.load_state_dict(json.loads(self._first_state))  # as at the start, and from a checkpoint
        return self.ask(self.rollout, questions, seed=seed, step=step)

    def ask(
        self, rollout: RolloutStage, questions: list[Question] | None = None, *, seed: int = 0, step: int = 0
    ) -> Rollouts:
        """Let a rollout answer questions with what it remembers. Raises ClauseError for what a run would refuse."""
        asked = self.questions if questions is None else questions
        with random_states_kept(), torch.no_grad():
            seed_all(seed)
            try:
                return rollout(self._kit.policy(step), asked, 1)
            except PluginError as error:
                raise ClauseError(str(error)) from error

    def new_rollout(self) -> RolloutStage:
        """Return one that remembers nothing, as a process makes it that goes on from a checkpoint."""
        return self._kit.make_rollout()


SUITE: Suite[_Case] = Suite("rollout", _Case)


@SUITE.clause("It returns examples in the order of their questions, with extras that JSON holds, and finite metrics.")
def makes_examples(case: _Case) -> None:
    made = case.rollouts()
    if not any(example.num_label_tokens for example in made.examples):
        raise ClauseError("no example has a label token, so nothing would be trained; `answer.example` makes one")


@SUITE.clause(
    "No question has more examples than `num_answers`, and no answer more tokens than `max_new_tokens`.",
    needs=["makes-examples"],
)
def keeps_its_bounds(case: _Case) -> None:
    made, rollout = case.rollouts(), case.rollout
    groups = [example.group for example in made.examples]
    most = max(map(groups.count, groups))
    if most > rollout.num_answers:
        raise ClauseError(f"a question has {most} examples, and num_answers is {rollout.num_answers}; raise it")
    for example in made.examples:
        room = len(case.questions[example.group].prompt_ids) + rollout.max_new_tokens
        if len(example.token_ids) > room:
            raise ClauseError(
                f"{example.row_id} has {len(example.token_ids)} tokens, more than its question and max_new_tokens="
                f"{rollout.max_new_tokens} together; memory is planned for these"
            )


@SUITE.clause("It takes a window of a single question as well.", needs=["makes-examples"])
def takes_one_question(case: _Case) -> None:
    case.rollouts(case.questions[:1])


@SUITE.clause(
    "The same model, questions and step give the same examples, whatever the state of the random numbers.",
    needs=["makes-examples"],
)
def repeats(case: _Case) -> None:
    first, second = case.rollouts(seed=0), case.rollouts(seed=1)
    if first.examples != second.examples or first.metrics != second.metrics:
        raise ClauseError(
            "it gave other examples the second time; what an answer draws is seeded by the policy, so draw other "
            "random numbers from a generator seeded by the step, and keep nothing between two windows but what "
            "state_dict returns"
        )


@SUITE.clause(
    "One that takes over its state answers the next questions as it does.", needs=["makes-examples", "repeats"]
)
def resumes(case: _Case) -> None:
    case.rollouts(step=0)
    state = json.dumps(case.rollout.state_dict())
    here = case.ask(case.rollout, step=1)
    resumed = case.new_rollout()
    resumed.load_state_dict(json.loads(state))
    there = case.ask(resumed, step=1)
    if here.examples != there.examples or here.metrics != there.metrics:
        raise ClauseError(
            "after a window it remembers something that a new one does not know from its state; return it as JSON in "
            "state_dict, and take it over in load_state_dict"
        )


@SUITE.clause("It leaves the model as it was: weights, gradients, modes, settings and hooks.", needs=["makes-examples"])
def leaves_the_model(case: _Case) -> None:
    before = state_of(case.lm.eval())
    case.rollouts()
    changed = [name for name, value in state_of(case.lm).items() if not equal(value, before.pop(name, None))]
    if changed or before:
        raise ClauseError(f"it changed {(changed or list(before))[0]}; training would go on otherwise")


@SUITE.clause(
    "It does not change torch's modes, signal handlers or other state of the process.", needs=["makes-examples"]
)
def leaves_the_process(case: _Case) -> None:
    case.rollouts()  # the first call may import a library, which sets environment variables
    before = process()
    case.rollouts()
    if changed := [name for name, value in process().items() if name not in RANDOM and before.get(name) != value]:
        raise ClauseError(f"it changed {changed[0]}; a run with it would not go on as it began")


def check_rollout(plugin: object) -> None:
    """Check the plugin's rollout on the tiny model. Raises ContractError, which names the broken clauses."""
    SUITE.check(plugin)
