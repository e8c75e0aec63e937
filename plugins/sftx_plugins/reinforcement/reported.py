"""The numbers that rollouts report of a window's answers, under TRL's names."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sftx import Answer


def rewards_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Return mean and unbiased standard deviation of the rewards: of the sum, and of each by the name of its plugin.

    An answer that a reward declined is left out there, and one that all of them declined is left out of the sum.
    """
    metrics = {"reward": _mean(known := [one.reward for one in answers if one.rewards]), "reward_std": _std(known)}
    for name in sorted({name for answer in answers for name in answer.rewards}):
        scores = [answer.rewards[name] for answer in answers if name in answer.rewards]
        metrics |= {f"rewards/{name}/mean": _mean(scores), f"rewards/{name}/std": _std(scores)}
    return metrics


def lengths_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Return what is reported of the lengths of answers, in tokens."""
    lengths = [len(answer.token_ids) for answer in answers]
    ended = [len(answer.token_ids) for answer in answers if answer.finish_reason == "stop"]
    metrics = {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": 1 - len(ended) / len(answers),
    }
    return metrics | ({"completions/mean_terminated_length": _mean(ended)} if ended else {})


def _mean(values: Sequence[float]) -> float:
    """Return the mean; 0 without any value."""
    return statistics.fmean(values) if values else 0.0


def _std(values: Sequence[float]) -> float:
    """Return the unbiased standard deviation; 0 for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
