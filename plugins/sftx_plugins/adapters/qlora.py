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
    from transformers import PreTrainedModel

    from sftx_plugins.adapters.lora_adapter import LoraAdapter

log = logging.getLogger(__name__)

_BLOCK_SIZE = 64


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
        """Return the paths of the linear layers to quantise: those of the decoder, adapted or not."""
        from torch import nn

        decoder, head = model.get_decoder(), model.get_output_embeddings()
        skipped = (*self.llm_int8_skip_modules, *self.modules_to_save)
        body = next(path for path, module in model.named_modules() if module is decoder)
        # A subclass may read its weight itself.
        linear = {
            f"{body}.{name}": module
            for name, module in decoder.named_modules()
            if type(module) is nn.Linear and module is not head
        }
        kept = [path for path in linear if any(f".{name}." in f".{path}." for name in skipped)]
        chosen = {path: module.weight for path, module in linear.items() if path not in kept}
        if not self.load_in_8bit and (odd := [path for path, w in chosen.items() if w.numel() % _BLOCK_SIZE]):
            log.warning(
                "%d linear layers stay dense, since the number of their weights is no multiple of %d (first: %s)",
                len(odd), _BLOCK_SIZE, odd[0],
            )  # fmt: skip
            chosen = {path: weight for path, weight in chosen.items() if path not in odd}
        if not chosen:
            raise ConfigError(
                "qlora: no linear layer (nn.Linear) of the decoder is left to quantise; take lora, or name fewer "
                "modules in llm_int8_skip_modules and modules_to_save"
            )
        others = sum(p.numel() for p in decoder.parameters() if p.ndim == 3)
        if others > sum(weight.numel() for weight in chosen.values()):
            log.warning("%.1f billion weights of stacked experts stay dense: they are no linear layers", others / 1e9)
        return list(chosen)
