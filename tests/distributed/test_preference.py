"""Preference runs in two processes are those of one: the reference, its log-probabilities and KTO's distance too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pytest

from pair_rows import write_pair_rows
from ranked import Starter
from same_run import DDP, FSDP2, compare

RUNS: Final[Mapping[str, str]] = {
    "dpo": "--plugin dpo --data {root}/pairs.jsonl --eval-data {root}/held-pairs.jsonl",
    "dpo-lora": "--plugin lora --plugin dpo --data {root}/pairs.jsonl --eval-data {root}/held-pairs.jsonl",
    "dpo-packed": "--plugin lora --plugin packed --set packed.length=256 --plugin dpo --set dpo.reference=precompute "
    "--data {root}/pairs.jsonl --eval-data {root}/held-pairs.jsonl",
    "kto": "--plugin lora --plugin kto --data {root}/labelled.jsonl --eval-data {root}/held-labelled.jsonl",
    "kto-full": "--plugin kto --data {root}/labelled.jsonl --eval-data {root}/held-labelled.jsonl",
    "orpo": "--plugin lora --plugin orpo --data {root}/pairs.jsonl --eval-data {root}/held-pairs.jsonl",
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("dpo", FSDP2, id="dpo-fsdp2"),
        pytest.param("kto", DDP, id="kto-lora-ddp"),
        *(
            pytest.param(name, how, id=f"{name}-{how.split()[-1]}", marks=pytest.mark.slow)
            for name, how in (
                ("dpo", DDP), ("dpo-lora", DDP), ("dpo-lora", FSDP2), ("dpo-packed", DDP), ("kto-full", FSDP2),
                ("kto", FSDP2), ("orpo", DDP),
            )
        ),
    ],
)  # fmt: skip
def test_the_run_is_that_of_one_process(starter: Starter, name: str, how: str) -> None:
    from sftx.model.tiny import model_dir

    for kind in ("pairs", "labelled"):
        write_pair_rows(starter.root / f"{kind}.jsonl", 35, labelled=kind == "labelled")
        write_pair_rows(starter.root / f"held-{kind}.jsonl", 5, labelled=kind == "labelled", seed="held out")
    arguments = (
        f"--model {model_dir()} --plugin chatml --train-batch-size 8 --per-device-train-batch-size 2 --max-steps 10 "
        "--eval-steps 5 --per-device-eval-batch-size 2 --learning-rate 1e-3 --weight-decay 0.1 "
    ) + RUNS[name].format(root=starter.root)
    alone = starter.alone(arguments.split())
    compare(starter.run(f"{arguments} {how}".split(), 2).succeed(), alone)
