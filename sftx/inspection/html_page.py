"""A page template and JSON data become one HTML file that fetches nothing and runs no script but its own.

A template holds one inline style, one inline script and the placeholders `{{policy}}`, `{{data}}` and, in the script,
`{{common}}`, which stands for `common.js`. The script builds the page from text nodes, so that data is never parsed as
HTML; the Content Security Policy allows the style and the script by their hashes and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Final

_COMMON_SCRIPT: Final = Path(__file__).with_name("common.js")
"""Functions that the script of every page begins with, where it has {{common}}."""


def fill_template(template: Path, data: Any) -> str:
    """Return the page. `data` holds JSON values, which the page's script reads from its element `data`."""
    page = template.read_text(encoding="utf-8").replace("{{common}}", _COMMON_SCRIPT.read_text(encoding="utf-8"))
    policy = (
        f"default-src 'none'; style-src '{_source_hash(page, 'style')}'; "
        f"script-src '{_source_hash(page, 'script')}'; base-uri 'none'; form-action 'none'"
    )
    # Text such as </script> or <!-- must not end the script element that holds it.
    values = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    # A lone surrogate has no UTF-8 form; Python's escape for it is also JSON's.
    values = values.encode("utf-8", errors="backslashreplace").decode("utf-8")
    head, middle, tail = re.split(r"\{\{policy\}\}|\{\{data\}\}", page)
    return f"{head}{policy}{middle}{values}{tail}"


def _source_hash(page: str, tag: str) -> str:
    """Return the hash of the inline element `tag` in the form that a Content Security Policy uses."""
    element = re.search(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
    assert element is not None
    return "sha256-" + base64.b64encode(hashlib.sha256(element[1].encode()).digest()).decode()
