"""Lets the RMSNorm modules of a transformers model compute by `sftx_kernels.rms_norm`, in fewer passes over memory.

Architectures define classes of their own. Which formula a class has is found by asking it: a small module of the class
is called once, and what `rms_norm` cannot give to the last digits stays as it is.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sftx_kernels import rms_norm

_EPS_NAMES: Final = ("variance_epsilon", "eps")


@dataclass(frozen=True)
class _Formula:
    eps_name: str
    """The attribute of a module that holds its epsilon."""
    weight_offset: float
    cast_before_weight: bool


def use_fused_norms(model: nn.Module) -> int:
    """Changes the forward of the model's RMSNorm modules, and returns the number of these modules."""
    count = 0
    for module in model.modules():
        kind: Any = type(module)
        formula = _formula(kind) if "RMSNorm" in kind.__name__ else None
        if formula is not None and "forward" not in vars(module):
            module.forward = types.MethodType(_forward_by(formula), module)
            count += 1
    return count


def _forward_by(formula: _Formula) -> Callable[[Any, Tensor], Tensor]:
    """Returns a forward method for modules with this formula."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        normed: Tensor = rms_norm(
            hidden_states,
            self.weight,
            getattr(self, formula.eps_name),
            weight_offset=formula.weight_offset,
            cast_before_weight=formula.cast_before_weight,
        )
        return normed

    return forward


@functools.cache
def _formula(kind: Any) -> _Formula | None:
    """Returns the formula of a class of modules, None if it is none of those that `rms_norm` knows."""
    if len(inspect.signature(kind.forward).parameters) != 2:  # such as those that also take a gate
        return None
    size, eps = 16, 0.25
    with unset_fake_temporarily(), torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            module: Any = kind(size, eps=eps).float()
            torch.manual_seed(0)
            x_ND = torch.randn(4, size)
            module.weight.copy_(torch.randn(size))
            expected_ND = module(x_ND)
            is_rounded_last = module(x_ND.bfloat16()).dtype == torch.bfloat16
        except Exception:  # a class of another kind may raise anything
            return None
        names = [name for name in _EPS_NAMES if getattr(module, name, None) == eps]
        if [name for name, _ in module.named_parameters()] != ["weight"] or not names:
            return None
        for offset in (0.0, 1.0):
            formula = _Formula(names[0], offset, not is_rounded_last)
            if torch.allclose(_forward_by(formula)(module, x_ND), expected_ND, rtol=1e-5, atol=1e-6):
                return formula
    return None
