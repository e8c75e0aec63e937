"""Reads a model directory through mlx-lm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm
import numpy as np
import torch

from sftx_plugins.exporters.transformers_reader import prompt_of

if TYPE_CHECKING:
    from torch import Tensor


class MlxReader:
    """Implements `sftx.ExportedModel`: computes on mlx's device, in the dtype of the files."""

    reader = f"mlx-lm {mlx_lm.__version__}"

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        loaded: Any = mlx_lm.load(str(directory), tokenizer_config=options, **options)
        self._model, self._tokenizer = loaded

    @property
    def stop_ids(self) -> set[int]:
        return set(self._tokenizer.eos_token_ids)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        return prompt_of(self._tokenizer, messages, tools)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        logits_TV = self._model(mx.array([list(token_ids)]))[0].astype(mx.float32)
        return torch.from_numpy(np.array(logits_TV))
