"""sftx_kernels has the operations in which fine-tuning spends its time, in plain torch and in Triton.

An operation has one name everywhere: `<operation>.py` is the public function with its checks, autograd and plain-torch
implementation, `triton/<operation>.py` its Triton kernels, and `bench/<operation>.py` its benchmark. This package
imports torch and, where kernels run, triton; it imports neither sftx nor the plugins.
"""

from sftx_kernels.cross_entropy import IGNORE_INDEX, CrossEntropyOutput, cross_entropy
from sftx_kernels.dora import squared_row_norms, updated_row_norms
from sftx_kernels.dropout import seeded_dropout
from sftx_kernels.gemm import cpu_multiplies
from sftx_kernels.grouped_lora import grouped_lora_linear
from sftx_kernels.int8 import Int8Weight, quantize_int8
from sftx_kernels.linear_cross_entropy import (
    LinearCrossEntropyOutput,
    LinearCrossEntropyWorkspace,
    linear_cross_entropy,
    linear_cross_entropy_workspace,
)
from sftx_kernels.linear_kl import LinearKLOutput, TeacherHead, TopK, linear_kl
from sftx_kernels.lora import lora_linear, lora_linears
from sftx_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from sftx_kernels.quantized import (
    QuantizedLinear,
    QuantizedStack,
    QuantizedWeight,
    dequantize,
    quantize_stack,
    quantized_linear,
)
from sftx_kernels.rms_norm import rms_norm
from sftx_kernels.rotary import rotary
from sftx_kernels.swiglu import swiglu

__all__ = [
    "IGNORE_INDEX",
    "CrossEntropyOutput",
    "Int8Weight",
    "LinearCrossEntropyOutput",
    "LinearCrossEntropyWorkspace",
    "LinearKLOutput",
    "NF4Weight",
    "QuantizedLinear",
    "QuantizedStack",
    "QuantizedWeight",
    "TeacherHead",
    "TopK",
    "cpu_multiplies",
    "cross_entropy",
    "dequantize",
    "dequantize_nf4",
    "grouped_lora_linear",
    "linear_cross_entropy",
    "linear_cross_entropy_workspace",
    "linear_kl",
    "lora_linear",
    "lora_linears",
    "quantize_int8",
    "quantize_nf4",
    "quantize_stack",
    "quantized_linear",
    "rms_norm",
    "rotary",
    "seeded_dropout",
    "squared_row_norms",
    "swiglu",
    "updated_row_norms",
]
