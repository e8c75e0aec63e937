"""Advises which option to change, and to what value, when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from sftx.assembly.stages.optimizer_stages import OptimizerStage
from sftx.config.named_plugins import leaner_than
from sftx.config.options import TrainConfig
from sftx.errors import counted
from sftx.types import Batch

_SAME: Final = "the update stays the same, so --resume can continue the run"


def step_advice(config: TrainConfig, batches: Sequence[Batch]) -> str:
    """Return what did not fit in forward or backward, and the first change that keeps the update the same."""
    largest = max(batches, key=lambda batch: batch.input_ids_BT.numel())
    rows, length = largest.input_ids_BT.shape
    return f"a micro-batch of {counted(rows, 'row')} of {counted(length, 'token')}; {_remedy(config, largest)}"


def _remedy(config: TrainConfig, batch: Batch) -> str:
    if (rows := config.micro_batch_size) > 1:
        fewer = next(rows // divisor for divisor in range(2, rows + 1) if rows % divisor == 0)
        share = "half" if rows == 2 * fewer else f"1/{rows // fewer} of"
        return (
            f"set --train-batch-size {config.rows_per_step} --per-device-train-batch-size {fewer} (now {rows}), "
            f"{share} the memory for rows, and leave gradient_accumulation_steps out: {_SAME}"
        )
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


def optimizer_advice(optimizer: OptimizerStage, parameters: Sequence[Tensor]) -> str:
    """Return what to change when there is no memory for the optimizer's state, which the first step allocates."""
    num_trained = sum(parameter.numel() for parameter in parameters)
    leaner = leaner_than(optimizer.state_bytes)
    return (
        f"the state of optim {optimizer.name} for {num_trained:,} trained parameters; train fewer, as an adapter does "
        "(--plugin lora)" + (f", or set --optim {leaner}, which needs less state" if leaner else "")
    )
