"""A penalty for answers that come near to the largest length (DAPO, Yu et al. 2025, equation 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import Answer, ConfigError, Reward, RunInfo, hookimpl


@dataclass(frozen=True, eq=False)
class RewardLength:
    """0 for an answer that is short enough, falling to -1 at the largest length, and -1 beyond it.

    A shorter answer gets no more than 0. The token that ends an answer counts.
    """

    max_completion_len: Annotated[int, Field(ge=1, le=10**9, description="Tokens from which on the reward is -1.")]
    soft_punish_cache: Annotated[
        int, Field(ge=0, le=10**9, description="So many tokens before that length the reward begins to fall.")
    ]

    @hookimpl
    def sftx_validate(self, run: RunInfo) -> None:
        if self.soft_punish_cache > self.max_completion_len:
            raise ConfigError(
                f"option 'soft_punish_cache': is {self.soft_punish_cache}, and max_completion_len is "
                f"{self.max_completion_len}; give at most that"
            )

    @hookimpl
    def sftx_reward(self) -> Reward:
        return self

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [self._score(len(answer.token_ids)) for answer in answers]

    def _score(self, length: int) -> float:
        excess = length - (self.max_completion_len - self.soft_punish_cache)
        if excess <= 0:
            return 0.0
        return -1.0 if excess > self.soft_punish_cache else -excess / self.soft_punish_cache
