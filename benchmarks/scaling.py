"""A model of a step on 8 to 512 GPUs, from the rehearsed step of one and the rates of the links between them.

Nothing here is measured. With n processes, P parameters of a layer, b bytes each:

- A collective sends `bytes * (n - 1) / n` into and out of each process. Within a node of 8 that takes the rate of
  NVLink; between nodes 8 adapters work for 8 GPUs, and each byte enters a node once, so that the rate is
  `min(NVLINK, 8 * ADAPTER)`. Latency is left out: 20 to 60 us a collective, which counts where a layer is short.
- FSDP2 gathers the weights of a layer in forward and again in backward (b = 2: bf16), and reduces and scatters its
  gradients in backward (b = 4: fp32) where it trains. Frozen layers have no gradients; the adapters' are all reduced
  once, after backward. Embedding and head are gathered before the first layer, in the dtype that they are stored in,
  and their gradients are scattered last.
- DDP reduces all gradients (b = 4, twice: reduce, gather) during backward.
- What is sent hides behind a layer that computes meanwhile. Per layer `max(0, sent - computed)` remains in forward and
  in backward, besides what has no layer to hide behind: the first gathering and the last scattering.
- Products and passes over memory take the roofline time divided by `SHARE`, the part of it that kernels are assumed to
  reach. The update of n processes is shared under FSDP2.

A step of each process has 4096 tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rehearsal import PHASES, SETUPS, table

import model_configs
from sftx.config import loading
from sftx.inspection.memory_plan import target_device
from sftx.inspection.memory_plan.planner import Planner

NVLINK: Final = 450e9
"""Bytes/s of a GPU to the others of its node, in each direction (H100, NVLink 4)."""
ADAPTER: Final = 50e9
"""Bytes/s of the network adapter of each GPU, in each direction (400 Gbit/s)."""
NODE: Final = 8
SHARE: Final = 0.6
GPUS: Final = (8, 16, 64, 512)
CASES: Final = (
    ("llama-3-8b", "LoRA, packed", "ddp"),
    ("llama-3-8b", "LoRA, packed", "fsdp2"),
    ("llama-3-8b", "full", "fsdp2"),
    ("llama-3-70b", "LoRA, checkpointing", "fsdp2"),
    ("llama-3-70b", "full, checkpointing", "fsdp2"),
)
CHIP: Final = "H100 SXM"


def rate(num_gpus: int) -> float:
    """Return the bytes/s of a collective over so many GPUs, in and out of each."""
    return NVLINK if num_gpus <= NODE else min(NVLINK, NODE * ADAPTER)


def sent(num_bytes: float, num_gpus: int) -> float:
    """Return the seconds in which a tensor of so many bytes is gathered, or reduced and scattered."""
    return num_bytes * (num_gpus - 1) / num_gpus / rate(num_gpus)


def scale(cases: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the model of each of CASES that was rehearsed."""
    rehearsed = {(case["model"], case["setup"]): case for case in cases}
    return [
        _scale(rehearsed[model, setup], strategy) for model, setup, strategy in CASES if (model, setup) in rehearsed
    ]


def _scale(case: Mapping[str, Any], strategy: str) -> dict[str, Any]:
    trains_all = case["setup"].startswith("full")
    with tempfile.TemporaryDirectory() as directory:
        planner = _planner(case, directory)
        size = planner.dry_runner.size
        memory = {n: planner.estimate(rows=1, max_length=4096, world_size=n, distributed=strategy).total for n in GPUS}
    # Trained weights are stored in fp32; the size of a layer is given as it is stored.
    layer = size.sharded_layer_bytes // (4 if trains_all else 2)
    outside = size.sharded_outside_bytes
    rows = []
    for n in GPUS:
        for share in (1.0, SHARE):
            compute = {phase: case["layer"][phase]["seconds"][CHIP] / share for phase in PHASES}
            update = case["update_seconds"] / share
            step = case["step"]["seconds"][CHIP] / share - (update * (1 - 1 / n) if strategy == "fsdp2" else 0)
            gather, scatter = sent(2 * layer, n), sent(4 * layer, n) if trains_all else 0.0
            if strategy == "ddp":
                hidden_behind = compute["backward"] * (case["num_layers"] - 1)
                exposed = max(0.0, 2 * sent(4 * size.num_trainable, n) - hidden_behind)
                gather, scatter = 0.0, 2 * sent(4 * size.num_trainable, n) / case["num_layers"]
            else:
                per_layer = max(0.0, gather - compute["forward"]) + max(0.0, gather + scatter - compute["backward"])
                ends = sent(outside, n) + gather + (sent(outside, n) + scatter if trains_all else 0.0)
                adapters = 0.0 if trains_all else 2 * sent(4 * size.num_trainable, n)
                exposed = per_layer * case["num_layers"] + ends + adapters
            rows.append(
                {
                    "gpus": n,
                    "share": share,
                    "forward_seconds": compute["forward"],
                    "forward_sent_seconds": gather,
                    "backward_seconds": compute["backward"],
                    "backward_sent_seconds": gather + scatter,
                    "exposed_seconds": exposed,
                    "step_seconds": step + exposed,
                    "tokens_per_second": 4096 / (step + exposed),
                    "memory": memory[n],
                }
            )
    return {"model": case["model"], "setup": case["setup"], "strategy": strategy, "rows": rows}


def _planner(case: Mapping[str, Any], directory: str) -> Planner:
    setup = SETUPS[case["setup"]]
    model = model_configs.write(model_configs.CONFIGS[case["model"]], Path(directory))
    values = {"model": model, "data.train": "none.jsonl", "data.max_length": 4096, **setup.options}
    loaded = loading.load(None, add=setup.plugins, assignments=[(name, value, name) for name, value in values.items()])
    return Planner(loaded, target_device.parse("h100"))


def tables(scaling: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return a table of each case in Markdown, by its name."""
    return {f"scaling, {case['model']}, {case['setup']}, {case['strategy']}": _table(case) for case in scaling}


def _table(case: Mapping[str, Any]) -> str:
    lines = []
    for roofline, assumed in zip(case["rows"][::2], case["rows"][1::2], strict=True):
        times = [f"{assumed[key] * 1e3:.2f}" for key in
                 ("forward_seconds", "forward_sent_seconds", "backward_seconds", "backward_sent_seconds")]  # fmt: skip
        lines.append(
            [assumed["gpus"], *times, f"{assumed['exposed_seconds'] * 1e3:.0f}",
             f"{roofline['tokens_per_second']:,.0f}", f"{assumed['tokens_per_second']:,.0f}",
             f"{assumed['tokens_per_second'] * assumed['gpus']:,.0f}", f"{assumed['memory'] / 1e9:.1f}"]
        )  # fmt: skip
    header = ["GPUs", "a layer's forward ms", "sent ms",
              "backward ms", "sent ms", "exposed ms a step", "tokens/s a GPU, roofline", f"at {SHARE:.0%}",
              f"all GPUs at {SHARE:.0%}", "GB a GPU"]  # fmt: skip
    return table(header, lines)
