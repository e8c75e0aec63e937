"""Loads each base model once for several adapters, which get modules of their own over the same weights."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sftx.model import names
from sftx.model.load import load_model
from sftx.model.quantised import find_quantised, quantize_of
from sftx.types import Adapter, ModelSpec


class SharedBases:
    """The bases of several models. `load` takes the place of `load_model`.

    What it returns is a model of its own, to which adapters of any kind attach, but for the memory of its weights.
    So nothing may write into a frozen weight: no such model can be merged.
    """

    def __init__(self) -> None:
        self._bases: dict[Hashable, PreTrainedModel] = {}
        self._users: dict[Hashable, tuple[str, list[PreTrainedModel]]] = {}

    def load(
        self, spec: ModelSpec, adapters: Sequence[Adapter], *, dtype: torch.dtype, device: torch.device
    ) -> PreTrainedModel:
        """Return modules over the weights of a base that was loaded before in the same way, or load it.

        Raises ModelError.
        """
        name = names.absolute(spec.name)
        key = (name, spec.trust_remote_code, spec.new_token_ids, dtype, device, *_quantised(spec, adapters))
        if key not in self._bases:
            self._bases[key] = load_model(spec, adapters, dtype=dtype, device=device)
        model = _with_shared_weights(self._bases[key])
        described = f"{name} in {str(dtype).removeprefix('torch.')}"
        self._users.setdefault(key, (described, []))[1].append(model)
        return model

    @property
    def users(self) -> list[tuple[str, list[PreTrainedModel]]]:
        """Return each base that was loaded, in words, and the models that have its weights."""
        return list(self._users.values())


def _quantised(spec: ModelSpec, adapters: Sequence[Adapter]) -> list[Hashable]:
    """Return what tells the layers apart that adapters quantise: where they are, of which kind, and by whom."""
    replaced = find_quantised(spec.skeleton, quantize_of(adapters))
    makers = [type(adapter) for adapter in adapters] if replaced else []
    return [*makers, *((path, *_structure(module)) for path, module in replaced.items())]


def _structure(module: nn.Module) -> list[Hashable]:
    """Return the kinds and settings of a module's parts, and the dtypes and shapes of its tensors."""
    facts: list[Hashable] = []
    for name, part in module.named_modules():
        settings = vars(part).items()
        plain = ((key, value) for key, value in settings if isinstance(value, int | float | str | torch.dtype))
        facts.append((name, type(part), *plain))
    tensors: dict[str, Tensor] = module.state_dict()
    return [*facts, *((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())]


def _with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the model's modules whose parameters and persistent buffers have the memory of its own.

    They are other objects, so that an adapter may give one of them other values, or require its gradient. Tied weights
    stay tied.
    """
    tensors: dict[str, Tensor] = cast(Any, model).state_dict(keep_vars=True)
    memo: dict[int, Any] = {id(tensor): _shared(tensor) for tensor in tensors.values()}
    return copy.deepcopy(model, memo)


def _shared(tensor: Tensor) -> Tensor:
    same = tensor.detach()
    return nn.Parameter(same, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else same
