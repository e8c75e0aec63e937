"""A file of rewards, as a user of the plugin `reward-function` writes one."""

from __future__ import annotations

from typing import Any


def overlap(answer: str, row: Any) -> float | None:
    """Score the share of the reference's words that the answer has."""
    words = set(row.reference.casefold().split())
    return len(words & set(answer.casefold().split())) / len(words) if words else None


def longest(answers: list[str]) -> list[float]:
    """Score 1 for the longest answers."""
    longest = max(map(len, answers))
    return [float(len(answer) == longest) for answer in answers]


def letters(answer: str) -> float:
    """Score the share of the answer's characters that are an `e`."""
    return answer.count("e") / max(1, len(answer))
