"""The exporter `mlx`: a model directory that mlx-lm loads, converted by mlx-lm itself from the merged model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sftx import ConfigError, ExportedModel, Exporter, ExportSource, Rounding, hookimpl

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, eq=False)
class Mlx:
    """Writes a model directory for mlx-lm, with weights of 4 or 8 bits where that is asked for."""

    q_bits: Annotated[Literal[4, 8] | None, Field(description="Bits of quantised weights; null keeps them dense.")] = (
        None
    )
    q_group_size: Annotated[
        Literal[32, 64, 128], Field(description="Quantised weights that share a scale and an offset.")
    ] = 64
    dtype: Annotated[
        Literal["base", "float32", "bfloat16", "float16"],
        Field(description="Of weights that are not quantised; base is that of the base model's own files."),
    ] = "base"

    @hookimpl
    def sftx_exporter(self) -> Exporter:
        return self

    @property
    def rounding(self) -> Rounding:
        if self.q_bits is not None:
            return "4-bit" if self.q_bits == 4 else "8-bit"
        return "half" if self.dtype in ("bfloat16", "float16") else "none"

    def check(self, config: PretrainedConfig) -> None:
        if importlib.util.find_spec("mlx_lm") is None or importlib.util.find_spec("mlx") is None:
            raise ConfigError("the format needs mlx-lm, which is not installed: pip install 'sftx[mlx]'")
        known = _architectures()
        names = list(config.architectures or ())
        if not set(names) & known:
            raise ConfigError(
                f"mlx-lm has no {', '.join(names) or type(config).__name__}; it has {', '.join(sorted(known))}"
            )

    def export(self, source: ExportSource, directory: Path) -> None:
        import torch
        from mlx_lm.convert import convert

        merged, converted = directory / "merged", directory / "converted"
        merged.mkdir()
        source.save_pretrained(merged, dtype=None if self.dtype == "base" else getattr(torch, self.dtype))
        _flatten_rope(merged / "config.json")
        with contextlib.redirect_stdout(io.StringIO()):
            convert(
                str(merged),
                str(converted),
                quantize=self.q_bits is not None,
                q_bits=self.q_bits,
                q_group_size=self.q_group_size if self.q_bits is not None else None,
            )
        shutil.rmtree(merged)
        for file in converted.iterdir():
            file.rename(directory / file.name)
        converted.rmdir()

    def usage(self, directory: Path) -> str:
        place = shlex.quote(str(directory))
        return f"mlx_lm.chat --model {place}\nmlx_lm.server --model {place}"

    def load(self, directory: Path, *, trust_remote_code: bool = False) -> ExportedModel:
        from sftx_plugins.exporters.mlx_reader import MlxReader

        return MlxReader(directory, trust_remote_code=trust_remote_code)


def _flatten_rope(file: Path) -> None:
    """Give a configuration the names that rotary embeddings had before transformers 5, which mlx-lm reads.

    Without them it takes its default base, 10,000, whatever the model's own is.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        rope = (part or {}).get("rope_parameters")
        if not rope:
            continue
        if "full_attention" in rope:  # one for each kind of layer, as Gemma has them
            part["rope_local_base_freq"] = rope.get("sliding_attention", {}).get("rope_theta")
            rope = rope["full_attention"]
        old = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if rope.get("rope_type", "default") != "default":
            old["rope_scaling"] = rope
        part |= old
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _architectures() -> set[str]:
    """Return the architectures of transformers for which mlx-lm has a module, by the model type."""
    from mlx_lm.utils import MODEL_REMAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def has(model_type: str) -> bool:
        name = MODEL_REMAPPING.get(model_type, model_type)
        return name.isidentifier() and importlib.util.find_spec(f"mlx_lm.models.{name}") is not None

    return {architecture for model_type, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if has(model_type)}
