"""The operations that fine-tuning spends its time in. Imports torch and, where it runs, triton; nothing else."""

from sftx_kernels.cross_entropy import CrossEntropyOutput, cross_entropy
from sftx_kernels.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from sftx_kernels.lora import lora_linear, lora_linears
from sftx_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from sftx_kernels.rows import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "CrossEntropyOutput",
    "LinearCrossEntropyOutput",
    "NF4Weight",
    "cross_entropy",
    "dequantize_nf4",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linears",
    "quantize_nf4",
]
