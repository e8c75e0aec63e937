"""The operations that fine-tuning spends its time in. Imports torch, never sftx and never transformers."""

from sftx_kernels.reference import IGNORE_INDEX, LinearCrossEntropyOutput, linear_cross_entropy, lora_linear

__all__ = ["IGNORE_INDEX", "LinearCrossEntropyOutput", "linear_cross_entropy", "lora_linear"]
