"""Defines the kinds of ids that payments and events can have. Parses these ids from text.

The database decides the kind: the type of ``payments.id`` for payments, the type of ``outbox.event_id`` for events.
"""

from __future__ import annotations

import re
from enum import StrEnum
from uuid import UUID

Key = UUID | str
"""The id of a payment or an event: a UUID, or a text if the id is of another kind."""

LONGEST_TEXT_KEY = 1_000
"""The largest size, in bytes, of an id of the kind text.

PostgreSQL's indexes cannot contain ids of three times this size.
"""
SMALLEST_INTEGER, LARGEST_INTEGER = -(2**63), 2**63 - 1
INTEGER_PATTERN = "^-?[0-9]{1,19}$"
_IS_UUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII).fullmatch
_IS_INTEGER = re.compile("-?[0-9]{1,19}", re.ASCII).fullmatch


class KeyKind(StrEnum):
    """A kind of ids. The value is the PostgreSQL type that can hold every id of this kind."""

    UUID = "uuid"
    INTEGER = "bigint"
    TEXT = "text"

    def usual(self, given: str) -> str | None:
        """Return the text with which PostgreSQL prints this id.

        Return None if ``given`` cannot be an id of this kind. A UUID is 8-4-4-4-12 hexadecimal
        digits, in upper or lower case.
        """
        match self:
            case KeyKind.UUID:
                return given.lower() if _IS_UUID(given.lower()) else None
            case KeyKind.INTEGER:
                is_possible = _IS_INTEGER(given) and SMALLEST_INTEGER <= int(given) <= LARGEST_INTEGER
                return str(int(given)) if is_possible else None
            case KeyKind.TEXT:
                return given if 0 < _size(given) <= LONGEST_TEXT_KEY else None

    def key(self, usual: str) -> Key:
        """Convert a text that ``usual`` returned to the form that rows of the database contain."""
        return UUID(usual) if self is KeyKind.UUID else usual

    def parse(self, typed: str) -> Key | None:
        """Parse an id that a person typed. Return None if the text cannot be an id of this kind.

        A UUID can have any usual form.
        """
        if self is not KeyKind.UUID:
            return self.usual(typed)
        try:
            return UUID(typed)
        except ValueError:
            return None


def _size(text: str) -> int:
    """Return the size of a text in bytes, or 0 if PostgreSQL cannot store the text."""
    try:
        return 0 if "\0" in text else len(text.encode())
    except UnicodeEncodeError:
        return 0
