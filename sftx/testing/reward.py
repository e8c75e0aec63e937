"""The contract of a reward: it scores any answers, and the same ones always with the same scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sftx.assembly.stages.rollout_stages import RewardStage
from sftx.errors import PluginError
from sftx.testing.clauses import ClauseError, Suite, must_not_raise
from sftx.testing.kit import Kit, make_stage
from sftx.testing.metric import TEXTS
from sftx.testing.process import changed_random_states, random_states
from sftx.types import Answer

_MOST_TOKENS: Final = 64


class _Case:
    def __init__(self, kit: Kit) -> None:
        self.reward = RewardStage("the reward", make_stage(kit.plugin, "sftx_reward"))
        self.reward.prepare(kit.language_model().eval())
        self.answers = [
            Answer(
                question=question,
                number=number,
                text=text,
                token_ids=(ids := tuple(kit.encoder.plain(text)[:_MOST_TOKENS]) + kit.encoder.stop_ids[:1]),
                log_probs=(-1.0,) * len(ids),
                finish_reason="length" if number % 4 == 3 else "stop",
            )
            for question in kit.held_out_rows
            for number, text in enumerate((*TEXTS, question.reference))
        ]
        """Answers of all kinds to each of a few questions."""

    def scores(self, answers: Sequence[Answer]) -> list[float | None]:
        """Return the scores of answers. Raises ClauseError for what a run would refuse."""
        try:
            return self.reward(answers)
        except PluginError as error:
            raise ClauseError(f"{error}; return a finite number for each answer, or None to decline it") from error


SUITE: Suite[_Case] = Suite("reward", _Case)


@SUITE.clause(
    "Any answers get a finite number each, or None: an empty one, one of 2000 words, one in the wrong format."
)
def scores_any_answer(case: _Case) -> None:
    with must_not_raise("scoring answers", "a model may answer anything, so return a low score instead, or None"):
        case.scores(case.answers)


@SUITE.clause("It scores any number of answers at once, one alone too.", needs=["scores-any-answer"])
def any_number(case: _Case) -> None:
    for count in (1, 2, len(case.answers) // 2):
        case.scores(case.answers[:count])
    case.scores([])


@SUITE.clause(
    "The same answers get the same scores, and the global random state does not change.", needs=["scores-any-answer"]
)
def repeats(case: _Case) -> None:
    before = random_states()
    first = case.scores(case.answers)
    if changed := changed_random_states(before):
        raise ClauseError(f"it drew from or seeded {changed}, which training uses too; use your own random.Random")
    if first != case.scores(case.answers):
        raise ClauseError("it scored the same answers otherwise the second time; keep no state between two calls")


def check_reward(plugin: object) -> None:
    """Check the plugin's reward. Raises ContractError, which names the broken clauses."""
    SUITE.check(plugin)
