"""Other people's implementations, as they are called in their own documentation and examples; and all providers.

Read in liger-kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels 0.6.5, unsloth 2026.10.9 and peft 0.21.
Unsloth comes last: importing it patches transformers and peft.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from sftx_kernels.bench.cases import Case
from sftx_kernels.bench.problems import SCALING, LoraProblem, LossProblem
from sftx_kernels.bench.providers import (
    OWN,
    TORCH,
    Prepared,
    Provider,
    head_leaves,
    logits_copy,
    logits_leaf,
    lora_leaves,
    needs_gpu,
    needs_half_on_gpu,
)


def _needs_hopper(case: Case, device: torch.device) -> str | None:
    if reason := needs_gpu(case, device):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 9 and not torch.version.hip else f"needs sm_90 or newer, this is sm_{major}{minor}"


def _needs_one_or_three(case: Case, device: torch.device) -> str | None:
    count = len(getattr(case.shape, "out_features", ()))
    return needs_gpu(case, device) or (None if count in (1, 3) else f"has no function for {count} linears")


def _from(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


# ---- cross-entropy on logits


def _liger_ce(problem: LossProblem) -> Prepared:
    """Overwrites the logits with their gradient, in the forward."""
    liger_cross_entropy = _from("liger_kernel.transformers.functional", "liger_cross_entropy")

    logits_NV, labels_N = logits_copy(problem), problem.labels_N
    return Prepared(lambda: (liger_cross_entropy(logits_NV, labels_N, reduction="sum"),), {"d_input": logits_NV})


def _quack_ce(*, inplace: bool) -> Callable[[LossProblem], Prepared]:
    def prepare(problem: LossProblem) -> Prepared:
        cross_entropy = _from("quack.cross_entropy", "cross_entropy")

        logits_NV, labels_N = logits_copy(problem) if inplace else logits_leaf(problem), problem.labels_N
        return Prepared(
            lambda: (cross_entropy(logits_NV, labels_N, reduction="sum", inplace_backward=inplace),),
            {"d_input": logits_NV},
        )

    return prepare


def _unsloth_ce(problem: LossProblem) -> Prepared:
    """Overwrites the logits with their gradient, in the backward. Takes [batch, length, vocab]."""
    fast_cross_entropy_loss = _from("unsloth.kernels.cross_entropy_loss", "fast_cross_entropy_loss")

    logits_NV, labels_1N = logits_copy(problem), problem.labels_N[None]
    return Prepared(lambda: (fast_cross_entropy_loss(logits_NV[None], labels_1N, n_items=1),), {"d_input": logits_NV})


# ---- cross-entropy on hidden rows and a head


def _liger_lce(problem: LossProblem) -> Prepared:
    liger_fused_linear_cross_entropy = _from("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")

    hidden_ND, weight_VD, leaves = head_leaves(problem)
    labels_N = problem.labels_N
    return Prepared(
        lambda: (liger_fused_linear_cross_entropy(hidden_ND, weight_VD, labels_N, reduction="sum"),), leaves
    )


def _cut_cross_entropy(problem: LossProblem) -> Prepared:
    """Skips blocks whose gradient is under eps / 32, its default, which its error shows."""
    linear_cross_entropy = _from("cut_cross_entropy", "linear_cross_entropy")

    hidden_ND, weight_VD, leaves = head_leaves(problem)
    labels_N = problem.labels_N
    return Prepared(lambda: (linear_cross_entropy(hidden_ND, weight_VD, labels_N, reduction="sum"),), leaves)


def _quack_lce(problem: LossProblem) -> Prepared:
    chunked_linear_cross_entropy = _from("quack.linear_cross_entropy", "chunked_linear_cross_entropy")

    hidden_ND, weight_VD, leaves = head_leaves(problem)
    labels_N = problem.labels_N
    return Prepared(lambda: (chunked_linear_cross_entropy(hidden_ND, weight_VD, labels_N, reduction="sum"),), leaves)


# ---- LoRA


def _peft(problem: LoraProblem) -> Prepared:
    """PEFT's LoRA layers, with A and B in the dtype of the base as for everyone here."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [str(number) for number in range(len(problem.weights))]
    rank = problem.lora_As[0].shape[0]
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), lora_dropout=problem.dropout, target_modules=names)
    linears = torch.nn.ModuleList()
    for weight_OK in problem.weights:
        linear = torch.nn.Linear(weight_OK.shape[1], weight_OK.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight_OK, requires_grad=False)
        linears.append(linear)
    layers: Any = inject_adapter_in_model(config, linears)
    leaves = lora_leaves(problem)
    for layer, A_RK, B_OR in zip(layers, leaves.lora_As, leaves.lora_Bs, strict=True):
        layer.lora_A["default"].weight = torch.nn.Parameter(A_RK.detach())
        layer.lora_B["default"].weight = torch.nn.Parameter(B_OR.detach())
    leaves = leaves._replace(
        lora_As=[layer.lora_A["default"].weight for layer in layers],
        lora_Bs=[layer.lora_B["default"].weight for layer in layers],
    )
    return Prepared(lambda: tuple(layer(leaves.x_MK) for layer in layers), leaves.named())


def _unsloth_lora(problem: LoraProblem) -> Prepared:
    """LoRA_W for one linear, LoRA_QKV for three; the latter not in place, which would overwrite x in each round."""
    single, grouped = (_from("unsloth.kernels.fast_lora", name) for name in ("LoRA_W", "LoRA_QKV"))

    leaves, dropout = lora_leaves(problem), problem.dropout or None
    linears: list[Any] = []
    for triple in zip(problem.weights, leaves.lora_As, leaves.lora_Bs, strict=True):
        linears += [triple[0], None, triple[1], triple[2], SCALING]

    def forward() -> tuple[Tensor, ...]:
        x_1MK = leaves.x_MK[None]  # it takes [batch, length, K]
        if len(problem.weights) == 1:
            return (single.apply(x_1MK, *linears, dropout),)
        outputs: tuple[Tensor, ...] = grouped.apply(x_1MK, *linears, False, dropout and (dropout,) * 3)
        return outputs

    return Prepared(forward, leaves.named())


PEERS: Final[tuple[Provider, ...]] = (
    Provider("liger-kernel", "cross-entropy", _liger_ce, "liger_kernel", "liger-kernel", needs_gpu),
    Provider("liger-kernel", "linear-cross-entropy", _liger_lce, "liger_kernel", "liger-kernel", needs_gpu),
    Provider(
        "cut-cross-entropy",
        "linear-cross-entropy",
        _cut_cross_entropy,
        "cut_cross_entropy",
        "cut-cross-entropy",
        needs_half_on_gpu,
    ),
    Provider("quack", "cross-entropy", _quack_ce(inplace=False), "quack", "quack-kernels", _needs_hopper),
    Provider("quack-inplace", "cross-entropy", _quack_ce(inplace=True), "quack", "quack-kernels", _needs_hopper),
    Provider("quack", "linear-cross-entropy", _quack_lce, "quack", "quack-kernels", _needs_hopper),
    Provider("peft", "lora", _peft, "peft", "peft"),
    Provider("unsloth", "cross-entropy", _unsloth_ce, "unsloth", "unsloth", needs_gpu),
    Provider("unsloth", "lora", _unsloth_lora, "unsloth", "unsloth", _needs_one_or_three),
)


def all_providers() -> tuple[Provider, ...]:
    return OWN + TORCH + PEERS


def providers_of(op: str, names: tuple[str, ...] | None = None) -> list[Provider]:
    """Those of an operation, in the order in which they are shown; of these names, if any are given."""
    return [p for p in all_providers() if p.op == op and (names is None or p.name in names)]
