"""Advises which option to change, and to what value, when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from sftx.config.optimizers import leaner_than
from sftx.config.options import TrainConfig
from sftx.types import Batch

_SAME: Final = "the same run, which --resume goes on with"


def of_step(config: TrainConfig, batches: Sequence[Batch]) -> str:
    """Return what did not fit in forward or backward, and the first change that keeps the update the same."""
    largest = max(batches, key=lambda batch: batch.input_ids_BT.numel())
    rows, length = largest.input_ids_BT.shape
    return f"a micro-batch of {_counted(rows, 'row')} of {length} tokens; {_remedy(config, largest)}"


def _remedy(config: TrainConfig, batch: Batch) -> str:
    if config.micro_batch_size > 1:
        return fewer_rows(config)
    if not config.gradient_checkpointing:
        return f"set --gradient-checkpointing, which recomputes layers in the backward pass: {_SAME}"
    if config.selective_checkpointing:
        return f"leave selective_checkpointing out, which keeps several results of each layer: {_SAME}"
    longest = batch.input_ids_BT.shape[1]
    documents = 1 if batch.cu_seqlens is None else len(batch.cu_seqlens) - 1
    if documents > 1:
        return (
            f"let a packed row hold fewer tokens (this one has {longest}, in {documents} documents): "
            f"--set packed.length={max(batch.max_seqlen, longest // 2)}"
        )
    return f"lower data.max_length (this row has {longest} tokens): --max-length {max(2, longest // 2)}"


def fewer_rows(config: TrainConfig) -> str:
    """Return the options for fewer rows in a micro-batch and the same rows in a step, which gives the same update."""
    rows = config.micro_batch_size
    fewer = next(rows // divisor for divisor in range(2, rows + 1) if rows % divisor == 0)
    share = "half" if rows == 2 * fewer else f"1/{rows // fewer} of"
    return (
        f"set --train-batch-size {config.rows_per_step} --per-device-train-batch-size {fewer} (now {rows}), {share} "
        f"the memory for rows: {_SAME}"
    )


def of_optimizer(config: TrainConfig, parameters: Sequence[Tensor]) -> str:
    """Return what to change when there is no memory for the optimizer's state, which the first step allocates."""
    num_trained = sum(parameter.numel() for parameter in parameters)
    leaner = leaner_than(config.optim)
    return (
        f"the state of optim {config.optim} for {num_trained:,} trained parameters; train fewer, as an adapter does "
        "(--plugin lora)" + (f", or set --optim {leaner}, which needs less state" if leaner else "")
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
