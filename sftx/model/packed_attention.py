"""How the documents of a packed row are kept from seeing one another, in a model of transformers.

Three ways (`Batch.attention`). `varlen`: attention within the borders, a function of ours that transformers calls in
every layer, given the borders by name as its own flash attention is. `mask`: transformers' own mask, which it makes
from position ids that begin anew; exact for whatever the architecture does with its masks. `mask4d`: a mask made here,
which transformers takes as it is, without the architecture's windows.

Dimensions: B rows, T tokens, H query heads, K key and value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sftx.errors import ModelError, one_line
from sftx.model import varlen_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from sftx.types import Attention, Batch

NAME: Final = "sftx_documents"
"""What transformers calls our attention."""

# What layers hand to an attention function without changing what it has to compute.
_HARMLESS: Final = frozenset(
    {"cu_seq_lens_k", "max_length_k", "position_ids", "cache_position", "use_cache", "return_dict", "is_causal"}
)


@dataclass(frozen=True)
class Call:
    """What one layer asked of its attention."""

    has_borders: bool
    is_causal: bool
    window: int | None
    dropout: float
    dtype: torch.dtype
    head_dims: frozenset[int]
    others: tuple[str, ...]
    """Names of further things that it wants heeded."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    calls: list[Call] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: query [B, H, T, D], key and value [B, K, T, D] to [B, T, H, D].

    Given borders (then B is 1 and there is no cache), within each document; else transformers' own for sdpa. Given
    `calls`, nothing is computed: what is asked for is added there.
    """
    if calls is not None:
        calls.append(
            Call(
                has_borders=cu_seq_lens_q is not None,
                is_causal=kwargs.get("is_causal") is not False and getattr(module, "is_causal", True),
                window=sliding_window,
                dropout=dropout,
                dtype=value.dtype,
                head_dims=frozenset(x.shape[-1] for x in (query, key, value)),
                others=tuple(n for n, v in kwargs.items() if v is not None and v is not False and n not in _HARMLESS),
            )
        )
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    if dropout:
        raise ModelError(f"attention within documents has no dropout, asked for was {dropout}")
    out_THD = varlen_attention.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens_q,
        max_length_q,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
    )
    return out_THD[None], None


# Without borders all is as with sdpa, the mask too: generation from padded prompts needs it.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, masking_utils.sdpa_mask)


def decoder_arguments(
    batch: Batch, attention: Attention, config: PretrainedConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """What the decoder is given beside the ids of a packed batch. Raises ModelError when the mask would be wrong."""
    assert batch.cu_seqlens is not None
    arguments: dict[str, Any] = {"position_ids": batch.position_ids_BT, "attention_mask": None}
    if attention == "varlen":
        borders, longest = batch.cu_seqlens, batch.max_seqlen
        arguments |= {
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        # In place of a mask of T x T that nobody reads. A layer that did read it would fail, and not see too much.
        arguments["attention_mask"] = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=borders.device)
    elif attention == "mask4d":
        _check_windows(config, batch.max_seqlen)
        arguments["attention_mask"] = block_mask(_document_numbers(batch), dtype)
    else:
        _check_chunks(config, batch.input_ids_BT.shape[1])
    return arguments


def _document_numbers(batch: Batch) -> Tensor:
    """[1, T]: the number of the document that each token is part of, counted from 1."""
    assert batch.cu_seqlens is not None
    at_T = torch.arange(batch.input_ids_BT.shape[1], device=batch.cu_seqlens.device)
    return torch.searchsorted(batch.cu_seqlens, at_T, right=True)[None]


def block_mask(documents_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T] of `dtype`: 0 where a token sees another, the smallest number where it does not.

    It sees those before it and itself, of its own document; 0 is padding, which nothing sees and which sees nothing:
    the rule of LLaMA-Factory's prepare_4d_attention_mask.
    """
    query_BT1, key_B1T = documents_BT[:, :, None], documents_BT[:, None, :]
    seen_BTT = ((query_BT1 == key_B1T) & (query_BT1 != 0)).tril()
    mask_BTT = torch.zeros(seen_BTT.shape, dtype=dtype, device=documents_BT.device)
    return mask_BTT.masked_fill(~seen_BTT, torch.finfo(dtype).min)[:, None]


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """How many tokens each layer's attention sees, itself included; None: all before it."""
    window: int | None = getattr(config, "sliding_window", None)
    everywhere = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    kinds: list[str] = getattr(config, "layer_types", None) or everywhere
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _check_windows(config: PretrainedConfig, longest: int) -> None:
    chunk: int | None = getattr(config, "attention_chunk_size", None)
    shortest = min((w for w in (*layer_windows(config), chunk) if w is not None), default=longest)
    if shortest < longest:
        raise ModelError(
            f"attention mask4d: {config.model_type} has layers that see {shortest} tokens, and a document has "
            f"{longest}; transformers takes a ready-made mask as it is and the window would be lost; use attention "
            "varlen or mask"
        )


def _check_chunks(config: PretrainedConfig, num_tokens: int) -> None:
    chunk: int | None = getattr(config, "attention_chunk_size", None)
    by_document = hasattr(masking_utils, "remap_positions_for_packed_sequence")
    if chunk is not None and chunk < num_tokens and not by_document:
        raise ModelError(
            f"attention mask: {config.model_type} attends in chunks of {chunk} tokens, which this transformers counts "
            "from the beginning of a packed row and not of a document; upgrade transformers, or train with the "
            "collator padded"
        )


def use_varlen(decoder: PreTrainedModel) -> str | None:
    """Has the decoder call our attention from now on. Returns why that would be wrong, and then leaves it as it was."""
    own = decoder.config._attn_implementation
    if own == NAME:
        return None
    if own != "sdpa":
        return f"its attention is computed by transformers' {own!r}"
    decoder.set_attn_implementation(NAME)
    reason = _why_not(decoder) if decoder.config._attn_implementation == NAME else "its attention cannot be replaced"
    if reason is not None:
        decoder.set_attn_implementation(own)
    return reason


def _why_not(decoder: PreTrainedModel) -> str | None:
    """Asks the model itself: a forward of two documents in which each layer's attention tells what it is given."""
    config, calls = decoder.config, _survey(decoder)
    if isinstance(calls, str):
        return f"it fails when its attention is given borders: {calls}"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    windows = sorted(w for w in layer_windows(config) if w is not None)
    if len(calls) < config.num_hidden_layers:
        return f"{config.num_hidden_layers - len(calls)} of its {config.num_hidden_layers} layers ask no such attention"
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if not all(call.has_borders for call in calls):
        return "its layers do not hand the borders on"
    others = sorted({name for call in calls for name in call.others})
    if others:
        return f"its attention wants {', '.join(others)} heeded"
    if not all(call.is_causal for call in calls):
        return "its attention is not causal"
    if sorted(call.window for call in calls if call.window is not None) != windows:
        return "its layers ask for other windows than its configuration has"
    if any(call.dropout for call in calls):
        return "it has dropout in its attention"
    if any(len(call.head_dims) > 1 for call in calls):
        return "its keys and values differ in size"
    found = {(call.dtype, dim) for call in calls for dim in call.head_dims}
    device = next(decoder.parameters()).device
    return next((reason for dtype, dim in found if (reason := varlen_attention.why_not(device, dtype, dim))), None)


@torch.no_grad()
def _survey(decoder: PreTrainedModel) -> list[Call] | str:
    """What the layers ask of their attention while training, or the model's error."""
    calls: list[Call] = []
    device = next(decoder.parameters()).device
    ids_BT = torch.zeros(1, 8, dtype=torch.int64, device=device)
    borders = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    training = decoder.training
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            decoder.train()  # dropout is asked for then only
            decoder(
                input_ids=ids_BT,
                position_ids=torch.arange(8, device=device)[None] % 4,
                attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device),
                cu_seq_lens_q=borders,
                cu_seq_lens_k=borders,
                max_length_q=4,
                max_length_k=4,
                use_cache=False,
                calls=calls,
            )
    except Exception as error:  # whatever a model's own code raises; it has other ways to train
        return one_line(error)
    finally:
        decoder.train(training)
    return calls
