"""Trainable rows for single tokens in an otherwise frozen embedding and head, in PEFT's files as PEFT writes them.

Dimensions: V vocabulary, D hidden, A tokens whose rows are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

KEY = "token_adapter.trainable_tokens_delta"
"""PEFT's name of the rows. Despite the name they are the rows themselves, not a difference that is added to them."""


class TokenRows(nn.Module):
    """A parametrisation of a frozen weight [V, D] that replaces some of its rows with trained ones, [A, D] in fp32."""

    def __init__(self, weight_VD: Tensor, token_ids: Sequence[int]) -> None:
        super().__init__()
        self.enabled = True
        ids_A = torch.tensor(token_ids, device=weight_VD.device)
        self.register_buffer("ids_A", ids_A, persistent=False)
        self.rows_AD = nn.Parameter(weight_VD.detach()[ids_A].to(torch.float32, copy=True))

    ids_A: Tensor

    def forward(self, weight_VD: Tensor) -> Tensor:
        if not self.enabled:
            return weight_VD
        return weight_VD.index_copy(0, self.ids_A, self.rows_AD.to(weight_VD.dtype))


def attach(model: PreTrainedModel, token_ids: Mapping[str, Sequence[int]]) -> dict[str, TokenRows]:
    """Make rows of the embedding and of the output head trainable, by the module's path, and return them in this way.

    Tied weights share their rows, which have the embedding's name. A module that trains in full is left alone.
    """
    added: dict[str, TokenRows] = {}
    head = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight
    for path, ids in token_ids.items():
        module: Any = model.get_submodule(path)
        if module.weight.requires_grad:
            continue
        added[path] = TokenRows(module.weight, ids)
        parametrize.register_parametrization(module, "weight", added[path])
        if is_tied and module is not head:
            parametrize.register_parametrization(head, "weight", added[path])
    return added


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Write the rows into the frozen weights and remove the parametrisations."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if parametrize.is_parametrized(module, "weight"):
            parametrisation: Any = cast(Any, module).parametrizations.weight
            weight_VD, rows = parametrisation.original, parametrisation[0]
            weight_VD[rows.ids_A] = rows.rows_AD.to(weight_VD.dtype)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
