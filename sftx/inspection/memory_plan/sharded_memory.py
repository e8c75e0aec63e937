"""What one process alone would need becomes what one of several needs.

Under `fsdp2` (torch's `fully_shard`) a layer's weights come together in one buffer and are copied out of it, while the
layer before is at work and its own buffer is not given back yet; gradients go the same way back. What lies outside of
the layers, embedding and head among it, is one group, whole from the step's begin to its end. So the ends of a step
can be its peak: there the buffer and the copies of this group, and at the end its gradients, are whole at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from sftx.inspection.memory_plan.dry_run import Counts, Moment

Moments: TypeAlias = Mapping[str, Sequence[Moment]]
"""What a process is at, and the bytes by kind that it needs then."""
Pair: TypeAlias = tuple[str, dict[str, int]]


def of_one(moments: Moments) -> Iterator[Pair]:
    for when, found in moments.items():
        for moment in found:
            yield when, dict(moment.items())


def of_ddp(moments: Moments, counts: Counts) -> Iterator[Pair]:
    """Gradients are views of buckets, which are there all the time."""
    for when, found in moments.items():
        for moment in found:
            yield when, dict(moment.items(), gradients=counts.trainable_bytes)


def of_fsdp2(moments: Moments, counts: Counts, num_ranks: int, *, sent_itemsize: int) -> Iterator[Pair]:
    """`sent_itemsize`: bytes of a weight of a layer that trains, as it is sent and computed with (kept are 4)."""
    with_adapters = counts.num_trainable < counts.num_parameters  # what they train is whole in every process
    kept = counts.trainable_bytes if with_adapters else 0
    outside, layer = counts.shared_outside, counts.shared_layer
    sent = layer if with_adapters else layer * sent_itemsize // 4
    # A layer at work, the next one's copies and their buffer; going back, gradients as computed and their fp32 buffer.
    at_work = outside + 3 * sent + (0 if with_adapters else sent + layer)

    def own(of_all: int) -> int:
        return of_all if with_adapters else math.ceil(of_all / num_ranks)

    def held(moment: Moment, gradients: int, gathered: int) -> dict[str, int]:
        weights = kept + math.ceil((moment["weights"] - kept) / num_ranks)
        state = own(moment["optimizer"])
        return dict(moment.items(), weights=weights, gradients=gradients, optimizer=state, gathered=gathered)

    for moment in moments["the update"]:
        yield "the update", held(moment, own(moment["gradients"]), 0)
    for moment in moments["forward and backward"]:
        gradients = moment["gradients"]
        not_sent_yet = 0 if with_adapters else min(gradients, outside - counts.embedding)  # of the head, which is first
        yield "forward and backward", held(moment, not_sent_yet + own(gradients - not_sent_yet), at_work)
    least = min(moments["forward and backward"], key=lambda moment: sum(moment.values()))
    ends = held(least, own(counts.trainable_bytes), (2 if with_adapters else 3) * outside)
    yield "gathering", ends | {"activations": 0, "head": 0}
