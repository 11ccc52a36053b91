"""Recognises text that is not UTF-8: byte order marks, and UTF-16 and UTF-32 without one."""

import codecs

# The byte order mark of UTF-8, which some editors write at the beginning of a file.
MARK = codecs.BOM_UTF8
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_LOOKED_AT_BYTES = 1024
# A few NUL bytes among a few letters say nothing.
_TELLING_BYTES = 16


def other_encoding(head: bytes) -> str | None:
    """ "UTF-16" or "UTF-32" where the beginning of a text, which is not good UTF-8, is that, else None."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    head = head[:_LOOKED_AT_BYTES]
    # Without a mark it is told by the NUL bytes of the characters below U+0100, and by making sense as text.
    if len(head) < _TELLING_BYTES or head.count(0) * 4 < len(head):
        return None
    for name in ("UTF-32", "UTF-16"):
        if any(_is_text(head, name + order) for order in ("-LE", "-BE")):
            return name
    return None


def _is_text(head: bytes, encoding: str) -> bool:
    try:
        # Not final: the last character may be cut off.
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(character.isprintable() or character.isspace() for character in text)
