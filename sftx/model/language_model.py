"""A transformers model as the two parts that a loss needs: hidden states, and a head that is never multiplied out.

Dimensions: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftx.errors import ModelError
from sftx.model import packed_attention
from sftx.model.generate import answers
from sftx.types import Adapter, Attention, Batch, HiddenOut
from sftx_kernels import LinearCrossEntropyOutput, linear_cross_entropy

_PROBE_TOKENS = 8

log = logging.getLogger(__name__)


class LanguageModel(nn.Module):
    """The model of a run, with its adapters attached.

    `seed` is a 0-d int64 tensor on the CPU: the seed of the coming forward, a pure function of (run seed, step,
    micro-batch). The engine sets it before each forward; whatever is random in a module derives from it, so that a
    recomputation under gradient checkpointing sees the same numbers.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.config = model.config.get_text_config()
        self.adapters: dict[str, Adapter] = {}
        self.computes_on: torch.device | None = None
        """Where that is not where the parameters are: shares of a model may be kept on the host."""
        self.seed = torch.zeros((), dtype=torch.int64)
        self._varlen: bool | None = None  # not asked for yet
        self._head = model.get_output_embeddings()
        if not isinstance(self._head, nn.Module) or not hasattr(self._head, "weight"):
            raise ModelError(f"{type(model).__name__} has no output head; sftx trains causal language models")

    @property
    def device(self) -> torch.device:
        return self.computes_on or next(self.parameters()).device

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; requires grad when the head is trained."""
        return cast(Tensor, self.model.get_output_embeddings().weight)

    @property
    def head_bias(self) -> Tensor | None:
        """[V]"""
        return cast("Tensor | None", getattr(self.model.get_output_embeddings(), "bias", None))

    @property
    def logit_scale(self) -> float:
        """What the head's product is multiplied with: Cohere's logit_scale, Granite's 1/logits_scaling."""
        if getattr(self.config, "logits_scaling", None) is not None:
            return 1.0 / float(self.config.logits_scaling)
        for name in ("logit_scale", "lm_head_multiplier"):
            if getattr(self.config, name, None) is not None:
                return float(getattr(self.config, name))
        return 1.0

    @property
    def softcap(self) -> float | None:
        """softcap * tanh(logits / softcap), after the scale: Gemma-2's final_logit_softcapping."""
        value = getattr(self.config, "final_logit_softcapping", None)
        return None if value is None else float(value)

    def attach(self, adapters: Mapping[str, Adapter]) -> None:
        """Freezes the model and adds what trains, in the order given. Without adapters all of it trains."""
        if adapters:
            self.requires_grad_(False)
        for name, adapter in adapters.items():
            adapter.attach(self)
            self.adapters[name] = adapter

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Within it the model computes what it did before training (the reference of a preference loss)."""
        with contextlib.ExitStack() as stack:
            for adapter in self.adapters.values():
                stack.enter_context(adapter.disabled())
            yield

    def hidden(self, batch: Batch) -> HiddenOut:
        """The decoder's last states, [B, T, D], as the head reads them, and a router's auxiliary loss."""
        mask_BT = None
        if batch.cu_seqlens is not None:
            chosen = self.attention_of(batch)
            arguments = packed_attention.decoder_arguments(batch, chosen, self.config, self.head_weight.dtype)
        else:
            # Rows of one length need no mask, and the causal kernels that take none are faster.
            padded = batch.num_input_tokens < batch.input_ids_BT.numel()
            mask_BT = _length_mask(cast(Tensor, batch.lengths_B), batch.input_ids_BT) if padded else None
            arguments = {"attention_mask": mask_BT, "position_ids": batch.position_ids_BT if padded else None}
        if self.has_router_loss:
            arguments["output_router_logits"] = True
        out = self.model.get_decoder()(input_ids=batch.input_ids_BT, use_cache=False, **arguments)
        aux_loss = self._aux_loss(out.router_logits, mask_BT) if self.has_router_loss else None
        return HiddenOut(out.last_hidden_state, aux_loss)

    def attention_of(self, batch: Batch) -> Attention:
        """How the documents of a packed batch are kept apart: as it asks, or `mask` where varlen cannot be."""
        if batch.attention != "varlen":
            return batch.attention
        if self._varlen is None:
            reason = packed_attention.use_varlen(self.model.get_decoder())
            self._varlen = True
            if reason is not None:
                self.give_up_varlen(reason)
        return "varlen" if self._varlen else "mask"

    def give_up_varlen(self, reason: str) -> None:
        """From now on packed batches that ask for varlen get transformers' own mask."""
        self._varlen = False
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
    ) -> LinearCrossEntropyOutput:
        """Return the cross-entropy of the label tokens, computed from hidden states without materialising the logits.

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

        The loss is fp32 (fp64 for an fp64 model). Raises ValueError for an argument that is out of range.
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
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            workspace_bytes=workspace_bytes,
            reduction=reduction,
            stats=stats,
        )

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """[B, T, V] in full: for probes and tests, never for training."""
        logits_BTV = nn.functional.linear(hidden_BTD, self.head_weight, self.head_bias)
        if self.logit_scale != 1:
            logits_BTV = logits_BTV * self.logit_scale
        if self.softcap is not None:
            logits_BTV = self.softcap * torch.tanh(logits_BTV / self.softcap)
        return logits_BTV

    @property
    def has_router_loss(self) -> bool:
        """Whether the architecture adds a router's loss to its own, as its configuration asks."""
        return bool(getattr(self.config, "output_router_logits", False))

    def _aux_loss(self, router_logits: tuple[Tensor, ...], mask_BT: Tensor | None) -> Tensor:
        """The load-balancing loss of the model's own module, with its own coefficient."""
        model = self.model
        balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        if balance is None:
            raise ModelError(
                f"{type(model).__name__} asks for a router loss (output_router_logits) that sftx does not know; "
                "set output_router_logits to false in its config.json"
            )
        loss = balance(router_logits, model.num_experts, model.num_experts_per_tok, mask_BT)
        return cast(Tensor, model.router_aux_loss_coef * loss.float())

    @torch.no_grad()
    def check(self) -> None:
        """Sends a few tokens both ways. Raises ModelError when our logits are not the model's own."""
        ids = torch.arange(_PROBE_TOKENS, device=self.device) * 97 % self.head_weight.shape[0]
        batch = Batch(
            input_ids_BT=ids[None],
            labels_BT=ids[None],
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
        ours = self.logits(self.hidden(batch).hidden_BTD).float()
        theirs = self.model(input_ids=ids[None], use_cache=False).logits.float()
        self.train(training)
        if not theirs.isfinite().all():
            raise ModelError(f"{type(self.model).__name__}: its logits are not finite; the weights are damaged")
        scale = theirs.abs().max().clamp(min=1e-6)
        worst = ((ours - theirs).abs().max() / scale).item()
        # The same matrix products in the same dtype: what differs is the order of additions.
        tolerance = 1e-5 if self.head_weight.dtype == torch.float32 else 2e-2
        if not worst <= tolerance:
            raise ModelError(
                f"{type(self.model).__name__}: its logits are not head(hidden) as sftx computes them "
                f"(relative difference {worst:.1e}); this architecture is not supported"
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        batch_size: int,
    ) -> list[list[int]]:
        """Greedy answers, in the order of the prompts, without the stop token that ended them.

        Batches of prompts of similar length, padded at the left, with the model's own cache.
        """
        found = dict(answers(self, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, batch_size=batch_size))
        return [found[index] for index in range(len(prompts))]


def _length_mask(lengths_B: Tensor, ids_BT: Tensor) -> Tensor:
    return (torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]).long()
