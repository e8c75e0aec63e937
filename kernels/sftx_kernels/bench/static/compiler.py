"""These functions compile a Launch for a GPU that is not present, and read its binary. They import triton when called.

A Launch with tensors on the meta device is specialised by Triton's own binder, as its JIT would on such a GPU
(a meta tensor's address is 0, so pointers count as 16-byte aligned, as torch's allocator gives them), compiled and
disassembled. Binaries and their SASS are in Triton's cache, whose key is the kernel's source with all it calls, its
arguments and options, and Triton itself: a second report takes seconds, and every change is compiled.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftx_kernels.bench.static import assembly
from sftx_kernels.bench.static.occupancy import occupancy
from sftx_kernels.triton.launch import Launch


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Block SIGINT: compiling processes started inside inherit the block; this process receives it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def specialise(arch: str, launch: Launch) -> tuple[Any, Any]:
    """Return (ASTSource, compiler options), by the same functions and in the same steps as JITFunction.run."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(_target(arch))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    requested = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": launch.fuses,
    }
    bound, specialisation, _ = bind(**launch.arguments, **launch.constants, **requested)
    options, signature, constants, attributes = kernel._pack_args(backend, requested, bound, specialisation, requested)
    return ASTSource(kernel, signature, constants, attributes), options


def properties(arch: str, launch: Launch) -> dict[str, Any]:
    """Compile a launch and return the fields of a report's Row that come from the binary."""
    import triton

    source, options = specialise(arch, launch)
    kernel = triton.compile(source, target=_target(arch), options=options.__dict__)
    resources, listing = _nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel)
    shared_bytes = kernel.metadata.shared
    tensor_memory = getattr(kernel.metadata, "tmem_size", None) or 0
    fits = occupancy(arch, launch.num_warps, resources["registers"], shared_bytes, tensor_memory)
    return {
        **resources,
        "shared_bytes": shared_bytes,
        "programs": fits.programs,
        "occupancy": round(fits.share, 4),
        "limited_by": fits.limit,
        "tensor_core": dict(sorted(assembly.tensor_core(_instructions(listing)).items())),
        "plain_dots": assembly.dots_without_tensor_core(kernel.asm["ttgir"]),
        "stretches": assembly.stretches(listing),
    }


def _instructions(listing: assembly.Listing) -> list[assembly.Instruction]:
    return [item for item in listing if not isinstance(item, str)]


def _nvidia(kernel: Any) -> tuple[dict[str, int], assembly.Listing]:
    """Read registers and stack from `cuobjdump -res-usage`, local loads and stores (LDL, STL) from the SASS."""
    usage = assembly.resources(_tool(kernel, "cuobjdump", "-res-usage"))
    listing = assembly.parse_sass(_tool(kernel, "nvdisasm", "-c", "-ndf"))
    instructions = _instructions(listing)
    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "spill_stores": assembly.count(instructions, "STL"),
        "spill_loads": assembly.count(instructions, "LDL"),
    }, listing


def _amd(kernel: Any) -> tuple[dict[str, int], assembly.Listing]:
    """Read registers (including accumulation registers) and scratch from the metadata at the end of the assembly.

    Scalar registers that spill into lanes of vector registers cost no memory and are not counted.
    """
    text = kernel.asm["amdgcn"]
    metadata = assembly.amd_metadata(text)
    listing = assembly.parse_amdgcn(text)
    instructions = _instructions(listing)
    return {
        "registers": metadata["vgpr_count"],
        "stack_bytes": metadata["private_segment_fixed_size"],
        "spill_stores": max(assembly.count(instructions, "scratch_store"), metadata["vgpr_spill_count"]),
        "spill_loads": assembly.count(instructions, "scratch_load"),
    }, listing


def _tool(kernel: Any, tool: str, *options: str) -> str:
    """Return the output of a tool of Triton's wheel for a binary; it is cached beside the binary in Triton's cache."""
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    file, binary = next((file, path) for file, path in kernel.metadata_group.items() if file.endswith(".cubin"))
    cache, name = get_cache_manager(kernel.hash), file.removesuffix("cubin") + tool
    cached = cache.get_file(name)
    if cached is None:
        command = [getattr(knobs.nvidia, tool).path, *options, binary]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        cached = cache.put(printed, name, binary=False)
    return Path(cached).read_text()
