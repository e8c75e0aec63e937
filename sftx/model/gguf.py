"""Reads GGUF files, llama.cpp's format, which hold weights (often of 4 bits), configuration and tokenizer.

A file is converted into a directory of the cache once, as safetensors in fp32: reading the GGUF file of the embedded
model takes 15 s, reading the converted files 0.25 s.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import re
from pathlib import Path
from typing import Final

from sftx.atomic_files import atomic_directory
from sftx.errors import ModelError, OutputError, one_line
from sftx.paths import cache_dir

_PART_OF_SEVERAL: Final = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")

_DESCRIPTION: Final = "converted_from.txt"

log = logging.getLogger(__name__)


def find(path: Path) -> Path | None:
    """Returns the GGUF file that a model's path names: itself, or the only one of a directory without a config.json.

    Raises ModelError when a directory has several, or the model cannot be read for another obvious reason.
    """
    if path.is_dir():
        files = sorted(path.glob("*.gguf")) if not (path / "config.json").exists() else []
        if files[1:]:
            raise ModelError(
                f"model {path}: holds {len(files)} GGUF files; name one of them: {', '.join(f.name for f in files[:8])}"
            )
    else:
        files = [path] if path.suffix.lower() == ".gguf" else []
    if not files:
        return None
    if (match := _PART_OF_SEVERAL.search(files[0].name)) and int(match[1]) > 1:
        raise ModelError(f"model {path}: is one of {int(match[1])} parts; join them with llama-gguf-split --merge")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"model {path}: the package gguf is needed to read a GGUF file; pip install gguf")
    return files[0]


def place_of(file: Path) -> Path:
    """Returns where in the cache a GGUF file is converted to; another content has another place."""
    status = file.stat()
    version = importlib.metadata.version("transformers")
    identity = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {version}"
    return cache_dir() / "gguf" / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def convert(file: Path, target: Path, name: str, description: str) -> None:
    """Converts a GGUF file into the directory `target`, unless that exists. Raises ModelError and OutputError.

    `description` says what its weights are, for the directory has no public name; `describe` returns it.
    """
    if target.is_dir():
        return
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):  # other processes wait, and then find it
            if not target.is_dir():
                log.info("converting %s into %s (once)", name, target)
                _convert(file, target, name, description)
    except (OSError, OutputError) as error:
        raise OutputError(f"{one_line(error)}; set SFTX_CACHE to a directory that can be written to") from error


def describe(directory: Path) -> str | None:
    """Returns what the weights of a converted directory are, None of any other one."""
    file = directory / _DESCRIPTION
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _convert(file: Path, target: Path, name: str, description: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    from sftx.model.library_messages import passed_on

    with passed_on(f"model {name}"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            # save_pretrained refuses to write a model that is not dequantised.
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
            )
        except Exception as error:  # transformers and gguf have no common base class
            raise ModelError(
                f"model {name}: transformers cannot read this GGUF file: {one_line(error)}; take the model's "
                "safetensors instead"
            ) from error
        with atomic_directory(target) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            (part / _DESCRIPTION).write_text(f"{description}\n", encoding="utf-8")
