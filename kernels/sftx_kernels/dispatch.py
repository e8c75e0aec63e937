"""Which implementation of an operation runs, and why: a function of device, dtype and what was asked.

- `torch`: plain torch. Runs everywhere, in every dtype, and is what the others are tested against.
- `triton`: the kernels of `sftx_kernels.gpu`, with the large products left to torch (cuBLAS).
- `triton-fused`: for `lora_linear` alone, the large product as a Triton kernel too.

The argument `backend` of an operation asks for one, else the environment variable SFTX_KERNELS does: a backend
(`SFTX_KERNELS=torch`) or one for each operation (`SFTX_KERNELS=lora_linear=triton-fused,cross_entropy=torch`).
What was asked for and cannot be is a ValueError; where nothing was asked, a GPU that runs plain torch says so once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch

from sftx_kernels.checks import error

ENVIRONMENT: Final = "SFTX_KERNELS"
AUTO: Final = "auto"
BACKENDS: Final[Mapping[str, tuple[str, ...]]] = {
    "cross_entropy": ("torch", "triton"),
    "lora_linear": ("torch", "triton", "triton-fused"),
    "nf4": ("torch", "triton"),
}
"""The backends of each operation. `linear_cross_entropy` has those of `cross_entropy`, which it runs on."""

_LOGGER = logging.getLogger("sftx_kernels")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Decision(NamedTuple):
    backend: str
    reason: str
    forced: bool  # by the caller or the environment


def decide(op: str, device: torch.device, dtype: torch.dtype, *, asked: str | None = None) -> Decision:
    """The backend for one call of `op` (a key of BACKENDS) whose products run in `dtype`.

    Called inside custom ops alone where torch.compile is at work, which need not look into it then.

    Raises:
        ValueError: `asked`, or SFTX_KERNELS, names no backend of `op`, or one that cannot run this call.
    """
    return _decide(op, device, dtype, asked, os.environ.get(ENVIRONMENT, ""), interpreting())


@functools.lru_cache(maxsize=1024)  # it is asked at every call of every layer
def _decide(
    op: str, device: torch.device, dtype: torch.dtype, asked: str | None, environment: str, interpreting: bool
) -> Decision:
    name, source = _asked(op, asked, environment)
    obstacle = _obstacle(device, dtype, interpreting)
    if name == AUTO:
        if obstacle is None and device.type == "cpu":
            return Decision("torch", "CPU tensors; Triton's interpreter runs only when asked for", False)
        if obstacle is None:
            return Decision("triton", f"{device.type} tensors of {dtype}", False)
        if device.type == "cuda":
            _LOGGER.warning("%s runs in plain torch on this GPU: %s", op, obstacle)  # once, for the answer is kept
        return Decision("torch", obstacle, False)
    if obstacle is not None and name != "torch":
        raise error("backend", f"'torch' ({obstacle})", f"{name!r} from {source}")
    return Decision(name, f"asked for by {source}", True)


def _asked(op: str, asked: str | None, environment: str) -> tuple[str, str]:
    """(backend or "auto", who asked)"""
    if asked is not None:
        if asked not in (AUTO, *BACKENDS[op]):
            raise error("backend", f"one of {', '.join((AUTO, *BACKENDS[op]))}", repr(asked))
        return asked, "backend"
    name = AUTO
    for part in filter(None, (part.strip() for part in environment.split(","))):
        for_op, separator, backend = part.rpartition("=")
        if separator and for_op not in BACKENDS:
            raise error(ENVIRONMENT, f"an operation of {', '.join(BACKENDS)} before =", repr(for_op))
        known = BACKENDS[for_op] if separator else {b for backends in BACKENDS.values() for b in backends}
        if backend not in (AUTO, *known):
            raise error(ENVIRONMENT, f"a backend, or operation=backend, of {dict(BACKENDS)}", repr(environment))
        if for_op == op or (not separator and backend in (AUTO, *BACKENDS[op])):
            name = backend
    return name, ENVIRONMENT


def _obstacle(device: torch.device, dtype: torch.dtype, interpreting: bool) -> str | None:
    """Why Triton cannot run this, None if it can."""
    if not has_triton():
        return "triton is not installed"
    if dtype not in _DTYPES:
        return f"{dtype} has no kernel"
    if device.type == "cpu" and not interpreting:
        return "CPU tensors, and TRITON_INTERPRET is not set"
    if device.type not in ("cpu", "cuda"):
        return f"{device.type} tensors"
    return None


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for, which runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
