"""Text that others wrote, made harmless for terminals and logs. Pure."""

from __future__ import annotations


def printable(text: str) -> str:
    """On one line, and without what a terminal would obey."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
