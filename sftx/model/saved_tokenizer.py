"""Writes a run's tokenizer so that whoever reads it back stops where answers end, and gets the ids that were trained.

What transformers saves is changed in tokenizer_config.json alone: the run's own tokenizer stays as it is.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from transformers import AutoTokenizer

from sftx.errors import ModelError, OutputError, one_line
from sftx.model.library_messages import quiet
from sftx.model.names import local_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIG: Final = "tokenizer_config.json"
_FILES: Final = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "*.py",
)  # fmt: skip
"""The files from which a tokenizer is loaded; its chat template is written anew."""
_AS_IN_FILE: Final = {"tokenizer_class": "PreTrainedTokenizerFast"}
"""With this entry transformers takes tokenizer.json as it is; other classes build some of its parts anew."""
_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_OPTIONS_OF_MODEL: Final = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "continuing_subword_prefix")


@dataclass(frozen=True)
class SavedTokenizer:
    """A tokenizer as a run saves it, and as others then read it."""

    entries: dict[str, Any]
    """Entries of tokenizer_config.json that are saved instead of those that transformers writes, or beside them."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer as transformers reads it back."""


def save(tokenizer: PreTrainedTokenizerBase, directory: Path, entries: Mapping[str, Any]) -> Exception | None:
    """Saves the tokenizer with these entries of tokenizer_config.json (see `SavedTokenizer`).

    Where transformers cannot, the files that it was loaded from are copied, and the error is returned. Raises it when
    these are not on this machine.
    """
    failure = None
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # tokenizers that bring code of their own raise anything
        source = local_directory(tokenizer.name_or_path)
        if source is None:
            raise
        failure = error
        (directory / "chat_template.jinja").unlink(missing_ok=True)  # written before the error
        shutil.rmtree(directory / "chat_templates", ignore_errors=True)
        for file in {file for pattern in _FILES for file in source.glob(pattern) if file.is_file()}:
            shutil.copyfile(file, directory / file.name)
        if isinstance(tokenizer.chat_template, str):
            (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    if entries:
        file = directory / _CONFIG
        values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.write_text(json.dumps({**values, **entries}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return failure


def save_and_read_back(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    model_type: str | None,
    *,
    trust_remote_code: bool = False,
) -> SavedTokenizer:
    """Chooses the entries, saves the tokenizer with them into a temporary directory, and reads it. Raises ModelError,
    OutputError.

    `eos_token` becomes the first of `stop_ids`, the token that ends an answer: programs that serve a model stop there.
    `legacy` is kept, which save_pretrained drops although LlamaTokenizer puts spaces elsewhere without it. A class that
    still builds another tokenizer than the one that was saved is replaced by one that does not, where that helps.

    `model_type`: that of the config.json which is saved beside the tokenizer, whose class may depend on it; None where
    there is none, as beside an adapter.
    """
    entries: dict[str, Any] = {}
    if stop_ids and stop_ids[0] != tokenizer.eos_token_id:
        entries["eos_token"] = tokenizer.convert_ids_to_tokens(stop_ids[0])
    if getattr(tokenizer, "legacy", False):
        entries["legacy"] = True

    def read_back(entries: dict[str, Any]) -> SavedTokenizer:
        with tempfile.TemporaryDirectory(prefix="sftx-tokenizer-") as directory, quiet():
            try:
                save(tokenizer, Path(directory), entries)
            except Exception as error:  # tokenizers raises a bare Exception for a full disk
                raise OutputError(
                    f"{directory}: the tokenizer cannot be saved there: {one_line(error)}; make room, or "
                    "choose another place with TMPDIR"
                ) from error
            try:
                if model_type is not None:
                    (Path(directory) / "config.json").write_text(json.dumps({"model_type": model_type}))
                saved = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
            except Exception as error:  # transformers and tokenizers have no common base class
                raise ModelError(
                    f"the tokenizer of {tokenizer.name_or_path} cannot be read back once it is saved: {one_line(error)}"
                ) from error
        return SavedTokenizer(entries, saved)

    saved, own = read_back(entries), _parts(tokenizer)
    if _parts(saved.tokenizer) != own:
        as_in_file = read_back(entries | _AS_IN_FILE)
        if _parts(as_in_file.tokenizer) == own:
            return as_in_file
    return saved


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns what a tokenizer does around its vocabulary, and the vocabulary's size."""
    backend = tokenizer.backend_tokenizer
    parts: dict[str, Any] = {name: _state(getattr(backend, name)) for name in _PARTS}
    parts |= {name: getattr(backend.model, name, None) for name in _OPTIONS_OF_MODEL}
    added = {number: _state(token) for number, token in backend.get_added_tokens_decoder().items()}
    return parts | {"model": type(backend.model), "added tokens": added, "size": backend.get_vocab_size()}


def _state(part: Any) -> Any:
    """Returns a part of a tokenizer as JSON text, or as values; the whole of tokenizer.json would take seconds."""
    return None if part is None else part.__getstate__()
