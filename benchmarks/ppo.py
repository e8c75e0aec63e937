"""Train the embedded model by PPO to answer briefly, and score answers to prompts that it was not trained on.

    python benchmarks/ppo.py --seeds 0 1 2 --steps 10 --out benchmarks/results/ppo.json

The reward is 1 for an empty answer, and falls to 0 at 30 words; one that was cut off loses `missing_eos_penalty`.
Prompts are requests of the demo's training rows; those of the held-out rows are answered before and after training,
with the run's own sampling and the same random numbers. For each seed it prints the mean reward of these answers, their
words and the share that ended by itself, and the curves of `objective/scores` and `objective/kl`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch

import sftx
from sftx.model.decoding import Decoder, Request, Sampling

WORDS: Final = 30
LENGTH: Final = 40
TEMPERATURE: Final = 0.7
REWARD: Final = f"""
def score(answer: str) -> float:
    return max(0.0, 1 - len(answer.split()) / {WORDS})
"""
DEMO: Final = Path(sftx.__file__).parent / "demo"


def rows(name: str, count: int) -> list[dict[str, Any]]:
    lines = (DEMO / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def answered(loaded: Any, prompts: list[dict[str, Any]]) -> dict[str, float]:
    """Return what is reported of sampled answers to the prompts."""
    requests = [
        Request(
            loaded.prompt(sftx.Conversation((sftx.Message("user", row["messages"][0]["content"]),))),
            Sampling(LENGTH, TEMPERATURE, 0, 1.0, 0.0, seed=number),
        )
        for number, row in enumerate(prompts)
    ]
    with torch.no_grad(), loaded.autocast():
        done = list(Decoder(loaded.lm, stop_ids=loaded.stop_ids, max_rows=16).run(requests))
    words = [len(str(loaded.tokenizer.decode(one.answer_ids, skip_special_tokens=True)).split()) for one in done]
    return {
        "reward": sum(max(0.0, 1 - count / WORDS) for count in words) / len(words),
        "words": sum(words) / len(words),
        "ended": sum(one.finish_reason == "stop" for one in done) / len(done),
    }


def trained(seed: int, steps: int, directory: Path, num_held_out: int) -> dict[str, Any]:
    (directory / "brief.py").write_text(REWARD, encoding="utf-8")
    start = time.perf_counter()
    run = sftx.run(
        model="sftx:smollm2-135m-instruct",
        plugins={
            "tokenizer": {},
            "lora": {},
            "ppo": {
                "response_length": LENGTH,
                "temperature": TEMPERATURE,
                "num_ppo_epochs": 2,
                "missing_eos_penalty": 0.5,
            },
            "reward-function": {"function": f"{directory / 'brief.py'}:score"},
        },
        data=rows("train.jsonl", 512),
        max_steps=steps,
        train_batch_size=16,
        per_device_train_batch_size=16,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        seed=seed,
        output_dir=str(directory / "run"),
    )
    seconds = time.perf_counter() - start
    loaded, prompts = sftx.load_run(run.output_dir), rows("held_out.jsonl", num_held_out)
    with loaded.lm.without_adapters():
        before = answered(loaded, prompts)
    lines = (run.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    of_steps = [line for line in map(json.loads, lines) if line["event"] == "step"]
    return {
        "seed": seed,
        "before": before,
        "after": answered(loaded, prompts),
        "scores": [round(line["objective/scores"], 4) for line in of_steps],
        "kl": [round(line["objective/kl"], 4) for line in of_steps],
        "explained_variance": [round(line["val/explained_variance"], 4) for line in of_steps],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results = []
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as directory:
            results.append(trained(seed, given.steps, Path(directory), given.held_out))
        print(json.dumps(results[-1]), flush=True)
        if given.out is not None:
            given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
