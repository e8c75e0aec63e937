"""Guard speed: how long our operations and a training step take, as ratios to torch's own products and modules.

`make perf` measures each pair in turn in one process on one thread, by CPU time, so that neither another process nor a
faster or slower clock changes much, and compares the ratio of the shortest times with the one that is committed in
benchmarks/results/perf.json for this kind of processor. A case that is more than 10 % above it is measured again, up to
`--rounds` times: noise makes a time longer, never shorter, so that it goes away and a loss does not. The exit code is 1
if a case stays above. `--record` writes the ratios of this machine. A kind of processor without figures is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sftx.trainer.precision import bf16_is_faster

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / "benchmarks" / "results" / "perf.json"
MAX_LOSS = 0.1
ROWS, D, WIDE, V, R = 2048, 576, 1536, 49_152, 16  # of SmolLM2-135M
LENGTHS = (180, 320, 260, 90, 410, 300, 240)
"""Of the documents of a packed row, tokens."""


@dataclass
class Case:
    """Something of ours beside something of torch; both are called again and again."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    times: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def measure(self) -> None:
        for function, times in zip((self.ours, self.theirs), self.times, strict=True):
            begin = time.process_time()
            function()
            times.append(time.process_time() - begin)

    @property
    def ratio(self) -> float:
        return min(self.times[0]) / min(self.times[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="operations alone, no training step")
    parser.add_argument("--rounds", type=int, default=40, help="at most (40)")
    parser.add_argument("--record", action="store_true", help="write the ratios of this machine as its baseline")
    options = parser.parse_args(arguments)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="sftx-perf-") as directory:
            return run(options, Path(directory))
    finally:
        torch.set_num_threads(num_threads)


def run(options: argparse.Namespace, directory: Path) -> int:
    kind = processor()
    recorded = json.loads(BASELINE.read_text()) if BASELINE.is_file() else {}
    baseline: Mapping[str, float] = {} if options.record else recorded.get(kind, {})
    ratios, is_worse = {}, False
    for make in (*OPERATIONS, *(() if options.short else (training_step,))):
        for dtype in (torch.float32, torch.bfloat16):
            case = make(dtype, directory)
            limit = baseline.get(case.name, math.inf) * (1 + MAX_LOSS)
            case.measure()  # begins with what is done once
            case.times = ([], [])
            for number in range(options.rounds):
                if number >= min(8, options.rounds) and case.ratio <= limit:
                    break
                case.measure()
            ratios[case.name] = round(case.ratio, 3)
            is_worse |= case.ratio > limit
            known = f"{baseline[case.name]:.3f} recorded" if case.name in baseline else "nothing recorded"
            print(
                f"{case.name:44} {case.ratio:7.3f} of torch's time, {known}{' WORSE' * (case.ratio > limit)}",
                flush=True,
            )
    if options.record:
        recorded[kind] = recorded.get(kind, {}) | ratios
        BASELINE.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    elif not baseline:
        print(f"nothing is recorded for a processor with {kind}; `--record` does it", file=sys.stderr)
    return int(is_worse)


def processor() -> str:
    """Return what this CPU multiplies with: ratios differ much between these kinds."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16" if bf16_is_faster() else "avx512_bf16 slower than float32"
    return torch.backends.cpu.get_cpu_capability().lower()


# ---- cases: forward and backward


def _name(what: str, dtype: torch.dtype) -> str:
    return f"{what}, {str(dtype).removeprefix('torch.')}"


def _random(*shape: int, dtype: torch.dtype, trained: bool = False) -> torch.Tensor:
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype).requires_grad_(trained)


def _lora(dtype: torch.dtype, outputs: tuple[int, ...], what: str) -> Case:
    from sftx_kernels import lora_linears

    x = _random(ROWS, D, dtype=dtype, trained=True)
    weights = [_random(size, D, dtype=dtype) for size in outputs]
    lora_As = [_random(R, D, dtype=torch.float32, trained=True) for _ in outputs]
    lora_Bs = [_random(size, R, dtype=torch.float32, trained=True) for size in outputs]
    upstream = [_random(ROWS, size, dtype=dtype) for size in outputs]

    def ours() -> None:
        torch.autograd.backward(lora_linears(x, weights, lora_As, lora_Bs, scaling=2.0), upstream)

    def theirs() -> None:
        for weight, dy in zip(weights, upstream, strict=True):
            F.linear(x.detach(), weight)
            torch.mm(dy, weight)

    return Case(_name(what, dtype), ours, theirs)


def lora(dtype: torch.dtype, _: Path) -> Case:
    return _lora(dtype, (WIDE,), "LoRA linear over its base's products")


def lora_group(dtype: torch.dtype, _: Path) -> Case:
    return _lora(dtype, (D, D // 3, D // 3), "q, k, v with LoRA over their products")


def head(dtype: torch.dtype, _: Path) -> Case:
    from sftx_kernels import linear_cross_entropy

    hidden, weight = _random(ROWS // 4, D, dtype=dtype, trained=True), _random(V, D, dtype=dtype)
    labels, logits = torch.randint(V, (ROWS // 4,)), torch.empty(ROWS // 4, V, dtype=dtype)

    def theirs() -> None:
        torch.mm(hidden.detach(), weight.T, out=logits)
        torch.mm(logits, weight)

    return Case(
        _name("head and loss over the head's products", dtype),
        lambda: linear_cross_entropy(hidden, weight, labels).loss.backward(),
        theirs,
    )


def attention(dtype: torch.dtype, _: Path) -> Case:
    from sftx.model.varlen_attention import attend

    num_tokens = sum(LENGTHS)
    query, key, value = (_random(num_tokens, heads, 64, dtype=dtype, trained=True) for heads in (9, 3, 3))
    upstream = _random(num_tokens, 9, 64, dtype=dtype)
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).int()

    def theirs() -> None:
        parts = zip(*(x.split(LENGTHS) for x in (query, key, value, upstream)), strict=True)
        for one in parts:
            q, k, v, dy = (x.transpose(0, 1)[None] for x in one)
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).backward(dy)

    return Case(
        _name("attention of documents over torch's of each", dtype),
        lambda: attend(query, key, value, ends, max(LENGTHS), scale=0.125).backward(upstream),
        theirs,
    )


def norm(dtype: torch.dtype, _: Path) -> Case:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from sftx_kernels import rms_norm

    module = LlamaRMSNorm(D).to(dtype).requires_grad_(False)
    x, upstream = _random(ROWS, D, dtype=dtype, trained=True), _random(ROWS, D, dtype=dtype)
    return Case(
        _name("RMSNorm over transformers' module", dtype),
        lambda: rms_norm(x, module.weight, module.variance_epsilon).backward(upstream),
        lambda: module(x).backward(upstream),
    )


def training_step(dtype: torch.dtype, directory: Path) -> Case:
    """A packed LoRA step of a model with SmolLM2's sizes and 4 layers, over as many operations in torch's products."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sftx.config.loading import load
    from sftx.config.options import EMBEDDED_MODEL
    from sftx.model import names
    from sftx.training import assemble

    place = directory / str(dtype)
    shutil.copytree(names.resolve(EMBEDDED_MODEL), place, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig(**(json.loads((place / "config.json").read_text()) | {"num_hidden_layers": 4}))
    LlamaForCausalLM(config).save_pretrained(place)
    chosen = random.Random(0)
    words = [["red", "green", "blue", "seven", "tree"][chosen.randrange(5)] for _ in range(40_000)]
    rows = [{"prompt": "Go on:", "completion": " ".join(words[100 * n : 100 * n + 40 + n % 60])} for n in range(256)]
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "model": str(place), "data.train": str(data), "data.max_length": 512, "data.max_overlap": 1,
        "output_dir": str(place / "run"), "train.bf16": dtype == torch.bfloat16, "train.use_cpu": True,
        "train.per_device_train_batch_size": 4,
    }  # fmt: skip
    assignments = [(name, value, f"--set {name}") for name, value in settings.items()]
    session = assemble(load(None, add=["chatml", "lora", "packed"], assignments=assignments))
    trainer = session.trainer
    batches = trainer.micro_batches(next(iter(session.sampler)))
    num_tokens = sum(one.batch.num_input_tokens for one in batches)
    num_operations = 4 * sum(p.numel() for p in trainer.lm.model.parameters() if not p.requires_grad) * num_tokens
    x, weight = _random(ROWS, D, dtype=dtype), _random(WIDE, D, dtype=dtype)
    num_products = round(num_operations / (2 * ROWS * D * WIDE))
    return Case(
        _name("a packed LoRA step over its products", dtype),
        lambda: trainer.train_step(1, 0.0, batches),
        lambda: [F.linear(x, weight) for _ in range(num_products)],
    )


OPERATIONS: tuple[Callable[[torch.dtype, Path], Case], ...] = (lora, lora_group, head, attention, norm)


if __name__ == "__main__":
    sys.exit(main())
