"""Find text that was decoded with the wrong encoding once and saved so.

The damage is undone to prove it: UTF-8 is so strict that other text hardly ever passes for it, so what decodes as UTF-8
after going back to the bytes that the wrong encoding stood for was UTF-8 before. `ftfy.badness` is not used: it calls
`MANHÃ”, disse` and `”Å” och ”Ä”` mojibake, and it does not know Chinese that was read as GBK.
"""

from __future__ import annotations

import re
from typing import Final

# The characters that Windows-1252 (or Latin-1, where that has none) has for the bytes 0x80 to 0xff.
_HIGH: Final = "".join(
    bytes([byte]).decode("cp1252", "ignore") or bytes([byte]).decode("latin-1") for byte in range(0x80, 0x100)
)
_BYTES: Final = {byte: byte for byte in range(0x80, 0xA0)} | {ord(c): 0x80 + n for n, c in enumerate(_HIGH)}
_CONTINUATION: Final = f"[\x80-\x9f{re.escape(_HIGH[:0x40])}]"
# UTF-8 of two bytes for western, Czech, Polish, Greek and Russian letters. Punctuation that often follows such a letter
# in good text (a closing quotation mark, a dash, an ellipsis) does not count as the second byte.
_TWO_BYTES: Final = re.compile(f"[ÂÃÄÅÎÏÐÑ](?![‘’“”»…–—]){_CONTINUATION}")
_MORE_BYTES: Final = re.compile(f"[{_HIGH[0x60:0x70]}]{_CONTINUATION}{{2}}|[{_HIGH[0x70:0x75]}]{_CONTINUATION}{{3}}")
_CHINESE: Final = re.compile("[\u4e00-\u9fff\ue000-\uf8ff\u3400-\u4dbf]{6,}")
_KNOWN: Final = ("锟斤拷", "烫烫烫")
"""U+FFFD saved as UTF-8 and read as GBK, twice; and memory filled by Microsoft's debug runtime, read as GBK."""

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


def find_mojibake(text: str) -> str:
    """Return the first damaged piece of `text`, or an empty string.

    Found are UTF-8 that was read as Windows-1252 or Latin-1 (`cafÃ©`, `itâ€™s`) or as GBK (`浣犲ソ`), and U+FFFD, which
    replaces bytes that could not be decoded. A single two-byte sequence does not count, since it may be intended.
    """
    if text.isascii():
        return ""
    if (at := text.find(REPLACEMENT)) >= 0:
        return text[max(0, at - 10) : at + 10]
    for known in _KNOWN:
        if known in text:
            return known
    for match in _MORE_BYTES.finditer(text):
        if _was_utf8(match[0]):
            return match[0]
    pairs = [match[0] for match in _TWO_BYTES.finditer(text) if _was_utf8(match[0])]
    if len(pairs) > 1:
        return pairs[0]
    return next((match[0] for match in _CHINESE.finditer(text) if _was_chinese_utf8(match[0])), "")


def _was_utf8(text: str) -> bool:
    try:
        return bytes(_BYTES[ord(character)] for character in text).decode("utf-8").isprintable()
    except (KeyError, UnicodeDecodeError):
        return False


def _was_chinese_utf8(text: str) -> bool:
    """Return whether the GBK bytes of `text` are UTF-8 of Chinese text, up to a character that is cut off at the end.

    A character has two bytes in GBK and three in UTF-8, so that up to two bytes may be left over.
    """
    data = text.encode("gb18030", "replace")
    for cut in range(3):
        try:
            decoded = data[: len(data) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        if all("\u3000" <= character <= "\u9fff" or "\uff00" <= character <= "\uffef" for character in decoded):
            return True
    return False
