"""Splits the text of an answer into the reasoning between tags and the answer itself.

Every parser reads thoughts here. It has to happen while a row is parsed: a tag in the text of a row never becomes a
control token later, so a thought that stays in the text would be trained as the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from sftx import DataError, Location

_CLOSING: Final[Mapping[str, str]] = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<seed:think>": "</seed:think>",
    "<mm:think>": "</mm:think>",
    "[think]": "[/think]",
    "◁think▷": "◁/think▷",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|start_thinking|>": "<|end_thinking|>",
}
"""The tag that closes each opening tag. Upper and lower case are the same, as in Mistral's `[THINK]`."""
_ANY: Final = "|".join(re.escape(tag) for pair in _CLOSING.items() for tag in pair)
_TAG: Final = re.compile(_ANY, re.IGNORECASE)
_FIRST_SIGNS: Final = frozenset(tag[0] for pair in _CLOSING.items() for tag in pair)
"""The signs that tags begin with. A text without any is searched for them in a tenth of the pattern's time."""
# A tag, or a pair of tags, between quotation marks; then a tag that is not.
_QUOTED_OR_TAG: Final = rf"(?<!\w)[\"'“‘«「](?:{_ANY})(?:[^\"'\n]*(?:{_ANY}))?[\"'”’»」](?!\w)|(?P<tag>{_ANY})"
_IN_CODE: Final = re.compile(_QUOTED_OR_TAG, re.IGNORECASE)
_IN_TEXT: Final = re.compile(rf"(?P<block>```.*?```|~~~.*?~~~)|`[^`\n]+`|{_QUOTED_OR_TAG}", re.IGNORECASE | re.DOTALL)
_ADVICE: Final = "; expected one thought, before the answer; correct the tags, or write one that is mentioned as `code`"


def split_reasoning(text: str, name: str, where: Location) -> tuple[str, str]:
    """Split `<think>reasoning</think>answer` into reasoning and answer; return ("", text) for a text without tags.

    `reasoning</think>answer` is split as well: so answer models whose prompt ends in `<think>`. The newlines that the
    templates of Qwen3 and DeepSeek-R1 write around both are stripped, and nothing else. A tag that is only mentioned,
    in code or between quotation marks, is text. Raises DataError for all other tags: what they mean is not certain.
    """
    if not (any(sign in text for sign in _FIRST_SIGNS) and _TAG.search(text)):
        return "", text
    opening = _TAG.match(text, len(text) - len(text.lstrip()))
    if opening is not None and opening[0].lower() in _CLOSING:
        close = re.compile(re.escape(_CLOSING[opening[0].lower()]), re.IGNORECASE).search(text, opening.end())
        if close is None:
            raise DataError(f"{where}: {name} begins with {opening[0]}, which nothing closes{_ADVICE}")
        reasoning, answer = text[opening.end() : close.start()], text[close.end() :]
    else:
        tag = find_tag(text)
        if tag is None:
            return "", text
        if tag[0].lower() in _CLOSING:
            raise DataError(f"{where}: {name} has {tag[0]} after other text{_ADVICE}")
        reasoning, answer = text[: tag.start()], text[tag.end() :]
    for part, place in ((reasoning, "inside its thought"), (answer, "after its thought")):
        if (tag := find_tag(part)) is not None:
            raise DataError(f"{where}: {name} has {tag[0]} {place}{_ADVICE}")
    return reasoning.strip("\n"), answer.lstrip("\n")


def find_tag(text: str) -> re.Match[str] | None:
    """Return the first tag in a text that is not only mentioned, or None.

    A mentioned tag is in code or between quotation marks. In a block of code the tags have to be pairs: a single one
    ends a thought that holds the beginning of the block.
    """
    if not _TAG.search(text):
        return None
    for match in _IN_TEXT.finditer(text):
        if match["tag"]:
            return match
        if match["block"]:
            tags = [tag for tag in _IN_CODE.finditer(text, *match.span()) if tag["tag"]]
            names = [tag[0].lower() for tag in tags]
            if [_CLOSING.get(name) for name in names[::2]] != names[1::2]:
                return tags[0]
    return None
