"""Preference runs that are killed at a random instant and resumed end like ones that were not: bit for bit.

What was computed before the first step is read from the run directory again, since the model has been trained since.
"""

from __future__ import annotations

import os
import random
import time

import pytest

from killing import Case, Runs, case
from pair_rows import write_pair_rows
from sftx.verify.run_differences import differences

SEED = int(os.environ.get("SFTX_KILL_SEED", time.time_ns() % 10**6))

_COMMON = (
    "--plugin chatml --learning-rate 1e-3 --gradient-accumulation-steps 2 --per-device-train-batch-size 2 "
    "--eval-steps 3 --save-steps 2 --save-total-limit 2 --max-steps 12 --logging-steps 4 "
)
PAIRS = "--data {data}/pairs.jsonl --eval-data {data}/held-pairs.jsonl"
LABELLED = "--data {data}/labelled.jsonl --eval-data {data}/held-labelled.jsonl"
CASES = (
    case("dpo-precompute", f"{_COMMON} --plugin dpo {PAIRS}"),
    case("dpo-adapters", f"{_COMMON} --plugin lora --set lora.lora_dropout=0.2 --plugin dpo {PAIRS}"),
    case("kto-adapters", f"{_COMMON} --plugin lora --set lora.lora_dropout=0.2 --plugin kto {LABELLED}"),
    case("kto-precompute", f"{_COMMON} --plugin lora --plugin kto --set kto.reference=precompute {LABELLED}"),
)


@pytest.mark.parametrize(
    ("wanted", "kills"),
    [
        pytest.param(one, 1 if number == 0 else 2, id=one.name, marks=[pytest.mark.slow] if number else [])
        for number, one in enumerate(CASES)
    ],
)
def test_a_run_killed_at_a_random_instant_ends_the_same(runs: Runs, wanted: Case, kills: int) -> None:
    for kind in ("pairs", "labelled"):
        write_pair_rows(runs.root / f"{kind}.jsonl", 21, labelled=kind == "labelled")
        write_pair_rows(runs.root / f"held-{kind}.jsonl", 5, labelled=kind == "labelled", seed="held out")
    rng = random.Random(f"{SEED} {wanted.name}")
    killed = runs.killed(wanted, rng, kills=kills)
    assert killed.codes[-1] == 0, f"SFTX_KILL_SEED={SEED} {killed}"
    found = differences(runs.undisturbed(wanted)[0], killed.output_dir)
    assert not found, f"SFTX_KILL_SEED={SEED} {killed.story}: {found}"
