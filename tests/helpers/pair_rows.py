"""Preference records for runs: pairs and labelled answers of unequal lengths."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Final

_WORDS: Final = ("set", "the", "light", "in", "kitchen", "to", "blue", "play", "music", "at", "seven", "please", "wake")


def pair_rows(num: int, *, labelled: bool, seed: str = "pairs") -> list[dict[str, Any]]:
    """Return pairs in TRL's form of texts, or as many labelled answers, a third of them bad.

    The answers have 8 words at most: the log-probabilities of longer ones add up to over 256 nats, where one rounding
    of fp32 is 3e-5.
    """
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(1, most)))

    rows: list[dict[str, Any]] = []
    for number in range(num):
        prompt, chosen = text(20), text(8)
        while (rejected := text(8)) == chosen:
            pass
        pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append({"prompt": prompt, "completion": chosen, "label": number % 3 > 0} if labelled else pair)
    return rows


def write_pair_rows(path: Path, num: int, *, labelled: bool, seed: str = "pairs") -> None:
    lines = [json.dumps(row) + "\n" for row in pair_rows(num, labelled=labelled, seed=seed)]
    path.write_text("".join(lines), encoding="utf-8")
