"""Asks the Hugging Face hub whether it has a model or a dataset: once and briefly.

Without a network, libraries that load from the hub try for a minute, file by file. huggingface_hub is imported when it
is needed.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path
from typing import Final, Literal

from sftx.errors import SftxError, did_you_mean, one_line

RepoType = Literal["model", "dataset"]

_TIMEOUT_S: Final = 5.0
_RESOLVER_S: Final = 3.0
"""Seconds more for the system's name resolution, which has a timeout of its own."""


class UnreachableError(SftxError):
    """The hub did not answer, which says nothing about what it has."""


def commit(name: str, repo_type: RepoType) -> str:
    """Return the commit of a repository's main branch.

    Raises SftxError that names both possibilities, a directory and a repository; UnreachableError when only the first
    is known. `name` is no file or directory.
    """
    found, problem, is_reached = _ask(name, repo_type)
    if found is not None:
        return found
    what = "directory" if repo_type == "model" else "file or directory"
    message = f"{name}: no such {what} (looked in {Path.cwd()}{nearest(name)}), and {problem}"
    raise SftxError(message) if is_reached else UnreachableError(message)


def go_offline() -> None:
    """Make the libraries of this process use what was downloaded before, as HF_HUB_OFFLINE=1 does from its start."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def nearest(name: str) -> str:
    """Return `"; did you mean 'gemma-3-270m'?"` for the nearest name of the directory in which `name` is missing."""
    path = Path(name).expanduser()
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    return did_you_mean(path.name, names)


@cache
def _ask(name: str, repo_type: RepoType) -> tuple[str | None, str, bool]:
    """Return the commit, or what is wrong and whether the hub was reached."""
    answers: list[tuple[str | None, str, bool]] = []
    # A thread of its own, since nothing else ends a name resolution that hangs.
    thread = threading.Thread(target=lambda: answers.append(_request(name, repo_type)), daemon=True)
    thread.start()
    thread.join(_TIMEOUT_S + _RESOLVER_S)
    return answers[0] if answers else (None, _unreachable("it does not answer"), False)


def _request(name: str, repo_type: RepoType) -> tuple[str | None, str, bool]:
    from huggingface_hub import HfApi, errors

    if is_offline():
        return None, f"HF_HUB_OFFLINE is set, with which only a {repo_type} that was downloaded before is found", False
    try:
        api = HfApi()
        ask = api.model_info if repo_type == "model" else api.dataset_info
        return str(ask(name, timeout=_TIMEOUT_S).sha), "", True
    except errors.HFValidationError:
        return None, "no name of a repository of the hub (owner/name)", True
    except errors.RepositoryNotFoundError:
        return None, f"no such {repo_type} on the hub; a private one needs `hf auth login`", True
    except errors.HfHubHTTPError as error:
        return None, f"the hub answers: {one_line(error)}", False
    except Exception as error:  # raised by whichever HTTP client huggingface_hub uses
        return None, _unreachable(one_line(error, max_chars=120)), False


def _unreachable(reason: str) -> str:
    return f"the hub cannot be reached ({reason}); HF_HUB_OFFLINE=1 uses what was downloaded before"
