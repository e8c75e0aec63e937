"""A policy without a model: a rollout makes examples of its answers that have the extras which its loss needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

from sftx.assembly.registry import Assembly
from sftx.assembly.stages.rollout_stages import RolloutStage
from sftx.types import Answer, Example, Question

_QUESTION: Final = Question("question", "", [0, 0], "")
_ANSWER_IDS: Final = (0, 0)


class _Zeros(dict[str, NDArray[np.float32]]):
    """Numbers of each token by any name."""

    def __missing__(self, name: str) -> NDArray[np.float32]:
        return np.zeros(len(_QUESTION.prompt_ids) + len(_ANSWER_IDS), np.float32)


class BlankPolicy:
    """Implements `sftx.Policy`: its answers have two tokens, and each number that it computes is 0."""

    step = 0
    tokenizer: Any = None

    def __init__(self, lm: Any) -> None:
        """`lm`: what a rollout may look at, its `adapters` and what `sftx.load_model` needs of it."""
        self.lm = lm

    def generate(self, questions: Sequence[Question], *, num_answers: int = 1, **options: Any) -> list[list[Answer]]:
        return [
            [Answer(question, n, "", _ANSWER_IDS, (0.0,) * len(_ANSWER_IDS), "stop") for n in range(num_answers)]
            for question in questions
        ]

    def log_probs(self, examples: Sequence[Example], **options: Any) -> list[NDArray[np.float32]]:
        return [np.zeros(len(example.token_ids), np.float32) for example in examples]

    def per_token(
        self, examples: Sequence[Example], compute: Any, **options: Any
    ) -> list[dict[str, NDArray[np.float32]]]:
        return [_Zeros() for _ in examples]


def blank_group(rollout: RolloutStage, assembly: Assembly) -> tuple[Example, ...]:
    """Return the examples of one question, as many as the rollout makes of it at most."""
    adapters: Mapping[str, object] = {active.info.name: active for active in assembly.providers("sftx_adapter")}
    with FakeTensorMode():  # a reference that it loads has no memory
        lm = SimpleNamespace(
            adapters=adapters, head_weight=torch.empty(1), device=torch.device("cpu"), tokenizer=None, loss_module=None
        )
        made = rollout(BlankPolicy(lm), [_QUESTION], 1)
    examples = list(made.examples)
    return tuple(examples[at % len(examples)] for at in range(rollout.num_answers))
