"""Uploads an artefact to the Hugging Face hub: what is uploaded, and the upload itself. Imports no torch."""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from safetensors import SafetensorError, safe_open

from sftx.checkpoint import layout
from sftx.errors import ConfigError, OutputError, hide, one_line

_ADAPTER_CONFIG, _CARD = "adapter_config.json", "README.md"
_LEFT_OUT: Final = (
    ".*", "__pycache__", layout.CHECKPOINTS, layout.EXPORT, layout.RUN_STATE, layout.TRAINER_STATE,
    f"{layout.OPTIMIZER}*.safetensors", "*.part",
)  # fmt: skip
"""Files and directories that are no part of an artefact."""
_HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Upload:
    """The files of an artefact, as they will be in the repository."""

    directory: Path
    files: dict[str, Path | bytes]
    """By their paths there: a file here, or the content where it is another one than here."""

    def size(self, name: str) -> int:
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def find_artefact(place: Path) -> Path:
    """Return the directory to upload: the result of a run, or `place` itself. Raises OutputError, ConfigError."""
    if not place.is_dir():
        raise ConfigError(f"{place}: no such directory; name a run, or a directory with an adapter or a model")
    if not (place / layout.RUN).exists():
        return place
    for name in (layout.ADAPTER, layout.MODEL):
        if (place / name).is_dir():
            return place / name
    raise OutputError(f"{place}: this run has no result yet; finish it with sftx run --resume, or push a checkpoint")


def collect(directory: Path, *, base: str | None = None) -> Upload:
    """Return what is to be uploaded of an adapter, a model or an export.

    `base`: the hub id of the base model, in place of a directory of this machine that the files name. Raises
    OutputError for a directory without weights, ConfigError for an adapter whose base only this machine has.
    """
    files: dict[str, Path | bytes] = {}
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        if path.is_file() and not any(fnmatch.fnmatch(part, left_out) for part in parts for left_out in _LEFT_OUT):
            files["/".join(parts)] = path
    _check_complete(directory, files)
    upload = Upload(directory, files)
    _name_base(upload, base)
    return upload


def _check_complete(directory: Path, files: dict[str, Path | bytes]) -> None:
    names = {name.rpartition("/")[2] for name in files}
    kinds = {_ADAPTER_CONFIG: "adapter_model.*", "config.json": "*.safetensors"}
    weights = next((pattern for name, pattern in kinds.items() if name in names), None)
    if weights is None and not fnmatch.filter(names, "*.gguf"):
        raise OutputError(
            f"{directory}: holds no adapter (adapter_config.json), model (config.json) or GGUF file; name a run, or "
            "the directory of its result or of an export"
        )
    if weights is not None and not fnmatch.filter(names, weights):
        raise OutputError(f"{directory}: has no weights ({weights}); it is not complete")
    for name in fnmatch.filter(files, "*.safetensors"):
        try:
            with safe_open(directory / name, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{directory / name}: is damaged, or not complete: {one_line(error)}; write it again"
            ) from error
    for index in fnmatch.filter(files, "*.safetensors.index.json"):
        shards = set(_read_json(files[index]).get("weight_map", {}).values())
        if missing := sorted(shards - names):
            raise OutputError(f"{directory}: {missing[0]} is missing, which {index} names; it is not complete")


def _name_base(upload: Upload, base: str | None) -> None:
    """Replace the directory of a base model by its hub id, in the adapter's configuration and in the card."""
    local: set[str] = set()
    for name in [name for name in upload.files if name.rpartition("/")[2] == _ADAPTER_CONFIG]:
        config = _read_json(upload.files[name])
        named = str(config.get("base_model_name_or_path") or "")
        if _is_hub_id(named):
            continue
        if base is None:
            raise ConfigError(
                f"{upload.directory}: its base model is {named or 'not named'}, which nobody else has; give the base's "
                "hub id with --base OWNER/NAME, or push a merged model (sftx merge)"
            )
        local.add(named)
        config["base_model_name_or_path"] = base
        upload.files[name] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    for name in [name for name in upload.files if name.rpartition("/")[2] == _CARD]:
        content = upload.files[name]
        assert isinstance(content, Path)
        upload.files[name] = _card(content.read_text(encoding="utf-8"), local, base).encode()


def _card(text: str, local: set[str], base: str | None) -> str:
    """Return a card whose base model is a hub id, or is not named: the hub refuses any other."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    front: Any = yaml.safe_load(match[1]) if match else None
    if match and isinstance(front, dict) and not _is_hub_id(named := str(front.get("base_model", "a/b"))):
        local = local | {named}
        if base is None:
            del front["base_model"]
            tags = [tag for tag in front.get("tags") or () if named not in str(tag)]
            front = {**front, "tags": tags}
            text = f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n" + text[match.end() :]
    for directory in filter(None, local if base is not None else ()):
        text = text.replace(directory, base or "")
    return text


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _read_json(content: Path | bytes) -> dict[str, Any]:
    try:
        value: Any = json.loads(content if isinstance(content, bytes) else content.read_bytes())
    except (OSError, ValueError) as error:
        raise OutputError(f"{content!s}: cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise OutputError(f"{content!s}: is no JSON object")
    return value


def check_name(repository: str) -> None:
    """Raise ConfigError for what is no name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise ConfigError(f"{repository}: is no name of a repository of the hub (owner/name, or a name)") from None


def push(upload: Upload, repository: str, *, private: bool) -> str:
    """Make the repository unless there is one, commit all files to it, and return its address.

    The token is the one that `hf auth login` or HF_TOKEN left. Raises OutputError that says what the hub answered.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors, get_token

    if (token := get_token()) is not None:
        hide(token)
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(address.repo_id).private:
            raise OutputError(f"{repository}: is there already, and is public; choose another name, or leave --private")
        operations = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
        api.create_commit(address.repo_id, operations, commit_message=f"Upload {upload.directory.name} with sftx")
    except OutputError:
        raise
    except errors.OfflineModeIsEnabled:
        raise OutputError(f"{repository}: HF_HUB_OFFLINE is set, with which nothing can be uploaded") from None
    except errors.LocalTokenNotFoundError:
        raise OutputError(f"{repository}: there is no token; log in with `hf auth login`, or set HF_TOKEN") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        said = one_line(Exception(error.server_message)) if error.server_message else f"status {status}"
        hints = {
            401: "; log in with `hf auth login`, or set HF_TOKEN to a token that may write",
            403: "; the token may not write there: choose your own name as owner, or a token that may",
        }
        raise OutputError(f"{repository}: the hub refuses the upload: {said}{hints.get(status, '')}") from error
    except Exception as error:  # raised by whichever HTTP client huggingface_hub uses, or for the card
        raise OutputError(f"{repository}: cannot be uploaded: {one_line(error)}") from error
    return str(address)
