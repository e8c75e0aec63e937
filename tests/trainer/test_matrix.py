"""Every pair of built-in choices for template, collator, adapter and loss trains together, two steps each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from sftx.assembly.discovery import discover, hooks_of, load_class

STAGES = ("template", "collator", "adapter", "loss")
NO_ADAPTER = "full fine-tuning"


def choices() -> dict[str, list[str]]:
    """The built-in plugins of each stage; for the adapter also none."""
    hooks = {info.name: hooks_of(info, load_class(info)) for info in discover() if info.package == "sftx"}
    found = {stage: [name for name, fills in hooks.items() if f"sftx_{stage}" in fills] for stage in STAGES}
    return found | {"adapter": [NO_ADAPTER, *found["adapter"]]}


def pairwise(choices: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """Combinations, one choice a stage, in which every pair of choices of two stages stands at least once.

    Greedy: always the combination with the most pairs that are not covered yet.
    """
    every = list(itertools.product(*choices.values()))

    def pairs(combination: tuple[str, ...]) -> set[tuple[tuple[int, str], ...]]:
        return set(itertools.combinations(enumerate(combination), 2))

    left = set().union(*map(pairs, every))
    chosen = []
    while left:
        best = max(every, key=lambda combination: len(pairs(combination) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def test_pairs_are_covered_by_few_combinations() -> None:
    four = {stage: [f"{stage}-{number}" for number in range(4)] for stage in STAGES}
    chosen = pairwise(four)
    assert len(chosen) <= 28  # of 256; 16 is the least
    for (a, first), (b, second) in itertools.combinations(enumerate(four.values()), 2):
        for pair in itertools.product(first, second):
            assert any((combination[a], combination[b]) == pair for combination in chosen)


@pytest.mark.parametrize("combination", pairwise(choices()), ids=" ".join)
def test_every_pair_of_choices_trains(combination: tuple[str, ...], tmp_path: Path) -> None:
    from sftx.testing.runs import run_tiny

    names = [name for name in combination if name != NO_ADAPTER]
    result = run_tiny(names, tmp_path)
    assert result.summary["num_steps"] == 2
    loss = result.summary["loss"]
    assert 0 < loss["last"] < 10
    artefact = "model" if NO_ADAPTER in combination else "adapter"
    assert list((result.output_dir / artefact).glob("*.safetensors"))
