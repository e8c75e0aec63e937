"""Compare the engine that answers with transformers' `generate`, on the demo's held-out rows.

The embedded model answers the same prompts greedily both ways, in this process, in turn, so that other load of the
machine slows both; which is first alternates. For each dtype and batch size there are two kinds of answers: `full`, of
`--new-tokens` tokens each, where both do the same work, and `stopped`, which end with their first sentence too, so that
rows of a batch end one by one. The ratio is that of CPU times of the process (with one thread, without that of other
processes), generate's to the engine's. Answers must be the same: in fp32 all of them, in bf16 up to the first token
whose two largest logits are nearer to one another than bf16's rounding. The result is written to
benchmarks/results/cpu/generation.json, or to --out. The exit code is 1 when an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig

from sftx.assembly.registry import activate
from sftx.config import loading
from sftx.data.pipeline import build_pipeline
from sftx.model.generation import generate_greedy
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "cpu" / "generation.json"
TIE: Final = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}
"""By dtype: logits that differ by no more than this share of the largest are equal but for rounding."""


def engine_answers(
    lm: CausalLM, prompts: Sequence[Sequence[int]], new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    given = generate_greedy(lm, prompts, max_new_tokens=new_tokens, stop_ids=stop_ids, batch_size=len(prompts))
    return [ids for _, ids in sorted(given)]


def transformers_answers(
    lm: CausalLM, prompts: Sequence[Sequence[int]], new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """Return the answers of the model's own `generate` to the same batch, padded at the left."""
    length = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, length - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, length - len(prompt) :] = 1
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(stop_ids) or None, pad_token_id=0
    )
    model: Any = lm.model
    own, model.generation_config = model.generation_config, settings
    with torch.no_grad():
        out: Tensor = model.generate(ids_BT, attention_mask=mask_BT)
    model.generation_config = own
    answers = out[:, length:].tolist()
    return [ids[: next((at for at, token in enumerate(ids) if token in stop_ids), len(ids))] for ids in answers]


@torch.no_grad()
def is_tie(lm: CausalLM, prompt: Sequence[int], answers: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> bool:
    """Return whether the first token in which two answers differ is one of two that are equal but for rounding."""
    pairs = enumerate(zip(*answers, strict=False))
    first = next((at for at, pair in pairs if pair[0] != pair[1]), min(map(len, answers)))
    logits_V = lm.model(input_ids=torch.tensor([[*prompt, *answers[0][:first]]])).logits[0, -1].float()
    chosen = [logits_V[answer[first]] if first < len(answer) else logits_V[list(stop_ids)].max() for answer in answers]
    return bool((chosen[0] - chosen[1]).abs() <= TIE[lm.head_weight.dtype] * logits_V.abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=4, help="batches that each is timed on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    loaded = loading.load(None, add=["chatml", "exact-match"])  # the embedded run file
    prepared = build_pipeline(loaded.config, activate(loaded), loaded.origins)
    prompts = [question.prompt_ids for question in prepared.load_eval(questions=True).questions]
    spec, ways = load_spec(prepared.model), (engine_answers, transformers_answers)
    ends = [token_id for token, token_id in prepared.tokenizer.get_vocab().items() if token in (".", "?", "!", ":")]
    kinds = {"full": (), "stopped": (*prepared.encoder.stop_ids, *ends)}
    results = []
    for name in arguments.dtypes:
        model = load_model(spec, [], dtype=getattr(torch, name), device=torch.device("cpu"))
        lm = CausalLM(model, prepared.tokenizer).eval()
        for way in ways:
            way(lm, prompts[:1], 2, ())  # warm-up
        for batch_size in arguments.batch_sizes:
            for kind, stop_ids in kinds.items():
                batches = [
                    [prompts[(n * batch_size + row) * 7 % len(prompts)] for row in range(batch_size)]
                    for n in range(arguments.rounds)
                ]
                result = compare(lm, batches, arguments.new_tokens, stop_ids, ways)
                results.append({"dtype": name, "batch_size": batch_size, "answers": kind, **result})
                print(json.dumps(results[-1]), flush=True)
    report = {
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
        "new_tokens": arguments.new_tokens,
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(result["different"] for result in results))


def compare(
    lm: CausalLM,
    batches: Sequence[Sequence[Sequence[int]]],
    new_tokens: int,
    stop_ids: Sequence[int],
    ways: Sequence[Callable[..., list[list[int]]]],
) -> dict[str, Any]:
    """Time both ways on each batch in turn, and compare their answers."""
    ratios, seconds, num_tokens, ties, different = [], [0.0, 0.0], 0, 0, 0
    for turn, batch in enumerate(batches):
        taken, answers = [0.0, 0.0], [list[list[int]](), list[list[int]]()]
        for at in (0, 1) if turn % 2 else (1, 0):
            begin = time.process_time()
            answers[at] = ways[at](lm, batch, new_tokens, stop_ids)
            taken[at] = time.process_time() - begin
        ratios.append(taken[1] / taken[0])
        seconds = [total + one for total, one in zip(seconds, taken, strict=True)]
        num_tokens += sum(map(len, answers[0]))
        for prompt, ours, theirs in zip(batch, *answers, strict=True):
            if ours != theirs:
                tie = is_tie(lm, prompt, (ours, theirs), stop_ids)
                ties, different = ties + tie, different + (not tie)
    return {
        "engine_tokens_per_cpu_s": round(num_tokens / seconds[0], 1),
        "generate_tokens_per_cpu_s": round(num_tokens / seconds[1], 1),
        "times_as_fast": round(seconds[1] / seconds[0], 3),
        "times_as_fast_by_batch": [round(ratio, 3) for ratio in ratios],
        "median_times_as_fast": round(statistics.median(ratios), 3),
        "num_answers": sum(map(len, batches)),
        "ties": ties,
        "different": different,
    }


if __name__ == "__main__":
    raise SystemExit(main())
