"""Keeps the documents of a packed row from attending to one another, in a transformers model.

There are three ways (`Batch.attention`). `varlen`: attention within `cu_seqlens`, by a function of ours that is
registered with transformers and that every layer calls with `cu_seqlens`, as for its own flash attention. `mask`:
transformers' own mask, which it builds from position ids that restart at each document; exact whatever the architecture
does with its masks. `mask4d`: a mask built here for each type of layer, which transformers uses as it is; also where an
architecture makes its masks without the position ids, as gpt-oss does.

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

    from sftx.types import Attention, Batch, SharedPrefixes

NAME: Final = "sftx_documents"
"""The name under which our attention is registered with transformers."""

# Arguments of layers to their attention function that do not change what it has to compute.
_IGNORED_ARGUMENTS: Final = frozenset(
    {"cu_seq_lens_k", "max_length_k", "position_ids", "cache_position", "use_cache", "return_dict", "is_causal"}
)


# --- the attention function of a layer ----------------------------------------------------------


@dataclass(frozen=True)
class AttentionCall:
    """Records the arguments with which one layer called its attention function."""

    has_cu_seqlens: bool
    is_causal: bool
    window: int | None
    dropout: float
    dtype: torch.dtype
    head_dims: frozenset[int]
    other_arguments: tuple[str, ...]
    """Names of further arguments that are set and would change the result."""


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
    shared_prefixes: SharedPrefixes | None = None,
    calls: list[AttentionCall] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes the attention of one layer from query [B, H, T, D] and key and value [B, K, T, D]; returns [B, T, H, D].

    With `cu_seq_lens_q` (then B is 1 and there is no cache) it is attention within each document, or of each branch to
    its prefix and itself, otherwise transformers' own sdpa. With `calls` nothing is computed: the arguments are
    appended to that list.
    """
    if calls is not None:
        calls.append(
            AttentionCall(
                has_cu_seqlens=cu_seq_lens_q is not None,
                is_causal=kwargs.get("is_causal") is not False and getattr(module, "is_causal", True),
                window=sliding_window,
                dropout=dropout,
                dtype=value.dtype,
                head_dims=frozenset(x.shape[-1] for x in (query, key, value)),
                other_arguments=tuple(
                    name
                    for name, argument in kwargs.items()
                    if argument is not None and argument is not False and name not in _IGNORED_ARGUMENTS
                ),
            )
        )
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    if dropout:
        raise ModelError(f"attention within documents supports no dropout, and the layer asks for {dropout}")
    # squeeze(0), and not [0], whose backward writes zeros and copies into them
    out_THD = varlen_attention.attend(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        cu_seq_lens_q,
        max_length_q,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        shared=shared_prefixes,
    )
    return out_THD[None], None


# Without cu_seqlens everything is as with sdpa, and so is the mask: generation from left-padded prompts needs it.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, masking_utils.sdpa_mask)


# --- the arguments of the decoder ---------------------------------------------------------------


def decoder_arguments(
    batch: Batch, attention: Attention, config: PretrainedConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns the decoder's arguments for a packed batch, except ids. Raises ModelError if a mask would be wrong."""
    cu_seqlens, num_tokens = batch.cu_seqlens, batch.input_ids_BT.shape[1]
    assert cu_seqlens is not None
    arguments: dict[str, Any] = {"position_ids": batch.position_ids_BT, "attention_mask": None}
    chunk: int | None = getattr(config, "attention_chunk_size", None)
    if attention == "varlen":
        arguments |= {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": batch.max_seqlen,
            "max_length_k": batch.max_seqlen,
        }
        if (shared := batch.shared) is not None:
            arguments |= {"cu_seq_lens_k": shared.cu_seqlens_k, "max_length_k": shared.max_seqlen_k}
            arguments["shared_prefixes"] = shared
        # An empty mask in place of an unused one of T x T. A layer that did use it would fail, and not see too much.
        arguments["attention_mask"] = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=cu_seqlens.device)
    elif attention == "mask4d":
        longest = batch.max_seqlen if batch.shared is None else batch.shared.max_seqlen_k
        if chunk is not None and chunk < longest:
            raise ModelError(
                f"attention mask4d: {config.model_type} attends in chunks of {chunk} tokens, and a document has "
                f"{longest}; use attention varlen or mask"
            )
        positions_T = torch.arange(num_tokens, device=cu_seqlens.device)
        documents_BT = torch.searchsorted(cu_seqlens, positions_T, right=True)[None]
        windows = layer_windows(config)
        types: list[str] = getattr(config, "layer_types", None) or ["all"] * len(windows)

        def mask(window: int | None) -> Tensor:
            if batch.shared is None:
                return block_mask(documents_BT, dtype, window)
            return shared_mask(documents_BT[0] - 1, batch.shared.prefix_P, batch.position_ids_BT[0], dtype, window)

        masks = {kind: mask(window) for kind, window in zip(types, windows, strict=True)}
        # A model whose layers are of several types takes the mask of each by its name.
        arguments["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
    elif chunk is not None and chunk < num_tokens and not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        raise ModelError(
            f"attention mask: {config.model_type} attends in chunks of {chunk} tokens, which this transformers counts "
            "from the beginning of a packed row and not of a document; upgrade transformers, or train with the "
            "collator padded"
        )
    return arguments


def block_mask(documents_BT: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Builds a block-diagonal causal mask, [B, 1, T, T] of `dtype`, as LLaMA-Factory's prepare_4d_attention_mask does.

    `documents_BT` is the number of each token's document, counted from 1; 0 is padding. The mask is 0 where a token may
    attend to another: to itself and the tokens before it in its document, of `window` tokens at most. Elsewhere, and
    for all padding, it is the smallest number of `dtype`.
    """
    query_BT1, key_B1T = documents_BT[:, :, None], documents_BT[:, None, :]
    visible_BTT = ((query_BT1 == key_B1T) & (query_BT1 != 0)).tril()
    if window is not None:
        visible_BTT = visible_BTT.triu(1 - window)
    mask_BTT = torch.zeros(visible_BTT.shape, dtype=dtype, device=documents_BT.device)
    return mask_BTT.masked_fill(~visible_BTT, torch.finfo(dtype).min)[:, None]


def shared_mask(
    pieces_T: Tensor, prefix_P: Tensor, positions_T: Tensor, dtype: torch.dtype, window: int | None = None
) -> Tensor:
    """Builds the same for a row with shared prefixes, [1, 1, T, T]: a branch sees its prefix and itself.

    `pieces_T` is the number of each token's piece, counted from 0, and `positions_T` its position in its document.
    """
    distance_TT = positions_T[:, None] - positions_T
    is_own_TT = pieces_T[:, None] == pieces_T
    visible_TT = (is_own_TT | (prefix_P[pieces_T][:, None] == pieces_T)) & (distance_TT >= 0)
    if window is not None:
        visible_TT &= distance_TT < window
    mask_TT = torch.zeros(visible_TT.shape, dtype=dtype, device=pieces_T.device)
    return mask_TT.masked_fill(~visible_TT, torch.finfo(dtype).min)[None, None]


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """Returns the sliding window of each layer, in tokens including a token itself; None for full causal attention."""
    window: int | None = getattr(config, "sliding_window", None)
    same = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    layer_types: list[str] = getattr(config, "layer_types", None) or same
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]


# --- switching a model to varlen ----------------------------------------------------------------


def use_varlen(decoder: PreTrainedModel) -> str | None:
    """Makes the decoder call our attention from now on, or returns the reason why that would be wrong."""
    own = decoder.config._attn_implementation
    if own == NAME:
        return None
    if own != "sdpa":
        return f"its attention is computed by transformers' {own!r}"
    decoder.set_attn_implementation(NAME)
    if decoder.config._attn_implementation == NAME:
        reason = _reason_against_varlen(decoder)
    else:
        reason = "its attention cannot be replaced"
    if reason is not None:
        decoder.set_attn_implementation(own)
    return reason


def _reason_against_varlen(decoder: PreTrainedModel) -> str | None:
    """Runs a forward of two documents and returns why the layers' calls are not plain attention within documents."""
    config, calls = decoder.config, _record_attention_calls(decoder)
    if isinstance(calls, str):
        return f"it fails when its attention is given cu_seqlens: {calls}"
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if len(calls) < config.num_hidden_layers:
        missing = config.num_hidden_layers - len(calls)
        return f"{missing} of its {config.num_hidden_layers} layers do not call the attention function"
    if unknown:
        return f"it has layers of {', '.join(sorted(unknown))}"
    if not all(call.has_cu_seqlens for call in calls):
        return "its layers do not pass cu_seqlens on"
    others = sorted({name for call in calls for name in call.other_arguments})
    if others:
        return f"its attention also depends on {', '.join(others)}"
    if not all(call.is_causal for call in calls):
        return "its attention is not causal"
    windows = sorted(window for window in layer_windows(config) if window is not None)
    if sorted(call.window for call in calls if call.window is not None) != windows:
        return "the sliding windows of its layers are not those of its configuration"
    if any(call.dropout for call in calls):
        return "it has dropout in its attention"
    if any(len(call.head_dims) > 1 for call in calls):
        return "its keys and values differ in size"
    device = next(decoder.parameters()).device
    for dtype, head_dim in {(call.dtype, dim) for call in calls for dim in call.head_dims}:
        reason = varlen_attention.reason_against(device, dtype, head_dim)
        if reason is not None:
            return reason
    return None


@torch.no_grad()
def _record_attention_calls(decoder: PreTrainedModel) -> list[AttentionCall] | str:
    """Returns how the layers call their attention function in training mode, or the text of the model's error."""
    calls: list[AttentionCall] = []
    device = next(decoder.parameters()).device
    cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    training = decoder.training
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            decoder.train()  # layers pass their dropout in training mode only
            decoder(
                input_ids=torch.zeros(1, 8, dtype=torch.int64, device=device),
                position_ids=torch.arange(8, device=device)[None] % 4,
                attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device),
                cu_seq_lens_q=cu_seqlens,
                cu_seq_lens_k=cu_seqlens,
                max_length_q=4,
                max_length_k=4,
                use_cache=False,
                calls=calls,
            )
    except Exception as error:  # a model's own code may raise anything; it is then trained with a mask
        return one_line(error)
    finally:
        decoder.train(training)
    return calls
