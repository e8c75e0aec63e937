"""The exporter `safetensors`: a model directory that transformers loads, without adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sftx import ExportedModel, Exporter, ExportSource, Rounding, hookimpl

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, eq=False)
class Safetensors:
    """Writes a model directory for transformers: adapters merged in fp32, the base's dtype, tokenizer and template."""

    dtype: Annotated[
        Literal["base", "float32", "bfloat16", "float16"],
        Field(description="Of the weights in the files; base is that of the base model's own files."),
    ] = "base"
    max_shard_size: Annotated[
        str, Field(pattern=r"^\d+(\.\d+)?[KMG]B$", description="Largest file of weights, such as 500MB.")
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
