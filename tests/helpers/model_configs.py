"""Public configurations of models that are planned by arithmetic: what their config.json says of shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "qwen2.5-7b": {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768}
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "rope_theta": 1000000.0}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "llama-3-70b": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
}
CONFIGS["qwen3-30b-a3b"] = {"model_type": "qwen3_moe", "vocab_size": 151936, "max_position_embeddings": 40960} | {
    **{"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6},
    **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False},
}
SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192} | {
    **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "tie_word_embeddings": True},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100000},
}
NUM_PARAMETERS = {"llama-3-8b": 8_030_261_248, "qwen2.5-7b": 7_615_616_512, "llama-3-70b": 70_553_706_496}
NUM_PARAMETERS["qwen3-30b-a3b"] = 30_532_122_624
"""As their makers count them."""


def write(config: dict[str, Any], directory: Path) -> str:
    """A directory with nothing but config.json."""
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(directory)
