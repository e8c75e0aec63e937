"""Shared by the metrics: optional libraries, strict JSON, and scripts that put no spaces between words."""

from __future__ import annotations

import importlib
import json
import re
from typing import Any, Final

from sftx import PluginError

SPACELESS: Final = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # Japanese, Chinese
)
"""Matches a character of a script that puts no spaces between words."""


def import_library(module: str, distribution: str) -> Any:
    """Return the module of an optional library. Raises PluginError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PluginError(f"needs the library {distribution}; pip install {distribution}, or sftx[metrics]") from error


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError for other text, and for NaN, which Python would accept."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
