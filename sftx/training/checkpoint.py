"""What was trained becomes a directory that others load: whole, or not there at all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from sftx.errors import OutputError, PluginError, SftxError, one_line
from sftx.model.language_model import LanguageModel

_CHECKPOINT = re.compile(r"step-(\d+)")


def save(lm: LanguageModel, directory: Path) -> None:
    """Writes adapters in PEFT's form, or the whole model in transformers', and the tokenizer beside it.

    The files are written to a neighbour of `directory` that is then renamed. Raises OutputError; nothing is left then.
    """
    part = directory.with_name(f".{directory.name}.part")
    disable_progress_bar()
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if not lm.adapters:
            lm.model.save_pretrained(part)
        for name, adapter in lm.adapters.items():
            # One adapter is the artefact; several lie side by side in it.
            place = part if len(lm.adapters) == 1 else part / name
            place.mkdir(exist_ok=True)
            adapter.save(place)
            if not any(place.glob("*.safetensors")):
                raise PluginError(f"{adapter}: save wrote no .safetensors file, so what was trained would be lost")
        lm.tokenizer.save_pretrained(part)
        for file in part.rglob("*"):
            if file.is_file():  # safetensors writes for its owner alone
                file.chmod(0o644)
        part.rename(directory)
    except SftxError:
        raise
    except Exception as error:  # a full disk is an OSError, a SafetensorError, or tokenizers' bare Exception
        free = shutil.disk_usage(_existing(directory)).free
        raise OutputError(
            f"{directory}: cannot be written: {one_line(error)} ({free / 1e6:.0f} MB free there); "
            "make room or choose another output_dir"
        ) from error
    finally:
        enable_progress_bar()
        shutil.rmtree(part, ignore_errors=True)


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def prune(checkpoints: Path, limit: int | None) -> None:
    """Removes the oldest checkpoints beyond `limit`."""
    if limit is None:
        return
    found = sorted(
        (int(match[1]), path) for path in checkpoints.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))
    )
    for _, path in found[:-limit]:
        shutil.rmtree(path, ignore_errors=True)
