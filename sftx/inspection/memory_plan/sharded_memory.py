"""Turn memory snapshots of one process that holds the whole model into those of one of several processes.

Under `fsdp2` (torch's `fully_shard`) the weights of a layer are gathered into one buffer and copied out of it while the
previous layer still computes and its buffer is not freed yet; gradients take the same way back. Everything outside the
layers, embedding and head included, is one group, which is unsharded from the beginning of a step to its end. So the
peak may be at one of the ends of a step, where the buffer and the copies of this group, and at its end also its
gradients, are unsharded at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from sftx.inspection.memory_plan.dry_run import ModelSize
from sftx.inspection.memory_plan.memory_tracker import MemorySnapshot

Snapshots: TypeAlias = Mapping[str, Sequence[MemorySnapshot]]
"""The peaks of "the update", "forward and backward", and with held-out rows "the evaluation" and "the answers"."""
ProcessMemory: TypeAlias = tuple[str, dict[str, int]]
"""A part of a step, and the bytes by kind that one process needs in it."""


def single_process_memory(snapshots: Snapshots) -> Iterator[ProcessMemory]:
    for when, peaks in snapshots.items():
        for peak in peaks:
            yield when, dict(peak.items())


def ddp_memory(snapshots: Snapshots, size: ModelSize) -> Iterator[ProcessMemory]:
    """Under `ddp`, gradients are views of buckets, which are allocated all the time."""
    for when, peaks in snapshots.items():
        for peak in peaks:
            yield when, dict(peak.items(), gradients=size.trainable_bytes)


def fsdp2_memory(
    snapshots: Snapshots, size: ModelSize, num_ranks: int, *, gathered_itemsize: int
) -> Iterator[ProcessMemory]:
    """Yield the memory under `fsdp2`, with the kind `gathered` for buffers and copies of unsharded weights.

    `gathered_itemsize` is the number of bytes of a trained weight of a layer as it is gathered and computed with; its
    shard has 4. With adapters, the frozen base is sharded as it is, and every process has all that the adapters train.
    """
    has_adapters = size.has_adapters
    replicated = size.trainable_bytes if has_adapters else 0
    outside, layer = size.sharded_outside_bytes, size.sharded_layer_bytes
    gathered_layer = layer if has_adapters else layer * gathered_itemsize // 4
    # A layer that computes, the copies of the next one and their buffer; in backward also a layer's gradients in the
    # computing dtype and their fp32 buffer.
    gathered = outside + 3 * gathered_layer + (0 if has_adapters else gathered_layer + layer)

    def local(num_bytes: int) -> int:
        """Return this process's part of gradients or optimizer state."""
        return num_bytes if has_adapters else math.ceil(num_bytes / num_ranks)

    def process_memory(peak: MemorySnapshot, gradients: int, gathered: int) -> dict[str, int]:
        weights = replicated + math.ceil((peak["weights"] - replicated) / num_ranks)
        optimizer = local(peak["optimizer"])
        return dict(peak.items(), weights=weights, gradients=gradients, optimizer=optimizer, gathered=gathered)

    for peak in snapshots["the update"]:
        yield "the update", process_memory(peak, local(peak["gradients"]), 0)
    for peak in snapshots["forward and backward"]:
        gradients = peak["gradients"]
        # The head's gradients come first; they stay unsharded until those of its group, the embedding's, are complete.
        unsharded = min(gradients, size.trained_outside_bytes - size.trained_embedding_bytes)
        yield "forward and backward", process_memory(peak, unsharded + local(gradients - unsharded), gathered)
    for peak in snapshots.get("the evaluation", ()):
        yield "the evaluation", process_memory(peak, local(peak["gradients"]), gathered)
    for peak in snapshots.get("the answers", ()):
        # Each process answers questions of its own, with all parameters.
        yield "the answers", process_memory(peak, local(peak["gradients"]), peak["weights"] - replicated)
    smallest = min(snapshots["forward and backward"], key=lambda peak: sum(peak.values()))
    ends = process_memory(smallest, local(size.trainable_bytes), 2 * outside + size.trained_outside_bytes)
    yield "gathering", ends | {"activations": 0, "head": 0}
