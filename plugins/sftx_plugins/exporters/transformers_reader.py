"""Reads an exported model through transformers alone, for exporters whose directories it loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

if TYPE_CHECKING:
    from torch import Tensor


def prompt_of(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the token ids of a conversation by a tokenizer's chat template, with the generation prompt."""
    ids: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=[dict(tool) for tool in tools] or None,
        add_generation_prompt=True,
        return_dict=False,
    )
    return list(ids)


class TransformersReader:
    """Implements `sftx.ExportedModel`: computes in fp32 with the weights as they are in the files.

    `options`: for both `from_pretrained`, such as `gguf_file`.
    """

    reader = f"transformers {transformers.__version__}"

    def __init__(self, directory: Path, **options: Any) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()

    @property
    def stop_ids(self) -> set[int]:
        ids = self._model.generation_config.eos_token_id
        return set(ids if isinstance(ids, list) else [] if ids is None else [ids])

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        return prompt_of(self._tokenizer, messages, tools)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        logits_TV: Tensor = self._model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return logits_TV


class PeftReader(TransformersReader):
    """Reads an adapter's directory through PEFT, on the base that it names."""

    def __init__(self, directory: Path, **options: Any) -> None:
        import peft

        self.reader = f"peft {peft.__version__}"
        config: Any = peft.PeftConfig.from_pretrained(str(directory))
        base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype=torch.float32, **options)
        self._tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        model: Any = peft.PeftModel.from_pretrained(base, str(directory)).eval()
        model.generation_config = GenerationConfig.from_pretrained(directory)
        self._model = model
