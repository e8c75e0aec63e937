"""This module reads, compares and restores the state of the process: random generators, torch's modes, streams."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch


def _numpy_state() -> object:
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return (name, tuple(keys.tolist()), *rest)


def _set_handlers(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _set_environment(variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


PROCESS: Final[Mapping[str, tuple[Callable[[], Any], Callable[[Any], object]]]] = {
    "Python's random numbers": (random.getstate, random.setstate),
    "torch's random numbers": (
        lambda: tuple(torch.get_rng_state().tolist()),
        lambda state: torch.set_rng_state(torch.tensor(state, dtype=torch.uint8)),
    ),
    "numpy's random numbers": (_numpy_state, np.random.set_state),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's anomaly detection": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "torch's deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda state: torch.use_deterministic_algorithms(state[0], warn_only=state[1]),
    ),
    "cuDNN's flags": (
        lambda: (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        lambda state: torch.backends.cudnn.set_flags(_deterministic=state[0], _benchmark=state[1]),
    ),
    "the signal handlers": (lambda: {n: signal.getsignal(n) for n in signal.valid_signals()}, _set_handlers),
    "the working directory": (os.getcwd, os.chdir),
    "the environment variables": (lambda: dict(os.environ), _set_environment),
    "sys.path": (lambda: list(sys.path), lambda paths: sys.path.__setitem__(slice(None), paths)),
    "sys.stdout": (lambda: sys.stdout, lambda stream: setattr(sys, "stdout", stream)),
    "sys.stderr": (lambda: sys.stderr, lambda stream: setattr(sys, "stderr", stream)),
}
"""The state of the process by name, each with the function that reads it and the one that sets it."""

TERMINAL: Final = frozenset({"sys.stdout", "sys.stderr"})
"""An observer may replace these until it is closed: a live display captures what others print."""

RANDOM: Final = ("Python's random numbers", "torch's random numbers", "numpy's random numbers")


def process() -> dict[str, Any]:
    """Return the state of the process by name."""
    return {name: read() for name, (read, _) in PROCESS.items()}


def random_states() -> dict[str, Any]:
    """Return the states of the global random number generators by name."""
    return {name: PROCESS[name][0]() for name in RANDOM}


def changed_random_states(before: Mapping[str, Any]) -> str:
    """Return the names of the global generators that differ from `before`, or an empty string."""
    return ", ".join(name for name, state in random_states().items() if state != before[name])


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the global random number generators at the end of the block."""
    before = random_states()
    try:
        yield
    finally:
        for name, state in before.items():
            PROCESS[name][1](state)


def seed_all(seed: int) -> None:
    """Seed the global random number generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
