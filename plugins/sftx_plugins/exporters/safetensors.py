"""The exporter `safetensors`: a model directory that transformers loads, without adapters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import AfterValidator, Field

from sftx import ExportedModel, Exporter, ExportSource, Rounding, hookimpl

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SIZE: Final = r"^(?=.*[1-9])\d+(\.\d+)?[KMG]B$"


def _is_size(text: str) -> str:
    if not re.fullmatch(_SIZE, text):
        raise ValueError("a size such as 500MB or 5GB")
    return text


@dataclass(frozen=True, eq=False)
class Safetensors:
    """Writes a model directory for transformers: adapters merged in fp32, the base's dtype, tokenizer and template."""

    dtype: Annotated[
        Literal["base", "float32", "bfloat16", "float16"],
        Field(description="Of the weights in the files; base is that of the base model's own files."),
    ] = "base"
    max_shard_size: Annotated[
        str,
        AfterValidator(_is_size),
        Field(json_schema_extra={"pattern": _SIZE}, description="Largest file of weights, such as 500MB."),
    ] = "5GB"

    @hookimpl
    def sftx_exporter(self) -> Exporter:
        return self

    @property
    def rounding(self) -> Rounding:
        return "half" if self.dtype in ("bfloat16", "float16") else "none"

    def check(self, config: PretrainedConfig) -> None:
        """Every architecture that transformers has loaded, it saves."""

    def export(self, source: ExportSource, directory: Path) -> None:
        import torch

        dtype = None if self.dtype == "base" else getattr(torch, self.dtype)
        source.save_pretrained(directory, dtype=dtype, max_shard_size=self.max_shard_size)

    def usage(self, directory: Path) -> str:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f'model = AutoModelForCausalLM.from_pretrained("{directory}", dtype="auto")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{directory}")'
        )

    def load(self, directory: Path, *, trust_remote_code: bool = False) -> ExportedModel:
        from sftx_plugins.exporters.transformers_reader import TransformersReader

        return TransformersReader(directory, trust_remote_code=trust_remote_code)
