"""Where the kernels are tested: on the GPU if there is one, else on CPU tensors under Triton's interpreter."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
"""What a Triton kernel can be tested in; the interpreter's bf16 arithmetic is silently wrong."""

BACKENDS = ["torch", "triton"]


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the error relative to the exact value's, or absolute where that is all but zero."""
    assert actual.shape == exact.shape
    exact = exact.to(actual.device, torch.float64)
    norm = exact.norm().item()
    return (actual.double() - exact).norm().item() / (norm if norm > 1e-3 else 1.0)
