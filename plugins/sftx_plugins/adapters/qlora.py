"""QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): LoRA on a base whose linear layers are quantised.

The layers are quantised while the model is read, to NF4 with its scales quantised too, or to int8.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

from pydantic import Field

from sftx import Adapter, ConfigError, ModelSpec, hookimpl
from sftx_plugins.adapters.lora import Lora

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from sftx_plugins.adapters.lora_adapter import LoraAdapter

log = logging.getLogger(__name__)

_BLOCK_SIZE = 64
_LEAST_WORTH_SAYING = 0.05
"""A smaller share of the decoder, such as its routers, may stay dense without a word."""


@dataclass(frozen=True, eq=False)
class QLora(Lora):
    """Trains LoRA on a base whose linear layers are quantised to 4 bits, or to 8."""

    bnb_4bit_use_double_quant: Annotated[
        bool, Field(description="Quantise the scales of 4-bit weights too, which saves 0.37 bits a weight.")
    ] = True
    load_in_8bit: Annotated[
        bool, Field(description="Quantise to int8 with a scale for each row, as LLM.int8() does, instead of to NF4.")
    ] = False
    llm_int8_skip_modules: Annotated[
        tuple[str, ...],
        Field(description="Modules whose linear layers stay as they are, besides the output head and modules_to_save."),
    ] = ()

    @hookimpl
    def sftx_adapter(self, spec: ModelSpec) -> Adapter:
        from sftx_plugins.adapters.quantizer import Quantizer

        adapter = cast("LoraAdapter", super().sftx_adapter(spec))
        adapter.quantizer = Quantizer(
            self.find_quantised(spec.skeleton),
            eight_bits=self.load_in_8bit,
            double=self.bnb_4bit_use_double_quant,
        )
        return adapter

    def find_quantised(self, model: PreTrainedModel) -> Sequence[str]:
        """Return the paths of the layers and of the experts' weights to quantise: the decoder's, adapted or not."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        from sftx_plugins.adapters.lora_experts import stacked_weights

        decoder, head = model.get_decoder(), model.get_output_embeddings()
        skipped = (*self.llm_int8_skip_modules, *self.modules_to_save)
        body = next(path for path, module in model.named_modules() if module is decoder)
        matrices: dict[str, int] = {}
        """The number of weights of each matrix that can be quantised, by its path; for experts that of one of them."""
        for name, module in decoder.named_modules(prefix=body):
            # A subclass may read its weight itself.
            if type(module) in (nn.Linear, Conv1D) and module is not head:
                matrices[name] = cast(nn.Linear, module).weight.numel()
            for stack in stacked_weights(module):
                matrices[f"{name}.{stack}"] = module.get_parameter(stack)[0].numel()
        chosen = [path for path in matrices if not _is_skipped(path, skipped)]
        if not self.load_in_8bit:
            chosen = [path for path in chosen if matrices[path] % _BLOCK_SIZE == 0]
        if not chosen:
            raise ConfigError(
                "qlora: no layer of the decoder (nn.Linear, Conv1D or stacked experts) is left to quantise; take lora, "
                "or name fewer modules in llm_int8_skip_modules and modules_to_save"
            )
        self._log_dense(decoder, body, {*chosen}, skipped, [path for path in matrices if path not in chosen])
        return chosen

    def _log_dense(
        self, decoder: nn.Module, body: str, chosen: set[str], skipped: Sequence[str], odd: Sequence[str]
    ) -> None:
        """Warn when much of the decoder stays dense that no option says is to."""
        from torch import nn

        embeddings = {id(p) for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        sizes = {
            name.removesuffix(".weight"): p.numel()
            for name, p in decoder.named_parameters(prefix=body)
            if p.ndim >= 2 and id(p) not in embeddings
        }
        dense = {path: n for path, n in sizes.items() if path not in chosen and not _is_skipped(path, skipped)}
        share = sum(dense.values()) / sum(sizes.values())
        if share < _LEAST_WORTH_SAYING:
            return
        largest = max(dense, key=lambda path: dense[path])
        why = (
            f"the number of its elements is no multiple of {_BLOCK_SIZE}"
            if largest in odd
            else "it belongs to no linear layer, Conv1D or stack of experts"
        )
        log.warning("%.1f %% of the decoder's weights stay dense, such as %s: %s", 100 * share, largest, why)


def _is_skipped(path: str, skipped: Sequence[str]) -> bool:
    return any(f".{name}." in f".{path}." for name in skipped)
