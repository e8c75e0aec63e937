"""How the architectures of transformers are written in GGUF: metadata, names of tensors, and what is changed in them.

The package gguf knows the names; what llama.cpp expects of values is here. A configuration that llama.cpp would compute
otherwise is refused, for the file would load and answer with something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sftx import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

_GELUS: Final = frozenset({"gelu_pytorch_tanh", "gelu_new"})


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` of transformers is written."""

    name: str
    """Its name in GGUF."""
    activations: frozenset[str] = frozenset({"silu"})
    interleaved: bool = False
    """llama.cpp rotates neighbouring pairs of a head, where transformers rotates its two halves."""
    norm_offset: float = 0.0
    """What transformers adds to the weights of norms in a forward, and llama.cpp finds in the file."""
    ropes: frozenset[str] = frozenset({"default", "linear", "yarn"})
    has_window: bool = False
    """llama.cpp computes its sliding window. Elsewhere the file allows no longer context than the window."""
    always_tied: bool = False
    metadata: Callable[[GGUFWriter, PretrainedConfig], None] = lambda writer, config: None
    """Writes what this architecture has beside what all have."""
    refusal: Callable[[PretrainedConfig], str | None] = lambda config: None
    """Says what of a configuration llama.cpp cannot compute."""


def of(config: PretrainedConfig) -> tuple[Architecture, PretrainedConfig]:
    """Return the architecture of a model, and the configuration of its language model.

    Raises ConfigError for a model that cannot be written.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    found = _ARCHITECTURES.get(config.model_type)
    if found is None:
        known = sorted({str(CLASSES[model_type]) for model_type in _ARCHITECTURES})
        got = ", ".join(config.architectures or [config.model_type or "no name"])
        raise ConfigError(
            f"a model of the architecture {got} cannot be written as GGUF; those known are {', '.join(known)}"
        )
    text: PretrainedConfig = config.get_text_config()
    problem = _refusal(found, text)
    if problem is not None:
        raise ConfigError(f"this model cannot be written as GGUF: {problem}")
    return found, text


def write_metadata(writer: GGUFWriter, architecture: Architecture, config: PretrainedConfig) -> None:
    """Write the metadata of the model; those of the tokenizer are in `vocabulary`."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(architecture, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_feed_forward_length(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if (epsilon := getattr(config, name, None)) is not None:
            writer.add_layer_norm_eps(epsilon)
    if config.model_type != "gpt2":
        size = _head_size(config)
        writer.add_key_length(size)
        writer.add_value_length(size)
        _write_rope(writer, config)
    architecture.metadata(writer, config)


def tensors(
    architecture: Architecture, config: PretrainedConfig, model: PreTrainedModel
) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    """Yield each tensor of the file: its name, the parameter that it is made of, and the function that makes it.

    So that a file is written without a second copy of the model, the functions are called one by one; they can be
    called with tensors on the meta device. Raises ConfigError for a parameter that GGUF has no name for.
    """
    import gguf
    import torch

    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    is_multimodal = model.config.get_text_config() is not model.config
    for name, parameter in _parameters(model, tied=architecture.name != "stablelm"):
        if is_multimodal and name != "lm_head.weight":
            _, inside, rest = name.partition("language_model.")
            if not inside:
                continue
            name = f"model.{rest}"
        for part, change in _parts(architecture, config, name, parameter):
            written = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if written is None:
                raise ConfigError(
                    f"the parameter {name} has no place in a GGUF file of the architecture {architecture.name}"
                )
            yield written, parameter, change
    factors = _rope_factors(config)
    for name, values in factors.items():
        yield name, torch.tensor(values, dtype=torch.float32), _unchanged


def _parameters(model: PreTrainedModel, *, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters; a head that is tied to the embeddings only where `tied` is False."""
    yield from model.named_parameters()
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if not tied and head is not None and head.weight is embeddings.weight:
        yield "lm_head.weight", head.weight


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _parts(
    architecture: Architecture, config: PretrainedConfig, name: str, parameter: Tensor
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield under which names a parameter is written, and how."""
    if name.endswith(".experts.gate_up_proj"):
        half = parameter.shape[1] // 2
        yield f"{name.removesuffix('gate_up_proj')}gate_proj.weight", lambda tensor: tensor[:, :half]
        yield f"{name.removesuffix('gate_up_proj')}up_proj.weight", lambda tensor: tensor[:, half:]
    elif name.endswith(".experts.down_proj"):
        yield f"{name}.weight", _unchanged
    elif name.endswith("shared_expert_gate.weight"):
        yield name, lambda tensor: tensor[0]
    elif architecture.norm_offset and name.endswith("norm.weight"):
        yield name, lambda tensor: tensor + architecture.norm_offset
    elif architecture.interleaved and (projection := name.rsplit(".", 2)[-2]) in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if projection == "q_proj" else config.num_key_value_heads
        yield name, lambda tensor: _interleave(tensor, heads)
    elif architecture.name == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        yield name, lambda tensor: tensor.T  # transformers' Conv1D has the weight of a linear layer transposed
    else:
        yield name, _unchanged


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Put row i of the second half of each head behind row i of its first half."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context_length(architecture: Architecture, config: PretrainedConfig) -> int:
    window = None if architecture.has_window else _window(config)
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def _window(config: PretrainedConfig) -> int | None:
    """Return the sliding window of any layer."""
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", True) is False or (kinds and "sliding_attention" not in kinds):
        return None
    return getattr(config, "sliding_window", None)


def _feed_forward_length(config: PretrainedConfig) -> int:
    if config.model_type == "gpt2":
        return int(config.n_inner or 4 * config.hidden_size)
    return int(config.intermediate_size)


# --- positions ----------------------------------------------------------------------------------------


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary positions of the layers without a window, or of all."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope.get("full_attention", rope))


def _rotated(config: PretrainedConfig) -> int:
    return int(_head_size(config) * _rope(config).get("partial_rotary_factor", 1.0))


def _write_rope(writer: GGUFWriter, config: PretrainedConfig) -> None:
    from gguf import RopeScalingType

    rope = _rope(config)
    writer.add_rope_dimension_count(_rotated(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    windowed = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if windowed is not None:
        writer.add_rope_freq_base_swa(windowed["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    elif rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(
            rope.get("attention_factor") or (math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)
        )


def _rope_factors(config: PretrainedConfig) -> dict[str, list[float]]:
    """Return by which numbers the frequencies are divided, as tensors of the file."""
    rope = _rope(config)
    match rope.get("rope_type"):
        case "longrope":
            return {"rope_factors_long.weight": rope["long_factor"], "rope_factors_short.weight": rope["short_factor"]}
        case "llama3":
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
            size = _rotated(config)
            plain = rope["rope_theta"] ** (-2.0 * (scaled.new_tensor(range(size // 2)).double() / size))
            return {"rope_freqs.weight": (plain / scaled.double()).tolist()}
    return {}


# --- what is refused ----------------------------------------------------------------------------------


def _refusal(architecture: Architecture, config: PretrainedConfig) -> str | None:
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    activation = activation or getattr(config, "activation_function", None)
    if activation not in architecture.activations:
        expected = " or ".join(sorted(architecture.activations))
        return f"its activation is {activation}, and llama.cpp computes {expected} for {architecture.name}"
    rope = _rope(config)
    if rope and rope["rope_type"] not in architecture.ropes:
        return (
            f"its rotary positions are scaled by {rope['rope_type']!r}, and llama.cpp computes "
            f"{', '.join(sorted(architecture.ropes))} for {architecture.name}"
        )
    if rope.get("rope_type") == "yarn" and (rope.get("attention_factor") or rope.get("mscale")):
        return "its rotary positions are scaled by yarn with an attention factor of its own"
    if architecture.always_tied and not config.tie_word_embeddings:
        return f"llama.cpp ties the head of {architecture.name} to the embeddings, and this model's is not"
    return architecture.refusal(config)


def _expected(config: PretrainedConfig, values: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the first of these entries of the configuration that has another value."""
    for name, value in values.items():
        if (got := getattr(config, name, value)) != value:
            return f"llama.cpp computes {name}={value!r}, and its configuration has {got!r}"
    return None


def _gemma_scale(config: PretrainedConfig) -> str | None:
    """llama.cpp takes the scale of attention from the number of layers, since Gemma's 27B differs."""
    is_27b = (config.model_type, config.num_hidden_layers) in (("gemma2", 46), ("gemma3_text", 62))
    scale = config.hidden_size // config.num_attention_heads if is_27b else _head_size(config)
    period = 2 if config.model_type == "gemma2" else 6
    kinds = [
        "full_attention" if n % period == 0 else "sliding_attention" for n in range(1, config.num_hidden_layers + 1)
    ]
    return _expected(config, {"query_pre_attn_scalar": scale, "layer_types": kinds})


def _smollm3(config: PretrainedConfig) -> str | None:
    return _expected(config, {"no_rope_layers": [int(n % 4 != 0) for n in range(1, config.num_hidden_layers + 1)]})


def _qwen2_moe(config: PretrainedConfig) -> str | None:
    return _expected(config, {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []})


def _qwen3_moe(config: PretrainedConfig) -> str | None:
    return _expected(config, {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []})


def _gpt2(config: PretrainedConfig) -> str | None:
    return _expected(config, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False})


def _stablelm(config: PretrainedConfig) -> str | None:
    return _expected(config, {"qk_layernorm": False, "use_parallel_residual": False})


# --- what an architecture has beside what all have ------------------------------------------------------


def _write_experts(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if (size := getattr(config, "moe_intermediate_size", None)) is not None:
        writer.add_expert_feed_forward_length(size)
    if (size := getattr(config, "shared_expert_intermediate_size", None)) is not None:
        writer.add_expert_shared_feed_forward_length(size)


def _write_gemma(writer: GGUFWriter, config: PretrainedConfig) -> None:
    if (window := _window(config)) is not None:
        writer.add_sliding_window(window)
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(cap)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(cap)


def _write_stablelm(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


def _write_granite(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


_LLAMA: Final = Architecture("llama", interleaved=True, ropes=frozenset({"default", "linear", "yarn", "llama3"}))
_GEMMA3: Final = Architecture(
    "gemma3", _GELUS, norm_offset=1.0, has_window=True, always_tied=True, metadata=_write_gemma, refusal=_gemma_scale
)
_ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Architecture("llama", interleaved=True, metadata=_write_experts),
    "smollm3": Architecture("smollm3", interleaved=True, refusal=_smollm3),
    "granite": Architecture("granite", interleaved=True, metadata=_write_granite),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe", metadata=_write_experts, refusal=_qwen2_moe),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe", metadata=_write_experts, refusal=_qwen3_moe),
    "olmo2": Architecture("olmo2"),
    "gemma": Architecture("gemma", _GELUS, norm_offset=1.0, always_tied=True),
    "gemma2": Architecture(
        "gemma2",
        _GELUS,
        norm_offset=1.0,
        has_window=True,
        always_tied=True,
        metadata=_write_gemma,
        refusal=_gemma_scale,
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "phi3": Architecture("phi3", ropes=frozenset({"default", "longrope"})),
    "stablelm": Architecture("stablelm", ropes=frozenset({"default"}), metadata=_write_stablelm, refusal=_stablelm),
    "starcoder2": Architecture("starcoder2", _GELUS),
    "gpt2": Architecture("gpt2", _GELUS, refusal=_gpt2),
}
