"""The exporter `vllm`: an adapter that vLLM serves beside its base, or a merged model where it would not."""

from __future__ import annotations

import importlib.util
import json
import logging
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field

from sftx import ConfigError, ExportedModel, Exporter, ExportSource, Rounding, hookimpl

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's --max-lora-rank (`MaxLoRARanks` in vllm/config/lora.py) that every version takes."""
_CONFIG: Final = "adapter_config.json"
_NAME: Final = "trained"


@dataclass(frozen=True, eq=False)
class Vllm:
    """Writes an adapter that vLLM serves beside its base where its rules allow that, else a merged model."""

    adapter: Annotated[
        bool | None,
        Field(description="true: the adapter, or an error that says why vLLM refuses it; false: a merged model."),
    ] = None
    dtype: Annotated[
        Literal["base", "float32", "bfloat16", "float16"],
        Field(description="Of a merged model's weights in the files; base is that of the base model's own files."),
    ] = "base"
    max_shard_size: Annotated[
        str, Field(pattern=r"^\d+(\.\d+)?[KMG]B$", description="Largest file of weights, such as 500MB.")
    ] = "5GB"

    @hookimpl
    def sftx_exporter(self) -> Exporter:
        return VllmExporter(self)


class VllmExporter:
    """Implements `sftx.Exporter`."""

    def __init__(self, options: Vllm) -> None:
        self._options = options
        self._served = ""
        """What follows `vllm serve` before the adapter's directory; empty for a merged model."""

    @property
    def rounding(self) -> Rounding:
        return "half" if self._options.dtype in ("bfloat16", "float16") else "none"

    def check(self, config: PretrainedConfig) -> None:
        """Every architecture is written. Which ones vLLM serves depends on its version, and is not checked."""
        if self._options.adapter is not False and importlib.util.find_spec("peft") is None:
            raise ConfigError(
                "an adapter is compared with the run through peft, which is not installed: pip install 'sftx[vllm]', "
                "or set vllm.adapter=false for a merged model"
            )

    def export(self, source: ExportSource, directory: Path) -> None:
        import torch

        reasons = ["adapter: false"]
        if self._options.adapter is not False:
            reasons = self._export_adapter(source, directory)
            if not reasons:
                return
            if self._options.adapter:
                raise ConfigError(f"vLLM would not serve the adapter: {'; '.join(reasons)}")
            log.info("a merged model is written, since vLLM would not serve the adapter: %s", "; ".join(reasons))
        dtype = None if self._options.dtype == "base" else getattr(torch, self._options.dtype)
        source.save_pretrained(directory, dtype=dtype, max_shard_size=self._options.max_shard_size)

    def _export_adapter(self, source: ExportSource, directory: Path) -> list[str]:
        """Write the adapter unless vLLM would refuse it; return why it would."""
        import torch
        from safetensors import safe_open

        if not source.lm.adapters:
            return ["there is none: the whole model was trained"]
        if len(source.lm.adapters) > 1:
            return [f"there are {len(source.lm.adapters)}, and vLLM adds one to a request"]
        if any(parameter.dtype in (torch.uint8, torch.int8) for parameter in source.lm.model.parameters()):
            return ["it was trained on quantised weights, and vLLM would add it to those of the base's files"]
        source.save_adapter(directory)
        config: dict[str, Any] = {}
        names: list[str] = []
        if (directory / _CONFIG).exists():
            config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
            with safe_open(directory / "adapter_model.safetensors", framework="pt") as tensors:
                names = list(tensors.keys())
        reasons = refusals(config, names)
        if reasons:
            for path in directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            rank = next(rank for rank in _RANKS if rank >= config["r"])
            self._served = f"{shlex.quote(source.base_model)} --enable-lora --max-lora-rank {rank}"
        return reasons

    def usage(self, directory: Path) -> str:
        place = shlex.quote(str(directory))
        if not self._served:
            return f"vllm serve {place}"
        # The base's own template and stop tokens are not those that the adapter was trained with.
        return (
            f"vllm serve {self._served} --lora-modules {_NAME}={place} --tokenizer {place} --generation-config {place}"
        )

    def load(self, directory: Path, *, trust_remote_code: bool = False) -> ExportedModel:
        from sftx_plugins.exporters.transformers_reader import PeftReader, TransformersReader

        reader = PeftReader if (directory / _CONFIG).exists() else TransformersReader
        return reader(directory, trust_remote_code=trust_remote_code)


def refusals(config: Mapping[str, Any], tensors: Iterable[str]) -> list[str]:
    """Return why vLLM would not serve an adapter, or not as it was trained, by its adapter_config.json and tensors.

    https://github.com/vllm-project/vllm: `PEFTHelper` in vllm/lora/peft_helper.py, which reads no other entries than
    the first five, and `LoRAModel` in vllm/lora/lora_model.py.
    """
    if config.get("peft_type") != "LORA":
        return [f"its kind is {config.get('peft_type') or 'none of PEFT'}, and vLLM knows LoRA alone"]
    reasons = []
    if config.get("use_dora"):
        reasons.append("it is DoRA (use_dora), whose magnitudes vLLM does not load")
    if config.get("modules_to_save"):
        reasons.append(f"it has modules trained in full ({', '.join(config['modules_to_save'])}), which vLLM refuses")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        reasons.append("it has biases, which vLLM refuses")
    if config["r"] > _RANKS[-1]:
        reasons.append(f"its rank is {config['r']}, and vLLM's largest one {_RANKS[-1]}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        reasons.append("layers have ranks or alphas of their own, and vLLM scales all by r and lora_alpha")
    if config.get("trainable_token_indices"):
        reasons.append("it trains rows of single tokens, which most versions of vLLM leave out")
    if config.get("target_parameters"):
        reasons.append("it adapts weights of stacked experts, whose form differs between versions of vLLM")
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if any("lora_embedding" in name for name in others) or any(".lm_head." in name for name in tensors):
        reasons.append("it adapts the embedding or the output head, which vLLM does for some models only")
    elif others and not reasons:
        reasons.append(f"it has a tensor that is no A or B of a linear layer ({others[0]})")
    return reasons
