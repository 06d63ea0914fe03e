"""Makes a connection work in a database whose encoding is SQL_ASCII.

In all other databases, the client uses UTF8, and the server converts every text. In a SQL_ASCII
database, the server converts nothing. A text in this database can contain bytes that are not UTF8.
If the client used UTF8, every statement that returns these bytes would fail. One event could then
stop the queue.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Loader

SQL_ASCII = "SQL_ASCII"
_TEXTS = ("text", "varchar", "bpchar", "name", 0)
"""The types whose values are texts.

The number 0 means all types that psycopg does not know, for example enums and citext.
"""


class _LenientText(Loader):
    """Decodes a text as UTF8. Replaces each byte that is not UTF8 by an escape such as ``\\xe9``.

    The usual replacement character U+FFFD is not used. With U+FFFD, two ids that differ only in
    unreadable bytes would become equal.
    """

    def load(self, data: Buffer) -> str:
        return bytes(data).decode(errors="backslashreplace")


class _EncodingCursor(psycopg.Cursor[Any]):
    """Sends statements as UTF8. Psycopg itself refuses to send non-ASCII statements to a SQL_ASCII database."""

    def execute(self, query: Any, *given: Any, **options: Any) -> Any:
        return super().execute(query.encode() if isinstance(query, str) else query, *given, **options)


def read_leniently(connection: psycopg.Connection[Any]) -> None:
    """If the encoding of the database is SQL_ASCII, escape unreadable bytes and raise no error."""
    if connection.info.parameter_status("server_encoding") != SQL_ASCII:
        return
    for each in _TEXTS:
        connection.adapters.register_loader(each, _LenientText)
    connection.cursor_factory = _EncodingCursor
    connection.execute(f"SET client_encoding = {SQL_ASCII}")
    connection.commit()
