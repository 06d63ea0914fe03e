"""Makes odd adopted tables: with columns that can be NULL, and with unusable values."""

from __future__ import annotations

from collections.abc import Mapping

from tests.support.factories import Payment, Shop

NULLABLE: Mapping[str, tuple[str, ...]] = {
    "payments": ("student_id", "course_id", "amount", "currency", "status", "created_at"),
    "outbox": ("event_id", "event_type", "payload", "created_at", "due_at", "attempts", "crashes"),
    "purchases": ("student_id", "course_id", "amount", "currency", "is_active", "created_at"),
    "processed_events": ("event_type", "outcome", "processed_at"),
}
"""Columns that can be NULL in adopted tables, but not in the tables of our migrations. A primary
key cannot be NULL."""

UNFIT: Mapping[str, tuple[str, str | None]] = {
    "NaN": ("amount", "NaN"),
    "infinite": ("amount", "Infinity"),
    "infinitely owed": ("amount", "-Infinity"),
    "negative": ("amount", "-0.01"),
}
"""Amounts that no sum can include. Each value is a column and its content."""

MISSING: Mapping[str, tuple[str, str | None]] = {
    "no student": ("student_id", None),
    "no course": ("course_id", None),
    "no amount": ("amount", None),
    "no currency": ("currency", None),
    "blank currency": ("currency", "   "),
    "endless currency": ("currency", "E" * 100_000),
    "no time": ("created_at", None),
    "never": ("created_at", "-infinity"),
    "BC": ("created_at", "4000-01-01 BC"),
    "last year of all": ("created_at", "9999-12-31"),
    "after it": ("created_at", "10000-01-01"),
    "always": ("created_at", "infinity"),
    "future": ("created_at", "2999-01-01"),
}
"""Values with which a payment cannot get a purchase. Each value is a column and its content."""


def let_be_null(shop: Shop) -> None:
    """Allow NULL in these columns, and amounts and currencies of any size, as in adopted tables."""
    shop.rows("ALTER TABLE payments DROP CONSTRAINT payments_status_check")
    for table in ("payments", "purchases"):
        shop.rows(f"ALTER TABLE {table} ALTER COLUMN amount TYPE numeric, ALTER COLUMN currency TYPE text")
    for table, columns in NULLABLE.items():
        dropped = ", ".join(f"ALTER COLUMN {column} DROP NOT NULL" for column in columns)
        shop.rows(f"ALTER TABLE {table} {dropped}")


def odd_payment(shop: Shop, column: str, value: str | None) -> Payment:
    """Write a succeeded payment that is an hour old and has this value."""
    payment = shop.payment(ago="1 hour")
    shop.rows(f"UPDATE payments SET {column} = %s WHERE id = %s", value, payment.id)
    return payment
