"""What is measured: an operation at one size, and the least that any way of computing it must do and move.

The minimum counts the products that autograd's answer cannot do without, each operand read once and each result
written once. Ignored rows cost neither products nor reads, but their zero gradients are written; a frozen weight
gets no gradient. Work may move between the passes (a loss that makes its gradient in the forward has next to none
left in the backward), so only `both` compares providers; the parts say where the time goes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, get_args

import torch

from sftx_kernels.bench import BenchError, files
from sftx_kernels.gpu.launch import Work

Pass = Literal["forward", "backward", "both"]
PASSES: Final[tuple[Pass, ...]] = get_args(Pass)
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class CrossEntropyShape:
    """Logits [rows, vocab] and labels -> loss, gradient of the logits."""

    op: ClassVar = "cross-entropy"
    rows: int
    vocab: int
    logits: str = "random"  # or "zipf": the softmax follows Zipf's law, as that of a trained model nearly does

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocab}" + _if(self.logits == "zipf", " zipf")

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """Per logit 3 operations for the sum of exponentials (subtract, exp, add) and 3 for the gradient."""
        read, written = num_valid * self.vocab * itemsize, self.rows * self.vocab * itemsize
        flops, labels = 3 * num_valid * self.vocab, self.rows * 8
        return {
            "forward": Work(flops, read + labels),
            "backward": Work(flops, read + written + labels),
            "both": Work(2 * flops, read + written + labels),
        }


@dataclass(frozen=True)
class LinearCrossEntropyShape:
    """Hidden rows [rows, hidden], the head's weight [vocab, hidden] and labels -> loss, gradients."""

    op: ClassVar = "linear-cross-entropy"
    rows: int
    hidden: int
    vocab: int
    trained: bool = False  # whether the head gets a gradient
    logits: str = "random"

    def __str__(self) -> str:
        kind = "trained" if self.trained else "frozen"
        return f"{self.rows}x{self.hidden}x{self.vocab} {kind}" + _if(self.logits == "zipf", " zipf")

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """2MDV for the logits of the M rows that count, as much for dX, and for dW where the head trains."""
        product = 2 * num_valid * self.hidden * self.vocab
        weight = self.vocab * self.hidden * itemsize
        read = num_valid * self.hidden * itemsize + weight + self.rows * 8
        written = self.rows * self.hidden * itemsize + self.trained * weight
        back = (1 + self.trained) * product
        return {
            "forward": Work(product, read),
            "backward": Work(back, read + written),
            "both": Work(product + back, read + written),
        }


@dataclass(frozen=True)
class LoraShape:
    """x [rows, in_features] through linears of these out_features, each with its update of this rank."""

    op: ClassVar = "lora"
    rows: int
    in_features: int
    out_features: tuple[int, ...]  # several: linears that share x, as q, k and v do
    rank: int = 16
    dropout: float = 0.0

    def __str__(self) -> str:
        outs = "+".join(map(str, self.out_features))
        return f"{self.rows}x{self.in_features}x{outs} r{self.rank}" + _if(self.dropout, f" p{self.dropout:g}")

    def least(self, num_valid: int, itemsize: int) -> dict[Pass, Work]:
        """Forward x W^T, S = x A^T, S B^T; backward dY W, dS = dY B, dS A, dA = dS^T x, dB = dY^T S.

        x, dY and W are read once in each pass that needs them, S is neither read nor written (it is small).
        """
        M, K, R, outs, num = self.rows, self.in_features, self.rank, sum(self.out_features), len(self.out_features)
        base, down, up = 2 * M * K * outs, 2 * M * K * R * num, 2 * M * R * outs
        x, y, weight, lora = M * K, M * outs, outs * K, (num * K + outs) * R
        forward = Work(base + down + up, (x + weight + lora + y) * itemsize)
        backward = Work(base + 2 * down + 2 * up, (y + weight + lora + x + x + lora) * itemsize)
        both = Work(forward.flops + backward.flops, forward.num_bytes + backward.num_bytes)
        return {"forward": forward, "backward": backward, "both": both}


Shape = CrossEntropyShape | LinearCrossEntropyShape | LoraShape
SHAPES: Final[Mapping[str, type[Shape]]] = {cls.op: cls for cls in get_args(Shape)}
OPERATIONS: Final = tuple(SHAPES)


@dataclass(frozen=True)
class Case:
    shape: Shape
    dtype: str  # a key of DTYPES
    mask: float = 0.0  # the share of rows whose label is ignored

    @property
    def op(self) -> str:
        return self.shape.op

    @property
    def num_valid(self) -> int:
        return self.shape.rows - round(self.shape.rows * self.mask)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def least(self) -> dict[Pass, Work]:
        return self.shape.least(self.num_valid, self.torch_dtype.itemsize)

    def __str__(self) -> str:
        masked = "" if self.op == LoraShape.op else f", {self.mask:.0%} masked"
        return f"{self.op} {self.shape}, {self.dtype}{masked}"


# In order of importance: what does not fit a time budget is left out from the end.
_ON_CPU: Final[tuple[Shape, ...]] = (
    LinearCrossEntropyShape(1024, 1024, 32000),
    LoraShape(2048, 576, (1536,)),
    CrossEntropyShape(512, 32000),
)
_ON_GPU: Final[tuple[Shape, ...]] = (
    LinearCrossEntropyShape(8192, 4096, 128256),
    LoraShape(8192, 4096, (4096,)),
    CrossEntropyShape(8192, 32000),
    LinearCrossEntropyShape(4096, 4096, 128256, trained=True),
    LoraShape(8192, 4096, (4096,), dropout=0.05),
    LoraShape(8192, 4096, (4096, 1024, 1024)),  # q, k, v of Llama 3 8B
    CrossEntropyShape(4096, 128256),
    LoraShape(8192, 4096, (14336,)),
    LinearCrossEntropyShape(8192, 2048, 32000),
    LinearCrossEntropyShape(8192, 4096, 128256, logits="zipf"),
)


def default_shapes(device_type: str) -> tuple[Shape, ...]:
    return _ON_CPU if device_type == "cpu" else _ON_GPU


def default_dtypes(device_type: str) -> tuple[str, ...]:
    return ("fp32", "bf16") if device_type == "cpu" else ("bf16",)


def expand(
    shapes: Sequence[Shape], operations: Sequence[str], dtypes: Sequence[str], masks: Sequence[float]
) -> Iterator[Case]:
    """Each shape of these operations in each dtype with each mask; LoRA knows no mask."""
    for shape in shapes:
        if shape.op in operations:
            for dtype in dtypes:
                for mask in masks if shape.op != LoraShape.op else (0.0,):
                    yield Case(shape, dtype, mask)


def read_shapes(path: Path) -> tuple[Shape, ...]:
    """A JSON list of objects: "op", and the fields of that operation's shape by name.

    Raises:
        BenchError: the file cannot be read, or an entry is none of the shapes.
    """
    entries = files.read_json(path)
    if not isinstance(entries, list) or not entries:
        raise BenchError(f"{path}: expected a list of shapes, got {json.dumps(entries)[:80]}")
    return tuple(shape_from(entry, f"{path}: entry {number}") for number, entry in enumerate(entries, 1))


def shape_from(entry: Any, where: str) -> Shape:
    """The shape that an object of a shapes file, or of a result, describes; BenchError begins with `where`."""
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
        expected = _problem_with(name, value)
        if expected is not None:
            raise BenchError(f"{where}: {name}: expected {expected}, got {json.dumps(value)[:80]}")
    if "out_features" in values:
        values["out_features"] = tuple(values["out_features"])
    return cls(**values)


def shape_entry(shape: Shape) -> dict[str, Any]:
    """The inverse of `shape_from`."""
    return {"op": shape.op} | dataclasses.asdict(shape)


def _problem_with(name: str, value: Any) -> str | None:
    """What a field's value should have been, None if it is that."""
    if name == "logits":
        return None if value in ("random", "zipf") else '"random" or "zipf"'
    if name == "trained":
        return None if isinstance(value, bool) else "true or false"
    if name == "dropout":
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
        return None if fits else "a number in [0, 1)"
    if name == "out_features":
        fits = isinstance(value, list) and bool(value) and all(_is_count(size) for size in value)
        return None if fits else "a count >= 1 and < 2**63, or a list of them"
    return None if _is_count(value) else "a count >= 1 and < 2**63"


def _is_count(value: Any) -> bool:
    """Of those that torch can take as a size."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63


def _if(condition: object, text: str) -> str:
    return text if condition else ""
