"""Makes text that others wrote harmless for terminals and logs. Pure."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return the text on one line, with every control character written as an escape such as ``\\x1b``."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
