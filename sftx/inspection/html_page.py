"""A template of a page and JSON become one file that fetches nothing and runs no script but its own.

The template has one inline style, one inline script and the places `{{policy}}` and `{{data}}`. Its script builds
everything with text nodes, so that what the data says is never read as HTML; the policy allows style and script by
their hashes and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any


def filled(template: Path, data: Any) -> str:
    """The whole page. `data`: JSON values, read by the script from the element `data`."""
    page = template.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src '{_hash(page, 'style')}'; script-src '{_hash(page, 'script')}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # Text that spells </script> or <!-- must not end the block that holds it.
    values = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    # Half of a surrogate pair has no UTF-8; the escape that Python writes for it is JSON's own.
    values = values.encode("utf-8", errors="backslashreplace").decode("utf-8")
    head, middle, tail = re.split(r"\{\{policy\}\}|\{\{data\}\}", page)
    return f"{head}{policy}{middle}{values}{tail}"


def _hash(page: str, tag: str) -> str:
    """The source expression of the inline element `tag`, as Content Security Policy has it."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
    assert found is not None
    return "sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
