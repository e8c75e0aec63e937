"""Small random models of other architectures than Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

SHAPE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_PLAIN_HEADS = {name: value for name, value in SHAPE.items() if name != "head_dim"}
MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_experts_per_tok=2, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, num_experts_per_tok=2, num_experts=4, moe_intermediate_size=24
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(**SHAPE, num_experts_per_tok=2, num_local_experts=4),
    "olmoe": lambda: transformers.OlmoeConfig(**_PLAIN_HEADS, num_experts_per_tok=2, num_experts=4),
    # The only one of these with linear layers that are named like experts: shared experts, and a dense first layer.
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **_PLAIN_HEADS | {"num_key_value_heads": 4}, num_experts_per_tok=2, moe_intermediate_size=24,
        n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    ),
}  # fmt: skip
"""The configurations of mixtures of experts, whose experts are one parameter of three dimensions."""


def write_model(config: Any, directory: Path) -> Path:
    """Write a model of this configuration with random weights, beside the tokenizer of `sftx:tiny`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sftx.model import tiny

    tokenizer = AutoTokenizer.from_pretrained(tiny.model_dir())
    config.get_text_config().vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
