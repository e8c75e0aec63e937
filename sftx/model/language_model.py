"""The language model of a run: a transformers model as the decoder and the output head that a loss needs.

Training never materialises the logits: `CausalLM.cross_entropy` computes the head and the loss together.

Dimensions: B rows, T tokens, N = B * T, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Set
from functools import partial
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftx.errors import ModelError
from sftx.model import experts, packed_attention
from sftx.model.embeddings import replacing_embeddings
from sftx.model.fused_modules import use_fused_modules
from sftx.model.quantised import num_weights
from sftx.model.trained_parts import (
    describe_reach,
    describe_trained,
    describe_untrained_parts,
    freeze_other_modalities,
)
from sftx.types import Adapter, Attention, Batch, HiddenOut
from sftx_kernels import LinearCrossEntropyOutput, linear_cross_entropy

_PROBE_TOKENS: Final = 8

log = logging.getLogger(__name__)


class CausalLM(nn.Module):
    """Wraps a transformers model with its tokenizer and the adapters attached to it.

    `seed` is a 0-d int64 tensor on the CPU: the seed of the next forward pass, a pure function of (run seed, step,
    micro-batch). The trainer sets it before each forward; every random number in a module derives from it, so that
    recomputation under gradient checkpointing draws the same numbers again.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        experts.use_autocast(model)
        use_fused_modules(model)
        self.model = model
        self.tokenizer = tokenizer
        self.tokenizer_entries: dict[str, Any] = {}
        """Entries of tokenizer_config.json that are saved instead of the tokenizer's own (see `saved_tokenizer`)."""
        self.loss_module: nn.Module | None = None
        self.config = model.config.get_text_config()
        self.adapters: dict[str, Adapter] = {}
        self.other_models: dict[str, str | None] = {}
        """The models that `sftx.load_model` has loaded beside this one, by name, with a hash of their files."""
        self.fault_of_sharing: str | None = None
        """Why a batch with shared prefixes is refused; None where none is."""
        self.computes_on: torch.device | None = None
        """The device of the forward pass, if the parameters are elsewhere: FSDP2 can offload its shards to the host."""
        self.seed = torch.zeros((), dtype=torch.int64)
        self._ignores_extras = False
        self._supports_varlen: bool | None = None  # not known before the first packed batch
        self._supports_mask = True
        self._num_base_parameters = num_weights(model.parameters())  # before adapters are attached
        self.reach: str | None = None
        """Says how much of the model trains, or adapters reach; None when no plugin says what trains."""
        self._head = model.get_output_embeddings()
        if not isinstance(self._head, nn.Module) or not hasattr(self._head, "weight"):
            raise ModelError(f"{type(model).__name__} has no output head; sftx trains causal language models")

    @property
    def device(self) -> torch.device:
        return self.computes_on or next(self.parameters()).device

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; requires a gradient when the head is trained."""
        return cast(Tensor, self.model.get_output_embeddings().weight)

    @property
    def head_bias(self) -> Tensor | None:
        """[V]"""
        return cast("Tensor | None", getattr(self.model.get_output_embeddings(), "bias", None))

    @property
    def logit_scale(self) -> float:
        """Returns the factor of the head's product: Cohere's logit_scale, Granite's 1/logits_scaling."""
        if getattr(self.config, "logits_scaling", None) is not None:
            return 1.0 / float(self.config.logits_scaling)
        for name in ("logit_scale", "lm_head_multiplier"):
            if getattr(self.config, name, None) is not None:
                return float(getattr(self.config, name))
        return 1.0

    @property
    def softcap(self) -> float | None:
        """Returns the bound of softcap * tanh(logits / softcap), applied after the scale: Gemma-2's soft cap."""
        value = getattr(self.config, "final_logit_softcapping", None)
        return None if value is None else float(value)

    @property
    def has_router_loss(self) -> bool:
        """Returns whether the model's configuration adds the load-balancing loss of a mixture of experts."""
        return bool(getattr(self.config, "output_router_logits", False))

    def attach(self, adapters: Mapping[str, Adapter], trainable: Set[str] | None = None) -> None:
        """Freezes the model and attaches the adapters in their order. Without adapters the whole model is trained.

        `trainable`: the names of the parameters that are trained, instead of all; tied weights train by either name.
        Of a multimodal model, only the language model trains, unless an adapter embeds extras.
        """
        if adapters or trainable is not None:
            self.requires_grad_(False)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if trainable is not None and name in trainable:
                parameter.requires_grad_(True)
        base = {id(parameter) for parameter in self.model.parameters()}
        for name, adapter in adapters.items():
            adapter.attach(self)
            self.adapters[name] = adapter
        if not self.embeds_extras:  # its adapter may train a tower whose output it embeds
            freeze_other_modalities(self.model)
        if adapters:
            self.reach = describe_reach(self.model, base)
        elif trainable is not None:
            self.reach = describe_trained(self.model)

    def untrained_parts(self) -> list[str]:
        """Returns a line for each kind of weights that could be taken for trained, and is left as it is."""
        return describe_untrained_parts(self.model, self._num_base_parameters, has_adapters=bool(self.adapters))

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Returns a context in which the model computes what it did before training (a preference loss's reference)."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.ignoring_extras())
            for adapter in self.adapters.values():
                stack.enter_context(adapter.disabled())
            yield

    @property
    def embeds_extras(self) -> bool:
        """Returns whether an adapter has a method `embed`, so that batches need their extras."""
        return any(hasattr(adapter, "embed") for adapter in self.adapters.values())

    @contextlib.contextmanager
    def ignoring_extras(self) -> Iterator[None]:
        """Returns a context in which no adapter embeds extras, for batches that have none."""
        before, self._ignores_extras = self._ignores_extras, True
        try:
            yield
        finally:
            self._ignores_extras = before

    def embed(self, batch: Batch, embeds_BTD: Tensor | None = None) -> Tensor:
        """Returns the embeddings of the batch, [B, T, D], with what adapters embed of its extras.

        `embeds_BTD`: those of its tokens alone, as the model's embedding returns them; by default they are computed.
        """
        if embeds_BTD is None:
            embeds_BTD = cast(Tensor, self.model.get_input_embeddings()(batch.input_ids_BT))
        for adapter in () if self._ignores_extras else self.adapters.values():
            embed = getattr(adapter, "embed", None)
            embeds_BTD = embeds_BTD if embed is None else embed(batch, embeds_BTD)
        return embeds_BTD

    def hidden(self, batch: Batch) -> HiddenOut:
        """Runs the decoder. Returns its last hidden states, [B, T, D], and the router's auxiliary loss, if any."""
        mask_BT = None
        if batch.shared is not None and self.fault_of_sharing is not None:
            raise ModelError(
                f"{type(self.model).__name__}: is given rows in which a prompt is shared, and {self.fault_of_sharing}; "
                "train with the collator padded"
            )
        if batch.cu_seqlens is not None:
            attention = self.attention_of(batch)
            arguments = packed_attention.decoder_arguments(batch, attention, self.config, self.head_weight.dtype)
        else:
            # Rows of one length need no mask, and the causal kernels that take none are faster.
            is_padded = batch.num_input_tokens < batch.input_ids_BT.numel()
            if is_padded:
                positions_T = torch.arange(batch.input_ids_BT.shape[1], device=batch.input_ids_BT.device)
                mask_BT = (positions_T < cast(Tensor, batch.lengths_B)[:, None]).long()
            arguments = {"attention_mask": mask_BT, "position_ids": batch.position_ids_BT if is_padded else None}
        if self.has_router_loss:
            arguments["output_router_logits"] = True
        is_embedding = self.embeds_extras and not self._ignores_extras
        with replacing_embeddings(self.model, partial(self.embed, batch)) if is_embedding else contextlib.nullcontext():
            out = self.model.get_decoder()(input_ids=batch.input_ids_BT, use_cache=False, **arguments)
        aux_loss = self._router_loss(out.router_logits, mask_BT) if self.has_router_loss else None
        return HiddenOut(out.last_hidden_state, aux_loss)

    def _router_loss(self, router_logits: tuple[Tensor, ...], mask_BT: Tensor | None) -> Tensor:
        """Returns the load-balancing loss that the model's module in transformers defines, times its coefficient."""
        model = self.model
        balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        if balance is None:
            raise ModelError(
                f"{type(model).__name__} asks for a router loss (output_router_logits) that sftx does not know; "
                "set output_router_logits to false in its config.json"
            )
        loss = balance(router_logits, model.num_experts, model.num_experts_per_tok, mask_BT)
        return cast(Tensor, model.router_aux_loss_coef * loss.float())

    def attention_of(self, batch: Batch) -> Attention:
        """Returns the attention used for a packed batch: `batch.attention`, or one that this model supports instead."""
        # No mask of transformers lets a branch see its prefix.
        own_mask: Attention = "mask" if self._supports_mask and batch.shared is None else "mask4d"
        if batch.attention != "varlen":
            return own_mask if batch.attention == "mask" else batch.attention
        if self._supports_varlen is None:
            reason = packed_attention.use_varlen(self.model.get_decoder())
            self._supports_varlen = True
            if reason is not None:
                self.give_up_varlen(reason)
        return "varlen" if self._supports_varlen else own_mask

    def give_up_mask(self) -> None:
        """Makes all later packed batches use a mask built here instead of transformers' own."""
        self._supports_mask = False

    def give_up_varlen(self, reason: str) -> None:
        """Makes all later packed batches that ask for varlen use transformers' own mask, and logs why."""
        self._supports_varlen = False
        log.warning(
            "%s: packed with attention 'mask', transformers' own, which is exact and slower than 'varlen': %s",
            type(self.model).__name__,
            reason,
        )

    def cross_entropy(
        self,
        hidden_BTD: Tensor,
        labels_BT: Tensor,
        *,
        token_weights_BT: Tensor | None = None,
        num_valid: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        workspace_bytes: int | None = None,
        reduction: Literal["sum", "none"] = "sum",
        stats: bool = False,
        temperature: float = 1.0,
    ) -> LinearCrossEntropyOutput:
        """Returns the cross-entropy of the label tokens, computed from hidden states without materialising the logits.

        The head, with this architecture's scale and soft cap, and the loss are computed together for a chunk of tokens
        at a time. Tokens are flattened in row-major order: everything per token in the result is [N], N = B * T.

        Args:
            hidden_BTD: what `hidden` returned, in the dtype of the model or of autocast.
            labels_BT: int64, already shifted; IGNORE_INDEX where nothing is trained.
            token_weights_BT: floating; multiplies the loss of each label token. None: all 1. Gets no gradient.
            num_valid: the number of labels that are not IGNORE_INDEX (`Batch.num_label_tokens`), if the host knows it,
                which saves an accelerator a synchronisation.
            label_smoothing: share of the target distribution that is spread evenly over the vocabulary, in [0, 1).
            z_loss: weight of logsumexp(logits)^2 in the loss.
            workspace_bytes: the most memory that one chunk of logits may take, in bytes.
            reduction: "sum" for a scalar loss, or "none" for a loss per token, [N], which is 0 at ignored labels.
            stats: return also `lse_N`, `entropy_N` and `correct_N` (see `LinearCrossEntropyOutput`), without gradients.
            temperature: the logits are divided by it, as where answers are sampled.

        The loss is fp32 (fp64 for an fp64 model). Raises ValueError, naming the argument, for one out of range.
        """
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.head_weight,
            labels_BT.flatten(),
            bias_V=self.head_bias,
            token_weights_N=None if token_weights_BT is None else token_weights_BT.flatten(),
            num_valid=num_valid,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            # softcap * tanh(logits / softcap) / temperature, too
            softcap=None if self.softcap is None else self.softcap / temperature,
            logit_scale=self.logit_scale / temperature,
            workspace_bytes=workspace_bytes,
            reduction=reduction,
            stats=stats,
        )

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Returns all logits, [B, T, V]. For probes and tests only: training must not materialise them."""
        # As a matrix: a frozen head times a slice with gaps would be expanded to a batch of B heads.
        logits_NV = nn.functional.linear(hidden_BTD.flatten(0, 1), self.head_weight, self.head_bias)
        logits_BTV: Tensor = logits_NV.view(*hidden_BTD.shape[:2], -1)
        if self.logit_scale != 1:
            logits_BTV = logits_BTV * self.logit_scale
        if self.softcap is not None:
            logits_BTV = self.softcap * torch.tanh(logits_BTV / self.softcap)
        return logits_BTV

    @torch.no_grad()
    def check(self) -> None:
        """Runs a few tokens through the model. Raises ModelError when `logits(hidden(...))` are not its own logits."""
        ids_T = torch.arange(_PROBE_TOKENS, device=self.device) * 97 % self.head_weight.shape[0]
        batch = Batch(
            input_ids_BT=ids_T[None],
            labels_BT=ids_T[None],
            position_ids_BT=torch.arange(_PROBE_TOKENS, device=self.device)[None],
            lengths_B=torch.tensor([_PROBE_TOKENS], device=self.device),
            cu_seqlens=None,
            max_seqlen=_PROBE_TOKENS,
            row_ids=("probe",),
            num_label_tokens=_PROBE_TOKENS,
            num_input_tokens=_PROBE_TOKENS,
        )
        training = self.training
        self.eval()
        with self.ignoring_extras():
            logits_BTV = self.logits(self.hidden(batch).hidden_BTD).float()
        expected_BTV = self.model(input_ids=ids_T[None], use_cache=False).logits.float()
        self.train(training)
        if not expected_BTV.isfinite().all():
            raise ModelError(f"{type(self.model).__name__}: its logits are not finite; the weights are damaged")
        scale = expected_BTV.abs().max().clamp(min=1e-6)
        difference = ((logits_BTV - expected_BTV).abs().max() / scale).item()
        # Both compute the same matrix products in the same dtype; only the order of additions differs.
        tolerance = 1e-5 if self.head_weight.dtype == torch.float32 else 2e-2
        if not difference <= tolerance:  # also when it is NaN
            raise ModelError(
                f"{type(self.model).__name__}: its logits are not head(hidden) as sftx computes them "
                f"(relative difference {difference:.1e}); this architecture is not supported"
            )
