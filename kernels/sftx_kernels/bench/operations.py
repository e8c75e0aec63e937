"""This module lists the operations that `sftx bench` measures, with their shapes, defaults and providers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sftx_kernels.bench import (
    BenchError,
    cross_entropy,
    files,
    grouped_lora,
    linear_cross_entropy,
    linear_kl,
    lora,
    rms_norm,
    rotary,
    swiglu,
)
from sftx_kernels.bench.cases import Case, Provider, Shape
from sftx_kernels.bench.cross_entropy import CrossEntropyShape
from sftx_kernels.bench.grouped_lora import GroupedLoraShape
from sftx_kernels.bench.linear_cross_entropy import LinearCrossEntropyShape
from sftx_kernels.bench.linear_kl import DIVERGENCES, LinearKLShape
from sftx_kernels.bench.lora import LoraShape
from sftx_kernels.bench.rms_norm import RmsNormShape
from sftx_kernels.bench.rotary import RotaryShape
from sftx_kernels.bench.swiglu import SwigluShape

SHAPES: Final[Mapping[str, type[Shape]]] = {
    cls.op: cls
    for cls in (
        CrossEntropyShape,
        LinearCrossEntropyShape,
        LinearKLShape,
        LoraShape,
        GroupedLoraShape,
        RmsNormShape,
        SwigluShape,
        RotaryShape,
    )
}
OPERATIONS: Final = tuple(SHAPES)
PROVIDERS: Final[tuple[Provider, ...]] = (
    *cross_entropy.PROVIDERS,
    *linear_cross_entropy.PROVIDERS,
    *linear_kl.PROVIDERS,
    *lora.PROVIDERS,
    *grouped_lora.PROVIDERS,
    *rms_norm.PROVIDERS,
    *swiglu.PROVIDERS,
    *rotary.PROVIDERS,
)

# In order of importance: a time budget drops cases from the end.
_CPU_SHAPES: Final[tuple[Shape, ...]] = (
    LinearCrossEntropyShape(1024, 1024, 32000),
    LoraShape(2048, 576, (1536,)),
    CrossEntropyShape(512, 32000),
    GroupedLoraShape(2048, 16, 576, 768),
    RmsNormShape(2048, 576),  # these three of SmolLM2-135M
    SwigluShape(2048, 1536),
    RotaryShape(2048, 9, 3, 64),
    LinearKLShape(512, 576, 960, 49152),  # SmolLM2-135M from SmolLM2-360M
    LinearKLShape(512, 576, 960, 49152, "jsd"),
)
_GPU_SHAPES: Final[tuple[Shape, ...]] = (
    LinearCrossEntropyShape(8192, 4096, 128256),
    LoraShape(8192, 4096, (4096,)),
    CrossEntropyShape(8192, 32000),
    LinearKLShape(4096, 2048, 4096, 128256),  # Llama 3.2 1B from Llama 3.1 8B
    LinearCrossEntropyShape(4096, 4096, 128256, trained=True),
    LoraShape(8192, 4096, (4096,), dropout=0.05),
    LoraShape(8192, 4096, (4096, 1024, 1024)),  # q, k, v of Llama 3 8B
    GroupedLoraShape(65536, 128, 2048, 1536),  # gate and up of Qwen3-30B-A3B, 8192 tokens
    CrossEntropyShape(4096, 128256),
    RmsNormShape(8192, 4096),  # this and the next two of Llama 3 8B
    SwigluShape(8192, 14336),
    RotaryShape(8192, 32, 8, 128),
    LoraShape(8192, 4096, (14336,)),
    LoraShape(8192, 4096, (14336,), nf4=True),
    LinearCrossEntropyShape(8192, 2048, 32000),
    LinearCrossEntropyShape(8192, 4096, 128256, logits="zipf"),
    RmsNormShape(2048, 8192),
    RmsNormShape(8192, 2048),
    SwigluShape(2048, 8192),
    LinearKLShape(4096, 2048, 4096, 128256, "jsd"),
    LinearKLShape(4096, 2048, 4096, 128256, trained=True),
)


def default_shapes(device_type: str) -> tuple[Shape, ...]:
    return _CPU_SHAPES if device_type == "cpu" else _GPU_SHAPES


def default_dtypes(device_type: str) -> tuple[str, ...]:
    return ("fp32", "bf16") if device_type == "cpu" else ("bf16",)


def providers_of(op: str, names: tuple[str, ...] | None = None) -> list[Provider]:
    """Return the providers of an operation in the order in which they are shown, only those of `names` if given."""
    return [p for p in PROVIDERS if p.op == op and (names is None or p.name in names)]


def expand(
    shapes: Sequence[Shape], operations: Sequence[str], dtypes: Sequence[str], masks: Sequence[float]
) -> Iterator[Case]:
    """Yield each shape of these operations in each dtype, with each mask if the operation has labels."""
    for shape in shapes:
        if shape.op in operations:
            for dtype in dtypes:
                for mask in masks if shape.has_labels else (0.0,):
                    yield Case(shape, dtype, mask)


# ---- shapes files


def read_shapes(path: Path) -> tuple[Shape, ...]:
    """Read a JSON list of objects: "op", and the fields of that operation's shape by name.

    Raises:
        BenchError: the file cannot be read, or an entry is not a shape.
    """
    entries = files.read_json(path)
    if not isinstance(entries, list) or not entries:
        raise BenchError(f"{path}: expected a list of shapes, got {json.dumps(entries)[:80]}")
    return tuple(shape_from(entry, f"{path}: entry {number}") for number, entry in enumerate(entries, 1))


def shape_entry(shape: Shape) -> dict[str, Any]:
    """Return the object that describes a shape in a shapes file and in a result."""
    return {"op": shape.op} | dataclasses.asdict(shape)


def shape_from(entry: Any, where: str) -> Shape:
    """Invert `shape_entry`; the message of a BenchError begins with `where`."""
    op = entry.get("op") if isinstance(entry, dict) else None
    if not isinstance(op, str) or op not in SHAPES:
        raise BenchError(
            f'{where}: expected an object with "op", one of {", ".join(SHAPES)}; got {json.dumps(entry)[:80]}'
        )
    cls = SHAPES[op]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {name: value for name, value in entry.items() if name != "op"}
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if unknown := sorted(values.keys() - fields.keys()):
        raise BenchError(f"{where}: {op} has no {unknown[0]!r}; it has {', '.join(fields)}")
    if missing := sorted(required - values.keys()):
        raise BenchError(f"{where}: {op} needs {missing[0]!r}")
    if isinstance(values.get("out_features"), int):
        values["out_features"] = [values["out_features"]]
    for name, value in values.items():
        expected, is_valid = _FIELD_CHECKS.get(name, (_COUNT, _is_count))
        if not is_valid(value):
            raise BenchError(f"{where}: {name}: expected {expected}, got {json.dumps(value)[:80]}")
    if "out_features" in values:
        values["out_features"] = tuple(values["out_features"])
    return cls(**values)


def _is_count(value: Any) -> bool:
    """Return True for an int that torch accepts as a size."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63


_COUNT: Final = "a count >= 1 and < 2**63"
_FIELD_CHECKS: Final[Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    "logits": ('"random" or "zipf"', lambda value: value in ("random", "zipf")),
    "divergence": (f"one of {', '.join(DIVERGENCES)}", lambda value: value in DIVERGENCES),
    "trained": ("true or false", lambda value: isinstance(value, bool)),
    "nf4": ("true or false", lambda value: isinstance(value, bool)),
    "dropout": (
        "a number in [0, 1)",
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1,
    ),
    "out_features": (
        f"{_COUNT}, or a list of them",
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_count, value)),
    ),
}
