"""Removes control characters from text that other programs wrote, because terminals and logs would interpret it."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return the text on one line. Every control character is replaced by an escape such as ``\\x1b``."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
