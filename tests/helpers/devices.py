"""The device of the kernels' tests: the GPU if there is one, else the CPU under Triton's interpreter."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
"""The dtypes in which Triton kernels are tested; the interpreter's bf16 arithmetic is silently wrong."""

BACKENDS = ["torch", "triton"]


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the error relative to that of the exact value, or absolute if the latter is almost zero."""
    assert actual.shape == exact.shape
    exact = exact.to(actual.device, torch.float64)
    norm = exact.norm().item()
    return (actual.double() - exact).norm().item() / (norm if norm > 1e-3 else 1.0)
