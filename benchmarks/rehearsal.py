"""The program of `make rehearsal`: what a step costs on a GPU, counted without one.

Steps of real shapes are rehearsed on tensors without values (tests/helpers/rehearsing.py), so nothing here is measured.
For each configuration the script prints the kernel launches of a layer, the least time of a layer, the roofline time of
what is executed, and the operations that move the most bytes; then what a cluster adds (benchmarks/scaling.py). All of
it is written to benchmarks/results/rehearsal.json, and the tables to docs/performance-gpu.md.

A model's step is that of two layers, and for each further layer what a third one adds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "performance-gpu.md"
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "benchmarks")]

import model_configs  # noqa: E402
from rehearsing import FEW_LAYERS, Setup, rehearse  # noqa: E402
from step_record import B200, H100, Op, Rates, StepRecord, least  # noqa: E402

DOCUMENTS: Final = (1024,) * 4
"""The lengths of the documents of a packed row: 4096 tokens a step."""
ROWS: Final = (1024, 1023, 1022, 1021)
"""The lengths of the rows of a padded batch, which has as many positions, and needs a mask."""
CHECKPOINTING: Final = {"train.gradient_checkpointing": True}
SETUPS: Final = {
    "LoRA, packed": Setup(lengths=DOCUMENTS),
    "LoRA, padded": Setup(("lora",), lengths=ROWS),
    "LoRA, dropout 0.1": Setup(options={"lora.lora_dropout": 0.1}, lengths=DOCUMENTS),
    "LoRA, checkpointing": Setup(options=CHECKPOINTING, lengths=DOCUMENTS),
    "QLoRA": Setup(("qlora", "packed"), lengths=DOCUMENTS),
    "full": Setup(("packed",), lengths=DOCUMENTS),
    "full, checkpointing": Setup(("packed",), CHECKPOINTING, lengths=DOCUMENTS),
    "full, bf16 weights": Setup(("packed",), {"train.optim": "adamw_bf16"}, lengths=DOCUMENTS),
}
CASES: Final = [(model, name) for model in ("llama-3-8b", "qwen2.5-7b") for name in SETUPS]
CASES += [("qwen3-30b-a3b", name) for name in ("LoRA, packed", "full")]
CASES += [("llama-3-70b", name) for name in ("LoRA, checkpointing", "full, checkpointing")]
LARGEST: Final = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "rehearsal.json")
    parser.add_argument("--cases", type=int, help="only the first so many configurations")
    arguments = parser.parse_args()
    import scaling

    results = [count(model, name) for model, name in CASES[: arguments.cases]]
    report = {"tokens": sum(DOCUMENTS), "cases": results, "scaling": scaling.scale(results)}
    print("\n\n".join(tables(report).values()))
    if arguments.cases is None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")
    return 0


# --- counting -----------------------------------------------------------------------------------


def count(model: str, setup: str) -> dict[str, Any]:
    """Return what a step of this model costs. Sizes are in bytes, times in seconds."""
    config = model_configs.CONFIGS[model]
    few, more = (rehearse(config, SETUPS[setup], num_layers=FEW_LAYERS + extra) for extra in (0, 1))
    num_layers = config["num_hidden_layers"]

    def whole(of: Callable[[StepRecord], float]) -> float:
        return of(few) + (of(more) - of(few)) * (num_layers - FEW_LAYERS)

    layer = {phase: [op for op in few.ops if op.phase.name == phase and op.phase.layer == 1] for phase in PHASES}
    return {
        "model": model,
        "setup": setup,
        "num_layers": num_layers,
        "waits": len(few.waits),
        "faults": few.faults,
        "layer": {phase: _costs(ops) for phase, ops in layer.items()},
        "step": {
            "launches": round(whole(lambda record: sum(op.launches for op in record.ops))),
            "seconds": {
                rates.name: whole(lambda record, rates=rates: sum(op.seconds(rates) for op in record.ops))
                for rates in CHIPS
            },
            "least_seconds": {
                rates.name: whole(lambda record, rates=rates: least(record.ops, rates)[1]) for rates in CHIPS
            },
        },
        "update_seconds": whole(
            lambda record: sum(op.seconds(H100) for op in record.ops if op.name.startswith(UPDATE))
        ),
        "memory": {kind: round(whole(lambda record, kind=kind: record.peak[kind])) for kind in few.peak},
        "largest": _largest([*layer["forward"], *layer["backward"]]),
    }


CHIPS: Final = (H100, B200)
PHASES: Final = ("forward", "backward")
UPDATE: Final = ("_fused_", "_foreach_")
"""How the operations that clip and update are called. Under FSDP2 each process has a share of them."""


def _costs(ops: Sequence[Op]) -> dict[str, Any]:
    return {
        "launches": sum(op.launches for op in ops),
        "flops": sum(op.flops for op in ops),
        "bytes": sum(op.num_bytes for op in ops),
        "least_bytes": least(ops, H100)[0],
        "seconds": {rates.name: sum(op.seconds(rates) for op in ops) for rates in CHIPS},
        "least_seconds": {rates.name: least(ops, rates)[1] for rates in CHIPS},
    }


def _largest(ops: Iterable[Op]) -> list[dict[str, Any]]:
    """Return the lines of code whose operations move the most bytes in a layer."""
    by_place: defaultdict[tuple[str, str], list[Op]] = defaultdict(list)
    for op in ops:
        by_place[op.name, op.site].append(op)
    ranked = sorted(by_place.items(), key=lambda item: -sum(op.num_bytes for op in item[1]))
    return [
        {"operation": name, "place": site, "times": len(some), "bytes": sum(op.num_bytes for op in some)}
        for (name, site), some in ranked[:LARGEST]
    ]


# --- tables -------------------------------------------------------------------------------------


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of the report in Markdown, by the names that the page has for them."""
    import scaling

    shown = {f"layers, {rates.name}": layer_table(report["cases"], rates) for rates in CHIPS}
    shown["steps"] = step_table(report)
    for case in report["cases"]:
        shown[f"largest, {case['model']}, {case['setup']}"] = largest_table(case)
    return shown | scaling.tables(report["scaling"])


def fill(text: str, report: Mapping[str, Any]) -> str:
    """Return the page with the tables of this report between their marks."""
    for name, lines in tables(report).items():
        mark = f"<!-- {name} -->\n"
        before, found, rest = text.partition(mark)
        if found:
            text = f"{before}{mark}\n{lines}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def layer_table(cases: Iterable[Mapping[str, Any]], rates: Rates) -> str:
    rows = []
    for case in cases:
        forward, backward = (case["layer"][phase] for phase in PHASES)
        least_s, seconds = (
            forward[key][rates.name] + backward[key][rates.name] for key in ("least_seconds", "seconds")
        )
        moved, least_bytes = (forward[key] + backward[key] for key in ("bytes", "least_bytes"))
        rows.append(
            [case["model"], case["setup"], forward["launches"], backward["launches"], f"{least_s * 1e3:.2f}",
             f"{seconds * 1e3:.2f}", f"{(seconds - least_s) * 1e3:.2f}", f"{seconds / least_s:.2f}",
             f"{moved / least_bytes:.2f}"]
        )  # fmt: skip
    header = ["model", f"a layer on {rates.name}", "launches, forward", "backward", "least ms", "executed ms",
              "above, ms", "time ratio", "bytes ratio"]  # fmt: skip
    return table(header, rows)


def step_table(report: Mapping[str, Any]) -> str:
    rows = []
    for case in report["cases"]:
        step, memory = case["step"], case["memory"]
        rates = [f"{report['tokens'] / step['seconds'][chip.name]:,.0f}" for chip in CHIPS]
        kinds = [f"{memory[kind] / 1e9:.1f}" for kind in ("weights", "gradients", "optimizer", "activations")]
        rows.append(
            [case["model"], case["setup"], f"{step['launches']:,}", case["waits"], *rates, *kinds,
             f"{sum(memory.values()) / 1e9:.1f}"]
        )  # fmt: skip
    header = ["model", "a step", "launches", "waits", *(f"{chip.name} tokens/s at most" for chip in CHIPS),
              "weights GB", "gradients", "optimizer", "activations", "in all"]  # fmt: skip
    return table(header, rows)


def largest_table(case: Mapping[str, Any]) -> str:
    total = sum(case["layer"][phase]["bytes"] for phase in PHASES)
    rows = [
        [f"`{one['operation']}`", f"`{one['place']}`", one["times"], f"{one['bytes'] / 1e6:.0f}",
         f"{one['bytes'] / total:.0%}"]
        for one in case["largest"]
    ]  # fmt: skip
    return table([f"{case['model']}, {case['setup']}", "place", "times", "MB a layer", "share"], rows)


if __name__ == "__main__":
    sys.exit(main())
