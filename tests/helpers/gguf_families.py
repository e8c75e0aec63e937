"""Small random models of the architectures that the exporter `gguf` writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import transformers

SHAPE: Final[dict[str, Any]] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
WIDE: Final = SHAPE | {"head_dim": 32}
_EXPERTS: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _scaled(config: Any, kind: str, length: int = 64, **options: Any) -> Any:
    """Return the configuration with rotary positions that are scaled."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": length, **options}
    return config(**{**SHAPE, "max_position_embeddings": 4 * length}, rope_parameters=rope)


_OF_LLAMA3: Final = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG: Final = {"short_factor": [1 + n / 8 for n in range(8)], "long_factor": [1.0 + n for n in range(8)]}
FAMILIES: Final[dict[str, Callable[[], Any]]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-3": lambda: _scaled(transformers.LlamaConfig, "llama3", **_OF_LLAMA3),
    "llama-linear": lambda: _scaled(transformers.LlamaConfig, "linear", factor=4.0),
    "mistral": lambda: transformers.MistralConfig(**WIDE, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen2-yarn": lambda: _scaled(transformers.Qwen2Config, "yarn", factor=4.0),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(**SHAPE, **_EXPERTS, shared_expert_intermediate_size=40),
    "qwen3": lambda: transformers.Qwen3Config(**WIDE),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**WIDE, **_EXPERTS, norm_topk_prob=True),
    "gemma-2": lambda: transformers.Gemma2Config(**WIDE, query_pre_attn_scalar=32, sliding_window=8),
    "gemma-3": lambda: transformers.Gemma3TextConfig(
        **WIDE | {"num_hidden_layers": 7}, query_pre_attn_scalar=32, sliding_window=8
    ),
    "phi-3": lambda: transformers.Phi3Config(**SHAPE),
    "phi-3-longrope": lambda: _scaled(transformers.Phi3Config, "longrope", 1024, **_LONG),
    "starcoder2": lambda: transformers.Starcoder2Config(**SHAPE, sliding_window=None),
    "stablelm": lambda: transformers.StableLmConfig(**SHAPE, use_qkv_bias=True, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=3, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0
    ),
}
"""Configurations that transformers' reader of GGUF knows."""
LLAMA_CPP_ONLY: Final[dict[str, Callable[[], Any]]] = {
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "gemma": lambda: transformers.GemmaConfig(**WIDE),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
    "granite": lambda: transformers.GraniteConfig(
        **SHAPE, attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**SHAPE),
}
"""Configurations that llama.cpp alone reads."""
