"""Text that was read in the wrong encoding once and saved so: found by undoing it, which only works where it happened.

UTF-8 is so strict that text of another kind hardly ever passes for it: what does, after going back to the bytes that
the wrong encoding stood for, was UTF-8 before.
"""

from __future__ import annotations

import re
from typing import Final

# What Windows-1252 (with Latin-1 where that has no character) makes of the bytes 0x80 to 0xff.
_HIGH: Final = "".join(
    bytes([byte]).decode("cp1252", "ignore") or bytes([byte]).decode("latin-1") for byte in range(0x80, 0x100)
)
_BYTES: Final = {byte: byte for byte in range(0x80, 0xA0)} | {ord(c): 0x80 + n for n, c in enumerate(_HIGH)}
_LATER: Final = f"[\x80-\x9f{re.escape(_HIGH[:0x40])}]"
# Two bytes: the letters of western languages, Czech and Polish, Greek and Russian. Not before what may well follow a
# letter in good text: a closing quotation mark, a dash, an ellipsis.
_TWO: Final = re.compile(f"[ÂÃÄÅÎÏÐÑ](?![‘’“”»…–—]){_LATER}")
_MORE: Final = re.compile(f"[{_HIGH[0x60:0x70]}]{_LATER}{{2}}|[{_HIGH[0x70:0x75]}]{_LATER}{{3}}")
_CHINESE: Final = re.compile("[\u4e00-\u9fff\ue000-\uf8ff\u3400-\u4dbf]{6,}")
_FAMOUS: Final = ("锟斤拷", "烫烫烫")
"""U+FFFD saved as UTF-8 and read as GBK, twice; memory that Microsoft's compiler filled, read as GBK."""

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


def mojibake(text: str) -> str:
    """The first piece of `text` that is damaged, or nothing.

    UTF-8 that was read as Windows-1252 or Latin-1 (`cafÃ©`, `itâ€™s`), or as GBK (`浣犲ソ`), and U+FFFD where a byte
    could not be read at all. A single sequence of two bytes is not enough, for it may be meant.
    """
    if text.isascii():
        return ""
    if (at := text.find(REPLACEMENT)) >= 0:
        return text[max(0, at - 10) : at + 10]
    for famous in _FAMOUS:
        if famous in text:
            return famous
    for found in _MORE.finditer(text):
        if _was_utf8(found[0]):
            return found[0]
    pairs = [found[0] for found in _TWO.finditer(text) if _was_utf8(found[0])]
    if len(pairs) > 1:
        return pairs[0]
    return next((found[0] for found in _CHINESE.finditer(text) if _was_chinese_utf8(found[0])), "")


def _was_utf8(text: str) -> bool:
    try:
        return bytes(_BYTES[ord(character)] for character in text).decode("utf-8").isprintable()
    except (KeyError, UnicodeDecodeError):
        return False


def _was_chinese_utf8(text: str) -> bool:
    """Two bytes a character on one side and three on the other, so that an end may be cut off."""
    data = text.encode("gb18030", "replace")
    return any(_all_chinese(data[: len(data) - cut]) for cut in range(3))


def _all_chinese(data: bytes) -> bool:
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all("\u3000" <= character <= "\u9fff" or "\uff00" <= character <= "\uffef" for character in decoded)
