"""Stacked experts that train multiply in autocast's dtype, as linear layers do.

Autocast does not cover torch's grouped products, and transformers casts their inputs to the dtype of the weights: fp32
experts would multiply in fp32, on a GPU in a loop over the experts whose sizes the host waits for. With bf16 weights,
such as those of a frozen base, nothing changes.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import moe

NAME: Final = "sftx_grouped_mm"
"""The name under which our experts are registered with transformers."""
_OWN: Final = "grouped_mm"
"""The name of transformers' own, which ours calls."""


class _Cast:
    """The module of some experts, whose weights are cast when they are read."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


def experts_forward(module: nn.Module, hidden_states: Tensor, *arguments: Tensor) -> Tensor:
    """Returns the weighted sum of the chosen experts' results, [T, H] in the dtype of `hidden_states`, also [T, H]."""
    device_type = hidden_states.device.type
    experts: Any = module
    if torch.is_autocast_enabled(device_type):
        experts = _Cast(module, torch.get_autocast_dtype(device_type))
    return moe.grouped_mm_experts_forward(experts, hidden_states, *arguments)


moe.ExpertsInterface.register(NAME, experts_forward)


def use_autocast(model: PreTrainedModel) -> None:
    """Makes the experts of a mixture that transformers multiplies group by group follow autocast."""
    if getattr(model.config.get_text_config(), "_experts_implementation", None) == _OWN:
        model.set_experts_implementation(NAME)
