"""`decide` chooses an operation's implementation from the device, the dtype and what the caller requests.

- `torch`: plain torch. It runs everywhere, in every dtype, and is the reference in the tests.
- `triton`: the kernels of `sftx_kernels.triton`; large matrix products stay with torch (cuBLAS).

An operation's argument `backend` requests one; without it the environment variable SFTX_KERNELS does: a backend
(`SFTX_KERNELS=torch`) or one for each operation (`SFTX_KERNELS=lora_linear=torch,cross_entropy=triton`). A requested
backend that cannot run the call is a ValueError. With nothing requested, a call on a GPU that has to run in plain torch
logs one warning.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Final, NamedTuple

import torch

from sftx_kernels.checks import error

ENVIRONMENT: Final = "SFTX_KERNELS"
AUTO: Final = "auto"
BACKENDS: Final = ("torch", "triton")
OPERATIONS: Final = ("cross_entropy", "linear_kl", "lora_linear", "nf4", "rms_norm", "rotary", "swiglu")
"""These operations have a backend of their own; `linear_cross_entropy` runs on that of `cross_entropy`."""

_LOGGER = logging.getLogger("sftx_kernels")
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Decision(NamedTuple):
    backend: str
    reason: str
    forced: bool  # requested by the caller or the environment


def decide(op: str, device: torch.device, dtype: torch.dtype, *, requested: str | None = None) -> Decision:
    """Return the backend for one call of `op` (one of OPERATIONS) whose products run in `dtype`.

    Operations that torch.compile traces call this only inside custom ops, which the compiler does not trace.

    Raises:
        ValueError: `requested`, or SFTX_KERNELS, is not a backend, or one that cannot run this call.
    """
    return _decide(op, device, dtype, requested, os.environ.get(ENVIRONMENT, ""), is_interpreting())


@functools.lru_cache(maxsize=1024)  # every call of every layer asks
def _decide(
    op: str, device: torch.device, dtype: torch.dtype, requested: str | None, environment: str, interpreting: bool
) -> Decision:
    assert op in OPERATIONS
    if requested is None:
        backend, source = _from_environment(op, environment), ENVIRONMENT
    elif requested in (AUTO, *BACKENDS):
        backend, source = requested, "backend"
    else:
        raise error("backend", f"one of {', '.join((AUTO, *BACKENDS))}", repr(requested))
    obstacle = _obstacle_to_triton(device, dtype, interpreting)
    if backend != AUTO:
        if obstacle is not None and backend != "torch":
            raise error("backend", f"'torch' ({obstacle})", f"{backend!r} from {source}")
        return Decision(backend, f"requested by {source}", True)
    if obstacle is not None:
        if device.type == "cuda":
            _LOGGER.warning("%s runs in plain torch on this GPU: %s", op, obstacle)  # once, since the answer is cached
        return Decision("torch", obstacle, False)
    if device.type == "cpu":
        return Decision("torch", "CPU tensors; Triton's interpreter runs only on request", False)
    return Decision("triton", f"{device.type} tensors of {dtype}", False)


def _from_environment(op: str, environment: str) -> str:
    """Return the backend that the value of SFTX_KERNELS requests for `op`; the last matching part wins."""
    chosen = AUTO
    for part in filter(None, (part.strip() for part in environment.split(","))):
        for_op, separator, backend = part.rpartition("=")
        if separator and for_op not in OPERATIONS:
            raise error(ENVIRONMENT, f"an operation of {', '.join(OPERATIONS)} before =", repr(for_op))
        if backend not in (AUTO, *BACKENDS):
            raise error(ENVIRONMENT, f"a backend, or operation=backend, of {(AUTO, *BACKENDS)}", repr(environment))
        if not separator or for_op == op:
            chosen = backend
    return chosen


def _obstacle_to_triton(device: torch.device, dtype: torch.dtype, interpreting: bool) -> str | None:
    """Return the reason why Triton cannot run a call, None if it can."""
    if not has_triton():
        return "triton is not installed"
    if dtype not in _TRITON_DTYPES:
        return f"{dtype} has no kernel"
    if device.type == "cpu" and not interpreting:
        return "CPU tensors, and TRITON_INTERPRET is not set"
    if device.type not in ("cpu", "cuda"):
        return f"{device.type} tensors"
    return None


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """Return True if TRITON_INTERPRET asks for Triton's interpreter, which runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
