"""Lets modules of a transformers model compute by our operations, in fewer passes over memory.

These are RMSNorm, the rotary embedding within attention, and, on a GPU, the activation of a gated MLP. Architectures
define classes of their own. Which formula a class has is found by asking it: it is called once on small tensors, and a
class whose results our operation does not give to the last digits stays as it is.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sftx_kernels import rms_norm, rotary, swiglu

_EPS_NAMES: Final = ("variance_epsilon", "eps")
_ROTARY: Final = "apply_rotary_pos_emb"
"""The name of the function in transformers' modules."""

_Forward = Callable[..., Any]


def use_fused_modules(model: nn.Module) -> int:
    """Changes the forward of modules whose formula is known, and returns the number of these modules."""
    count = 0
    for module in model.modules():
        kind: Any = type(module)
        if "forward" in vars(module):
            continue
        forward = _norm_forward(kind) or _attention_forward(kind)
        activation = None if forward else _activation_of(module)
        if activation is not None:
            forward = _mlp_by(activation, kind.forward)
        if forward is not None:
            module.forward = types.MethodType(forward, module)
            count += 1
    return count


@contextmanager
def _asking() -> Iterator[None]:
    """A context for small tensors with values, on the CPU, that changes no random number of the run."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


def _are_close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- RMSNorm


@functools.cache
def _norm_forward(kind: Any) -> _Forward | None:
    """Returns a forward for a class of norms, None if its formula is none of those that `rms_norm` knows."""
    if "RMSNorm" not in kind.__name__ or len(inspect.signature(kind.forward).parameters) != 2:  # others take a gate too
        return None
    size, eps = 16, 0.25
    with _asking():
        try:
            module = kind(size, eps=eps).float()
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
            forward = _norm_by(names[0], offset, cast_before_weight=not is_rounded_last)
            if _are_close(forward(module, x_ND), expected_ND):
                return forward
    return None


def _norm_by(eps_name: str, weight_offset: float, *, cast_before_weight: bool) -> _Forward:
    def forward(self: Any, hidden_states: Tensor) -> Any:
        eps = getattr(self, eps_name)
        return rms_norm(
            hidden_states, self.weight, eps, weight_offset=weight_offset, cast_before_weight=cast_before_weight
        )

    return forward


# ---- the rotary embedding


@functools.cache
def _attention_forward(kind: Any) -> _Forward | None:
    """Returns the forward of a class of attention with our rotary embedding in the place of its module's function."""
    forward: Any = inspect.unwrap(kind.forward)
    theirs = getattr(forward, "__globals__", {}).get(_ROTARY)
    if theirs is None or _ROTARY not in forward.__code__.co_names:
        return None
    with _asking():
        query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
        angles = torch.randn(2, 5, 4).repeat(1, 1, 2)
        try:
            expected = theirs(query, key, angles.cos(), angles.sin())
            ours = rotary(query, key, angles.cos(), angles.sin())
        except Exception:  # a function of another kind may raise anything
            return None
        if not all(map(_are_close, ours, expected)):
            return None

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:
        return theirs(q, k, cos, sin, *others, **named) if others or named else rotary(q, k, cos, sin)

    # The same code with another meaning of one name: other models of this architecture are left alone.
    changed = types.FunctionType(
        forward.__code__,
        forward.__globals__ | {_ROTARY: apply},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


# ---- the activation of a gated MLP


_Activation = Literal["silu", "gelu_tanh"]
_ACTIVATIONS: Final[Mapping[_Activation, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def _activation_of(module: nn.Module) -> _Activation | None:
    """Returns the name, for `swiglu`, of a gated MLP's activation; None for any other module."""
    kind: Any = type(module)
    act: Any = getattr(module, "act_fn", None)
    if act is None or not _is_gated_mlp(kind):
        return None
    with _asking():
        x = torch.randn(64)
        return next((name for name, function in _ACTIVATIONS.items() if _are_close(act(x), function(x))), None)


class _Times(nn.Module):
    """Stands for a linear layer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@functools.cache
def _is_gated_mlp(kind: Any) -> bool:
    """Returns whether modules of a class compute down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    with _asking():
        x = torch.randn(4, 8)
        try:
            module = kind.__new__(kind)
            nn.Module.__init__(module)
            module.gate_proj, module.up_proj, module.down_proj = _Times(0.5), _Times(2.0), _Times(3.0)
            module.act_fn = nn.SiLU()
            return _are_close(module(x), 3 * (F.silu(0.5 * x) * (2 * x)))
        except Exception:  # a class of another kind may raise anything
            return False


def _mlp_by(activation: _Activation, theirs: _Forward) -> _Forward:
    def forward(self: Any, x: Tensor) -> Any:
        # On a CPU torch's own two operations are as fast, for they keep the activation that ours computes again.
        if not x.is_cuda:
            return theirs(self, x)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), activation=activation))

    return forward
