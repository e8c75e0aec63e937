"""Writes a GGUF file: one tensor after the other, so that no second copy of the model is held in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sftx import ConfigError, ExportSource, PluginError
from sftx_plugins.exporters.gguf_format import architectures, vocabulary

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType
    from torch import Tensor

_FILE_TYPES: Final = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_ALWAYS_WIDE: Final = (
    "_norm.weight",
    ".bias",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "position_embd.weight",
)
"""Ends of the names of tensors that llama.cpp computes in fp32."""


def write(source: ExportSource, file: Path, dtype: str) -> None:
    """Write the merged model and the tokenizer of a run into a file. Raises ConfigError.

    `dtype`: f32, f16, bf16, q8_0 or q4_k_m; vectors, and what llama.cpp computes in fp32, are written in fp32.
    """
    if dtype == "q4_k_m":  # whose choice of tensors for more bits is llama.cpp's
        wide = file.with_suffix(".f16.gguf")
        _write(source, wide, "f16")
        _quantize(wide, file)
        wide.unlink()
    else:
        _write(source, file, dtype)


def _quantize(wide: Path, file: Path) -> None:
    import llama_cpp

    from sftx_plugins.exporters.gguf_format.llama_cpp_log import quiet

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    with quiet():
        status = llama_cpp.llama_model_quantize(str(wide).encode(), str(file).encode(), options)
    if status:
        raise PluginError(f"llama.cpp could not quantise {wide}: status {status}")


def _write(source: ExportSource, file: Path, dtype: str) -> None:
    import gguf
    import numpy as np

    model: Any = source.merge()
    architecture, config = architectures.of(model.config)
    writer = gguf.GGUFWriter(file, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(vocabulary.model_name(Path(source.base_model).name, source.tokenizer))
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architectures.write_metadata(writer, architecture, config)
    defaults = source.generation_config.eos_token_id
    vocabulary.write(
        writer,
        source.tokenizer,
        num_tokens=model.get_input_embeddings().weight.shape[0],
        stop_ids=source.stop_ids,
        more=defaults if isinstance(defaults, list) else [] if defaults is None else [defaults],
    )
    planned: list[tuple[str, Tensor, Callable[[Tensor], Tensor], GGMLQuantizationType]] = []
    for name, parameter, change in architectures.tensors(architecture, config, model):
        shape = tuple(change(parameter.to("meta")).shape)
        kind = _kind(name, shape, dtype)
        planned.append((name, parameter, change, kind))
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, parameter, change, kind in planned:
            writer.write_tensor_data(_data(name, change(parameter.detach()), kind))
    finally:
        writer.close()


def _kind(name: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    import gguf

    if len(shape) == 1 or name.endswith(_ALWAYS_WIDE):
        return gguf.GGMLQuantizationType.F32
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]
    if dtype == "q8_0" and shape[-1] % block:  # a row must be whole blocks
        dtype = "f16"
    return gguf.GGMLQuantizationType[dtype.upper()]


def _data(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    import gguf
    import torch

    values = tensor.float().contiguous()
    if kind == gguf.GGMLQuantizationType.F16:
        largest = values.abs().max().item()
        if largest > torch.finfo(torch.float16).max:
            raise ConfigError(f"{name} has a value of {largest:.3g}, beyond what f16 can hold; choose bf16 or f32")
    data: np.ndarray[Any, Any] = gguf.quants.quantize(values.numpy(), kind)
    return data
