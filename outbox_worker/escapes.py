"""Replaces control characters in text from other programs. A terminal would interpret them."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return the text on one line, with an escape such as ``\\x1b`` in place of each control character."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
