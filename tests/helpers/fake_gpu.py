"""A GPU that computes nothing: torch's fake tensors on the device `cuda`, in a process that need not have one.

FakeTensorMode knows shapes, dtypes and devices of all tensors. What it lacks without CUDA is supplied here, and nothing
of sftx is replaced but the launch of a Triton kernel and the properties of the chip that it asks the driver for:

- a no-op device guard, which torch itself installs for fake tensors where it is built for CUDA, and not elsewhere;
- the answers of `torch.cuda` to questions about the device, and streams that do nothing, those of `torch.cpu`;
- the choice of a kernel by `scaled_dot_product_attention`, which is made in code that only a CUDA build has;
- the names of CUDA's kernels that take the place of a composition of others in backward.

It lies with the tests because it reaches into the libraries of torch: `sftx plan`, which a user runs on any build of
torch, keeps its fake tensors on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import masking_utils

import sftx_kernels.grouped_lora
import sftx_kernels.lora
import sftx_kernels.triton.lora
from sftx_kernels import nf4
from sftx_kernels.triton import launch

DEVICE: Final = torch.device("cuda", 0)
CHIP: Final = launch.CHIPS["sm_90"]
_CUDA, _META = 1, 14
"""The numbers of these devices in c10::DeviceType."""
_FUSED_ON_CUDA: Final = ("silu_backward",)
"""Operations that are one kernel on CUDA, and that torch composes of others where it has no kernel for a device."""


@contextlib.contextmanager
def fake_gpu(on_launch: Callable[[launch.Launch], None]) -> Iterator[FakeTensorMode]:
    """While active, new tensors are fake and `cuda` is an H100; `on_launch` gets each launch of a Triton kernel."""
    cuda = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(major=9, minor=0, multi_processor_count=CHIP.num_sms),
        "max_memory_allocated": lambda *_: 0,
        "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "Stream": torch.cpu.Stream,
        "stream": torch.cpu.stream,
        "current_stream": torch.cpu.current_stream,
        "Event": torch.cpu.Event,
    }
    replaced: list[tuple[Any, str, Any]] = [(torch.cuda, name, answer) for name, answer in cuda.items()]
    replaced += [
        (module, "is_in_torch_dispatch_mode", _is_in_mode) for module in (sftx_kernels.lora, sftx_kernels.grouped_lora)
    ]
    replaced += [(module, "chip_of", lambda _: CHIP) for module in (launch, sftx_kernels.triton.lora)]
    replaced += [(launch.Launch, "run", lambda launched: on_launch(launched))]
    replaced += [(_foreach_utils, "_foreach_supported_types", [*_foreach_utils._foreach_supported_types, FakeTensor])]
    # To transformers a fake tensor means that a graph is traced, and it takes other ways then.
    replaced += [(masking_utils, "is_tracing", lambda *_: False)]
    replaced += [(torch.nn.functional, "scaled_dot_product_attention", _attention)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_cuda_in_c10())
        # First, since it asks torch.cuda whether there is a device whose initialisation it has to avoid.
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # Without CUDA the autograd engine has no thread for its devices.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        for target, name, value in replaced:
            stack.enter_context(mock.patch.object(target, name, value))
        for tables in (nf4._tables, nf4.nested_levels):  # a table that is fake must not outlive the mode
            tables.cache_clear()
            stack.callback(tables.cache_clear)
        yield mode


@contextlib.contextmanager
def _cuda_in_c10() -> Iterator[None]:
    """Give CUDA the guard of the meta device, which does nothing, and names of kernels, where torch has none."""
    libraries = (Path(torch.__file__).parent / "lib").glob("*c10.*")
    registry = (ctypes.c_void_p * (_META + 1)).in_dll(
        ctypes.CDLL(str(next(libraries))), "_ZN3c104impl26device_guard_impl_registryE"
    )
    before = registry[_CUDA]
    kernels = torch.library.Library("aten", "IMPL", "CUDA")
    try:
        if before is None:
            registry[_CUDA] = registry[_META]
            for name in _FUSED_ON_CUDA:
                kernels.impl(name, lambda *_: None)  # never called: fake tensors ask for shapes alone
        yield
    finally:
        kernels._destroy()
        registry[_CUDA] = before


def _is_in_mode() -> bool:
    """Return whether a dispatch mode is active that a run would have too, such as that of selective checkpointing."""
    own = [
        isinstance(mode, FakeTensorMode) or hasattr(mode, "on_launch") for mode in _get_current_dispatch_mode_stack()
    ]
    return not all(own)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Return attention by the operation that CUDA takes: flash attention without a mask, memory-efficient with one."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    assert not enable_gqa, "with a mask torch has no kernel for grouped queries, and would multiply all scores"
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
