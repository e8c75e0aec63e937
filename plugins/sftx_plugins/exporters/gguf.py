"""The exporter `gguf`: a file for llama.cpp and what is built on it, which holds tokenizer and chat template too."""

from __future__ import annotations

import importlib.util
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from sftx import ConfigError, ExportedModel, Exporter, ExportSource, Rounding, hookimpl

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ROUNDINGS: Final[dict[str, Rounding]] = {
    "f32": "half", "f16": "half", "bf16": "half", "q8_0": "8-bit", "q4_k_m": "4-bit",
}  # fmt: skip
"""llama.cpp looks GELU up in a table of fp16 whatever the dtype of the weights is."""


@dataclass(frozen=True, eq=False)
class Gguf:
    """Writes a GGUF file for llama.cpp, Ollama or LM Studio: weights, tokenizer, chat template and stop tokens."""

    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_k_m"],
        Field(
            description="Of the weights. f16 keeps three bits more of a merged weight than bf16, and is refused for "
            "a model with weights beyond its range; q4_k_m needs llama-cpp-python."
        ),
    ] = "f16"

    @hookimpl
    def sftx_exporter(self) -> Exporter:
        return self

    @property
    def rounding(self) -> Rounding:
        return _ROUNDINGS[self.dtype]

    def check(self, config: PretrainedConfig) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError("the package gguf is needed to write a GGUF file; pip install 'sftx[gguf]'")
        if self.dtype == "q4_k_m" and importlib.util.find_spec("llama_cpp") is None:
            raise ConfigError(
                "dtype=q4_k_m is quantised by llama.cpp; pip install 'sftx[llama-cpp]', which compiles it for some "
                "minutes, or choose q8_0"
            )
        from sftx_plugins.exporters.gguf_format import architectures

        architectures.of(config)

    def export(self, source: ExportSource, directory: Path) -> None:
        from sftx_plugins.exporters.gguf_format import file

        file.write(source, self._file(directory), self.dtype)

    def usage(self, directory: Path) -> str:
        file = shlex.quote(str(self._file(directory)))
        return f"llama-cli --model {file} --conversation --jinja"

    def load(self, directory: Path) -> ExportedModel:
        from sftx_plugins.exporters.gguf_format import readers

        return readers.read(self._file(directory))

    def _file(self, directory: Path) -> Path:
        return directory / f"model-{self.dtype}.gguf"
