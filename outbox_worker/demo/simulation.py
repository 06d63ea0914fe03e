"""Simulates a payments service, with double payments, double events, late events, refunds and bad payloads.

Writes a normal payment and its event in one transaction, as every producer must. Uses its own
connections.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID, uuid4

import psycopg
from psycopg.types.json import Jsonb

from outbox_worker.model import PURCHASE_CONFIRMED, PURCHASE_REFUNDED, Outcome, PaymentStatus

_INSERT_PAYMENT = """
    INSERT INTO payments (id, student_id, course_id, amount, currency, status) VALUES (%s, %s, %s, %s, 'EUR', %s)
"""
_INSERT_EVENT = "INSERT INTO outbox (event_id, event_type, payload) VALUES (%s, %s, %s)"
_INSERT_MARK = """
    INSERT INTO processed_events (event_id, event_type, outcome, payment_id) VALUES (%s, %s, %s, %s)
"""
_CHANGE = "UPDATE payments SET status = %s, updated_at = clock_timestamp() WHERE id = %s"

LATE_SECONDS = 1.0
"""The delay of a late payment after its event, and the delay of a refund after its order."""


@dataclass(frozen=True, slots=True)
class Order:
    """An order of one course by one student."""

    student_id: UUID = field(default_factory=uuid4)
    course_id: UUID = field(default_factory=uuid4)
    amount: str = "49.90"


@dataclass(frozen=True, slots=True)
class _Late:
    """An action to take at the time ``due``."""

    due: float
    act: Callable[[psycopg.Connection], None]


class PaymentsService:
    """Makes ``count`` orders in a thread. Some orders have errors. Each error has a fixed share.

    ``events`` is the number of events written so far.
    """

    def __init__(self, conninfo: str, count: int, seconds: float) -> None:
        self.events = 0
        self.orders = 0
        self._conninfo = conninfo
        self._count = count
        self._pause = seconds / count
        self._late: deque[_Late] = deque()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def progress(self) -> float:
        """Return the share of orders that are made, from 0 to 1."""
        return self.orders / self._count

    def is_done(self) -> bool:
        """Return whether every order is written. If the thread failed, raise its exception."""
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop making orders and wait until the thread has ended."""
        self._stop.set()
        self._thread.join()

    def leave_damage(self, count: int) -> None:
        """Write the damage of a faulty old worker: events that have a mark, but no purchase."""
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            for _ in range(count):
                payment_id, event_id = uuid4(), uuid4()
                with connection.transaction():
                    _pay(connection, payment_id, Order())
                    self._tell(connection, {"payment_id": str(payment_id)}, event_id=event_id)
                    connection.execute(_INSERT_MARK, (event_id, PURCHASE_CONFIRMED, Outcome.CREATED, payment_id))

    def _run(self) -> None:
        try:
            with psycopg.connect(self._conninfo, autocommit=True) as connection:
                self._make_orders(connection)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread, by is_done()
            self._error = error

    def _make_orders(self, connection: psycopg.Connection) -> None:
        begin = time.monotonic()
        while self.orders < self._count and not self._stop.is_set():
            self._order(connection, self.orders)
            self.orders += 1
            self._deliver_late(connection, time.monotonic())
            self._stop.wait(max(0.0, begin + self.orders * self._pause - time.monotonic()))
        while self._late and not self._stop.wait(0.05):
            self._deliver_late(connection, time.monotonic())

    def _order(self, connection: psycopg.Connection, number: int) -> None:
        """Make one order. Some order numbers simulate an error. The number decides which error."""
        order, payment_id = Order(), uuid4()
        match number % 50:
            case 7 | 32:
                self._deliver_twice(connection, payment_id, order)
            case 12:
                self._pay_twice(connection, order, is_noticed=number % 100 < 50)
            case 17:
                self._deliver_before_clearing(connection, payment_id, order)
            case 22:
                self._deliver_before_payment(connection, payment_id, order)
            case 27:
                self._refund_at_once(connection, payment_id, order)
            case 47:
                self._confirm(connection, payment_id, order)
                self._later(partial(self._refund, payment_id, order))
            case 37:
                self._contradict(connection, payment_id, order)
            case 42:
                self._poison(connection, number)
            case _:
                self._confirm(connection, payment_id, order)

    def _confirm(self, connection: psycopg.Connection, payment_id: UUID, order: Order) -> None:
        with connection.transaction():
            _pay(connection, payment_id, order)
            self._tell(connection, _payload(payment_id, order))

    def _deliver_twice(self, connection: psycopg.Connection, payment_id: UUID, order: Order) -> None:
        self._confirm(connection, payment_id, order)
        self._tell(connection, _payload(payment_id, order))

    def _pay_twice(self, connection: psycopg.Connection, order: Order, *, is_noticed: bool) -> None:
        first = uuid4()
        self._confirm(connection, first, order)
        self._confirm(connection, uuid4(), order)
        if is_noticed:
            self._later(partial(self._refund, first, order))

    def _deliver_before_clearing(self, connection: psycopg.Connection, payment_id: UUID, order: Order) -> None:
        with connection.transaction():
            _pay(connection, payment_id, order, PaymentStatus.PENDING)
            self._tell(connection, _payload(payment_id, order))
        self._later(partial(_change, payment_id=payment_id, status=PaymentStatus.SUCCEEDED))

    def _deliver_before_payment(self, connection: psycopg.Connection, payment_id: UUID, order: Order) -> None:
        self._tell(connection, _payload(payment_id, order))
        self._later(partial(_pay, payment_id=payment_id, order=order))

    def _refund_at_once(self, connection: psycopg.Connection, payment_id: UUID, order: Order) -> None:
        """Refund a payment before its confirmation is settled.

        The refund event enters the outbox before the confirmation event.
        """
        with connection.transaction():
            _pay(connection, payment_id, order, PaymentStatus.REFUNDED)
            self._tell(connection, _payload(payment_id, order), event_type=PURCHASE_REFUNDED)
            self._tell(connection, _payload(payment_id, order))

    def _refund(self, payment_id: UUID, order: Order, connection: psycopg.Connection) -> None:
        with connection.transaction():
            _change(connection, payment_id, PaymentStatus.REFUNDED)
            self._tell(connection, _payload(payment_id, order), event_type=PURCHASE_REFUNDED)

    def _contradict(self, connection: psycopg.Connection, payment_id: UUID, order: Order) -> None:
        with connection.transaction():
            _pay(connection, payment_id, order)
            self._tell(connection, _payload(payment_id, order) | {"amount": "4990.00"})

    def _poison(self, connection: psycopg.Connection, number: int) -> None:
        if number % 100 < 50:
            self._tell(connection, ["not", "an", "object"])
        else:
            self._tell(connection, {"payment_id": str(uuid4())}, event_type="COFFEE_BREWED")

    def _tell(
        self,
        connection: psycopg.Connection,
        payload: object,
        *,
        event_id: UUID | None = None,
        event_type: str = PURCHASE_CONFIRMED,
    ) -> None:
        connection.execute(_INSERT_EVENT, (event_id or uuid4(), event_type, Jsonb(payload)))
        self.events += 1

    def _later(self, act: Callable[[psycopg.Connection], None]) -> None:
        self._late.append(_Late(time.monotonic() + LATE_SECONDS, act))

    def _deliver_late(self, connection: psycopg.Connection, now: float) -> None:
        while self._late and self._late[0].due <= now:
            self._late.popleft().act(connection)


def _payload(payment_id: UUID, order: Order) -> dict[str, str]:
    return {
        "payment_id": str(payment_id),
        "student_id": str(order.student_id),
        "course_id": str(order.course_id),
        "amount": order.amount,
        "currency": "EUR",
    }


def _pay(
    connection: psycopg.Connection, payment_id: UUID, order: Order, status: PaymentStatus = PaymentStatus.SUCCEEDED
) -> None:
    row = (payment_id, order.student_id, order.course_id, order.amount, status)
    connection.execute(_INSERT_PAYMENT, row)


def _change(connection: psycopg.Connection, payment_id: UUID, status: PaymentStatus) -> None:
    connection.execute(_CHANGE, (status, payment_id))
