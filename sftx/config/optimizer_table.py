"""The table of optimizers that `train.optim` may name: the only list of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """The properties of an optimizer that the configuration, the trainer and the memory plan need."""

    name: str
    factory: str
    """`module:function` that makes the optimizers of a run from a TrainConfig and its trainable parameters."""
    aliases: tuple[str, ...] = ()
    """Names that transformers has for it."""
    state_bytes: float
    """Bytes of optimizer state for each trained parameter; of most parameters, where it treats some differently."""
    has_momentum: bool = False
    """True when it reads `train.momentum`."""
    elementwise: bool = False
    """True when it updates every element from that element's gradient and state alone, so that FSDP's shards of a
    parameter can be updated one by one."""
    bf16_weights: bool = False
    """True when the weights it trains are kept in bfloat16."""
    needs_gpu: bool = False


_FACTORIES: Final = "sftx.trainer.optimizers"

OPTIMIZERS: Final[Mapping[str, OptimizerSpec]] = {
    spec.name: spec
    for spec in (
        OptimizerSpec(
            name="adamw",
            factory=f"{_FACTORIES}:make_adamw",
            aliases=("adamw_torch", "adamw_torch_fused"),
            state_bytes=8,
            elementwise=True,
        ),
        OptimizerSpec(
            name="adamw_8bit",
            factory=f"{_FACTORIES}:make_bitsandbytes_adamw",
            aliases=("adamw_bnb_8bit",),
            state_bytes=2,
        ),
        OptimizerSpec(
            name="paged_adamw",
            factory=f"{_FACTORIES}:make_bitsandbytes_adamw",
            aliases=("paged_adamw_32bit",),
            state_bytes=8,
            needs_gpu=True,
        ),
        OptimizerSpec(
            name="paged_adamw_8bit",
            factory=f"{_FACTORIES}:make_bitsandbytes_adamw",
            state_bytes=2,
            needs_gpu=True,
        ),
        # A factored second moment: 4 (rows + columns) bytes for a matrix.
        OptimizerSpec(name="adafactor", factory=f"{_FACTORIES}:make_adafactor", state_bytes=0.1),
        OptimizerSpec(
            name="lion",
            factory=f"{_FACTORIES}:make_lion",
            aliases=("lion_32bit",),
            state_bytes=4,
            elementwise=True,
        ),
        # 4 bytes with momentum.
        OptimizerSpec(
            name="sgd",
            factory=f"{_FACTORIES}:make_sgd",
            state_bytes=0,
            has_momentum=True,
            elementwise=True,
        ),
        # 4 bytes for the matrices of the layers, 8 for the rest, which AdamW trains.
        OptimizerSpec(name="muon", factory=f"{_FACTORIES}:make_muon", state_bytes=4, has_momentum=True),
        # First moment and low bits of the weight 2 bytes each, second moment 4. FSDP's shards are untested with it.
        OptimizerSpec(name="adamw_bf16", factory=f"{_FACTORIES}:make_split_adamw", state_bytes=8, bf16_weights=True),
    )
}

ALIASES: Final[Mapping[str, str]] = {alias: spec.name for spec in OPTIMIZERS.values() for alias in spec.aliases}
"""transformers' names of optimizers to the ones used here."""


def names_where(attribute: str) -> str:
    """Return the names of the optimizers whose `attribute` is true, as prose: `adamw, sgd or lion`."""
    *others, last = [spec.name for spec in OPTIMIZERS.values() if getattr(spec, attribute)]
    return f"{', '.join(others)} or {last}" if others else last


def leaner_than(name: str) -> str | None:
    """Return the optimizer to try when there is no memory for the state of `name`: one with hardly any, or None."""
    lean = (spec.name for spec in OPTIMIZERS.values() if spec.state_bytes < min(1, OPTIMIZERS[name].state_bytes))
    return next(lean, None)
