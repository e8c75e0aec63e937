"""The operations that fine-tuning spends its time in. Imports torch and, where it runs, triton; nothing else."""

from sftx_kernels.cross_entropy import CrossEntropyOutput, cross_entropy
from sftx_kernels.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from sftx_kernels.reference import lora_linear
from sftx_kernels.rows import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "CrossEntropyOutput",
    "LinearCrossEntropyOutput",
    "cross_entropy",
    "linear_cross_entropy",
    "lora_linear",
]
