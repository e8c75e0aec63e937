"""The step of a run on a GPU, rehearsed on fake tensors: where it computes, in which dtype, what the host waits for.

The numbers of kernel launches are those of today. A change that lowers one lowers it here; none may rise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rehearsing import Setup, rehearse
from sftx import Batch, LanguageModel, LossSum
from sftx_plugins.losses.masked_ce import MaskedCE
from step_record import H100, StepRecord, least

_SHAPE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {"model_type": "llama", **_SHAPE}
MIXTURE = {
    "model_type": "qwen3_moe", **_SHAPE, "head_dim": 16, "moe_intermediate_size": 64, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
CHECKPOINTING = {"train.gradient_checkpointing": True}
SELECTIVE = {**CHECKPOINTING, "train.selective_checkpointing": True}
FSDP2 = {"train.distributed": "fsdp2"}

CASES = {
    "lora, packed": (LLAMA, Setup(), 52, 104),
    "lora, padded": (LLAMA, Setup(("lora",)), 56, 97),
    "lora, padding_free": (LLAMA, Setup(("lora",), {"padded.padding_free": True}), 52, 104),
    "lora with dropout": (LLAMA, Setup(options={"lora.lora_dropout": 0.1}), 60, 114),
    "qlora": (LLAMA, Setup(("qlora", "packed")), 59, 111),
    "experts": (MIXTURE, Setup(), 76, 125),
    "experts, full": (MIXTURE, Setup(("packed",)), 63, 97),
    "full": (LLAMA, Setup(("packed",)), 39, 80),
    "full in bf16": (LLAMA, Setup(("packed",), {"train.optim": "adamw_bf16"}), 25, 62),
    "checkpointing": (LLAMA, Setup(options=CHECKPOINTING), 52, 155),
    "selective checkpointing": (LLAMA, Setup(options=SELECTIVE), 52, 123),
    "lora, fsdp2": (LLAMA, Setup(options=FSDP2, num_processes=8), 52, 105),
    "full, fsdp2": (LLAMA, Setup(("packed",), FSDP2, num_processes=8), 32, 77),
    "compiled": (LLAMA, Setup(options={"train.torch_compile": True}), 53, 114),
}
LOSS_AND_NORM = "the value of a tensor: sftx/trainer/trainer.py"
# transformers reads a padding mask on the host, twice a forward, to see whether it may be left out.
MASK = "the value of a tensor: transformers/masking_utils.py"


def launches(record: StepRecord, phase: str) -> int:
    """Returns the launches of one layer."""
    return sum(op.launches for op in record.ops if op.phase.name == phase and op.phase.layer == 1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "compiled" else name for name in CASES]
)
def test_a_step_computes_on_the_gpu_in_bf16_and_waits_once(name: str) -> None:
    config, setup, forward, backward = CASES[name]
    record = rehearse(config, setup)
    assert record.faults == []
    places = [wait.rpartition(":")[0] for wait in record.waits]
    assert places == ([MASK] * 2 if "padded" in name else []) + [LOSS_AND_NORM]
    assert launches(record, "forward") <= forward
    assert launches(record, "backward") <= backward


# --- deliberate faults --------------------------------------------------------------------------


class Faulty(MaskedCE):
    """The loss of a run, with something that a GPU should not be asked for."""

    def __init__(self, fault: Any) -> None:
        super().__init__()
        object.__setattr__(self, "fault", fault)

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        self.fault(lm, batch, out)  # type: ignore[attr-defined]
        return out


def read_a_value(lm: Any, batch: Batch, out: LossSum) -> None:
    out.sum.item()


def compute_on_the_host(lm: Any, batch: Batch, out: LossSum) -> None:
    weights_T = torch.arange(batch.labels_BT.shape[1]) / 2
    out.sum += 0 * weights_T.to(lm.device).sum()


def copy_the_head(lm: Any, batch: Batch, out: LossSum) -> None:
    out.sum += 0 * lm.head_weight.float().sum()


def multiply_in_fp32(lm: Any, batch: Batch, out: LossSum) -> None:
    with torch.autocast("cuda", enabled=False):
        states_TD = lm.embed(batch)[0].float()
        out.sum += 0 * (states_TD @ states_TD.T).sum()


def select_by_a_mask(lm: Any, batch: Batch, out: LossSum) -> None:
    out.sum += 0 * batch.labels_BT[batch.labels_BT > 0].sum()


@pytest.mark.parametrize(
    ("fault", "waits", "faults"),
    [
        (read_a_value, ["the value of a tensor"], []),
        (
            compute_on_the_host,
            ["a copy of memory of the host that is not pinned"],
            ["aten.arange.default computes on the host", "aten.div.Tensor computes on the host"],
        ),
        (copy_the_head, [], ["a weight of shape [512, 64] is copied to float32"]),
        (multiply_in_fp32, [], ["aten.mm.default multiplies in fp32"]),
        (select_by_a_mask, ["the number of elements that a mask selects"], []),
    ],
)
def test_a_fault_is_recorded_with_its_place(fault: Any, waits: list[str], faults: list[str]) -> None:
    record = rehearse(LLAMA, Setup(), loss=Faulty(fault))
    here = f"tests/trainer/test_rehearsal.py:{fault.__code__.co_firstlineno}"
    assert [wait.partition(": ")[0] for wait in record.waits[:-1]] == waits
    assert [one.partition(": ")[0] for one in record.faults] == faults
    for one in (*record.waits[:-1], *record.faults):
        assert abs(int(one.rpartition(":")[2]) - int(here.rpartition(":")[2])) <= 4
        assert one.rpartition(": ")[2].startswith("tests/trainer/test_rehearsal.py:")


def test_a_tensor_that_stays_on_the_host_stops_the_step() -> None:
    def leave(lm: Any, batch: Batch, out: LossSum) -> None:
        out.sum += (out.sum[None] * torch.ones(3)).sum()

    with pytest.raises(Exception, match=r"cuda:0.* cpu"):
        rehearse(LLAMA, Setup(), loss=Faulty(leave))


# --- what is counted ----------------------------------------------------------------------------


def test_a_step_is_counted_as_by_hand() -> None:
    """A layer's products, and the memory of its weights, from the shapes alone."""
    record = rehearse(LLAMA, Setup(("packed",), lengths=(64,)))
    T, D, F, H, K = 64, 64, 128, 64, 32
    weights = D * H + 2 * D * K + H * D + 3 * D * F
    ops = [op for op in record.ops if op.phase.name == "forward" and op.phase.layer == 1]
    assert sum(op.flops for op in ops) == 2 * T * weights + 4 * T * T * H // 2
    backward = [op for op in record.ops if op.phase.name == "backward" and op.phase.layer == 1]
    assert sum(op.flops for op in backward) == 4 * T * weights + 10 * T * T * H // 2
    num_bytes, seconds = least(ops, H100)
    assert sum(op.num_bytes for op in ops) > 3 * num_bytes
    assert 0 < seconds < sum(op.seconds(H100) for op in ops)
    parameters = 2 * (weights + 2 * D) + 2 * 512 * D + D
    assert record.peak["weights"] == pytest.approx(
        4 * parameters, abs=4 * D
    )  # and the frequencies of rotary embeddings
    assert record.peak["optimizer"] == pytest.approx(8 * parameters, abs=4 * 32)  # and the counts of steps
