"""Makes owed purchases: locks the pairs, checks the payments again, and writes purchases and marks in one transaction.

Each transaction handles at most ``CHUNK`` payments and uses the daemon's repository and guard. If the database refuses
a transaction, its payments are split in halves and retried, until each payment that the database refuses is alone in
its transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database
from outbox_worker.database.failures import UNIQUE_VIOLATION, Failure, classify, describe, is_arbiter_lost, sqlstate
from outbox_worker.database.planner import INDEX_PLANS, set_local
from outbox_worker.database.retry import retry_transaction
from outbox_worker.database.statements import Statement
from outbox_worker.decision import RetryPolicy, decide
from outbox_worker.model import GRANTS, PURCHASE_BACKFILLED, Batch, FoundPayment, Guard, Outcome, Repeated
from outbox_worker.reconcile.scan import plans
from outbox_worker.schema.tables import Tables
from outbox_worker.store.dead_letters import open_confirmations
from outbox_worker.store.guard import GuardState, GuardWatch
from outbox_worker.store.outbox import Outbox
from outbox_worker.store.pairs import PairLocks
from outbox_worker.store.payment_classes import PaymentClass, portion_statement
from outbox_worker.store.purchases import PurchaseRepository, backfill_event_id, backfill_event_of

CHUNK = 500
"""The largest number of payments in one transaction."""
_ATTEMPTS = 8
_PAYMENTS_FAULT = (Failure.EVENT, Failure.GUARD, Failure.UNCLEAR)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A payment whose purchase the database refused, and the error."""

    payment: FoundPayment
    detail: str


@dataclass
class BackfillResult:
    """The payments that were owed a purchase during the scan, in one list for each result."""

    created: list[FoundPayment] = field(default_factory=list)
    recovered: list[FoundPayment] = field(default_factory=list)
    """Payments whose purchase was made once more: a mark proves that an earlier purchase existed, but it is missing
    now."""
    explained: list[FoundPayment] = field(default_factory=list)
    """Payments that are no longer owed a purchase, because another process settled them after the scan."""
    contended: list[FoundPayment] = field(default_factory=list)
    """Payments whose purchase was not made, because another transaction had locked their pair."""
    refused: list[Refusal] = field(default_factory=list)

    @property
    def purchases(self) -> list[FoundPayment]:
        return self.created + self.recovered

    def __iadd__(self, other: BackfillResult) -> BackfillResult:
        for name in self.__dataclass_fields__:
            getattr(self, name).extend(getattr(other, name))
        return self


def choose_owed(unexplained: Iterable[FoundPayment]) -> tuple[list[FoundPayment], list[FoundPayment]]:
    """Return two lists: the oldest payment of each pair (it is owed a purchase), and all other payments.

    The payments of the second list are duplicates.
    """
    by_age = sorted(unexplained, key=lambda payment: payment.age)
    oldest = {payment.pair: payment for payment in reversed(by_age)}
    return (
        [payment for payment in by_age if oldest[payment.pair] is payment],
        [payment for payment in by_age if oldest[payment.pair] is not payment],
    )


def left_of(unexplained: Iterable[FoundPayment], result: BackfillResult) -> list[FoundPayment]:
    """Return the payments that stay unexplained: all payments of each pair whose purchase was contended or refused."""
    failed = {payment.pair for payment in [*result.contended, *(each.payment for each in result.refused)]}
    return [payment for payment in unexplained if payment.pair in failed]


OnWritten = Callable[[Session, Sequence[FoundPayment], BackfillResult], None]
"""A function that is called before each COMMIT, with the session, the payments and the result of this transaction. The
function may write to the database, too."""


class OwedPurchases:
    """Makes the purchases that are owed, in one database."""

    def __init__(
        self, database: Database, tables: Tables, policy: RetryPolicy, guard: GuardWatch, *, by_index: bool
    ) -> None:
        self._database, self._tables, self._policy, self._guard = database, tables, policy, guard
        self._repository = PurchaseRepository(tables, backfill_event_of)
        self._outbox = Outbox(tables, None)
        self._classes = Statement(portion_statement(tables, by_index=by_index))
        looking, writing = plans(by_index), INDEX_PLANS if by_index else {}
        self._looking = {**_switched_on(writing), **looking}
        self._writing = {**_switched_on(looking), **writing}

    @classmethod
    def start(cls, database: Database, tables: Tables, policy: RetryPolicy, guard: GuardWatch) -> OwedPurchases:
        """Check which guard is in force and whether indexes find purchases by payment and by pair."""
        with database.transaction() as session:
            state = guard.probe(session)
        return cls(database, tables, policy, guard, by_index=state.has_index_paths)

    def make(self, owed: Sequence[FoundPayment], on_written: OnWritten) -> Iterator[BackfillResult]:
        """Make one purchase for each payment. Yield the result of each transaction after its COMMIT.

        No two payments may have the same pair. Raises a database error if no single payment caused it.
        """
        size = min(CHUNK, self._guard.state.lock_capacity)
        parts = [owed[at : at + size] for at in range(0, len(owed), size)][::-1]
        tried: set[UUID] = set()
        is_writable = False
        while parts:
            part = parts.pop()
            try:
                result = retry_transaction(partial(self._transact, part, on_written), attempts=_ATTEMPTS)
            except DBAPIError as error:
                if smaller := self._without_fault(part, error, tried):
                    parts += smaller
                    continue
                if classify(error) is Failure.UNCLEAR and not is_writable:
                    raise  # no purchase was written yet, so the database itself may be the cause, not this payment
                result = BackfillResult(refused=[Refusal(part[0], describe(error))])
            is_writable = is_writable or bool(result.purchases)
            yield result

    def _without_fault(
        self, part: Sequence[FoundPayment], error: DBAPIError, tried: set[UUID]
    ) -> Sequence[Sequence[FoundPayment]]:
        """Return the parts to try instead of ``part`` (its halves, or ``part`` itself).

        The last part comes first, because the caller takes parts from the end of its list. Return no parts if ``part``
        is one payment that the database refuses. Raises ``error`` if no payment can be its cause.
        """
        if classify(error) not in _PAYMENTS_FAULT:
            raise error
        if is_arbiter_lost(error) and self._guard.state.guard is Guard.INDEX:
            self._guard.fall_back()
            return [part]
        if len(part) > 1:
            middle = len(part) // 2
            return [part[middle:], part[:middle]]
        if sqlstate(error) == UNIQUE_VIOLATION and part[0].payment_id not in tried:
            tried.add(part[0].payment_id)
            return [part]  # another transaction inserted a purchase first, so check this payment again
        return []

    def _transact(self, part: Sequence[FoundPayment], on_written: OnWritten, _failed: int) -> BackfillResult:
        """Lock the pairs, check the payments again and write their purchases, in one transaction."""
        batch, guard = _as_batch(part), self._guard.state
        with self._database.transaction(**self._writing) as session:
            locks = self._repository.lock_pairs(session, batch, guard.lock_capacity)
            owed = self._still_unexplained(session, batch.only(key for key in locks.order if key in locks.locked))
            granted = self._grant(session, owed, guard) if owed else {}
            result = _result_of(part, granted, locks)
            on_written(session, part, result)
        return result

    def _still_unexplained(self, session: Session, batch: Batch) -> Batch:
        """Return the events whose payments are still unexplained, by a snapshot that is newer than the locks."""
        if not batch:
            return batch
        values = {"ids": batch.payment_ids, "lists": True, "since": None, "before": "infinity"}
        set_local(session, self._looking)
        rows = self._classes.execute(session, values).all()
        set_local(session, self._writing)
        unexplained = {str(row.id) for row in rows if row.kind == PaymentClass.UNEXPLAINED.value}
        return batch.only(key for key in batch if batch[key].payment_id in unexplained)

    def _grant(self, session: Session, batch: Batch, guard: GuardState) -> dict[int, Outcome]:
        """Create the purchases that ``decide`` allows, write marks, and close the payments' dead letters."""
        seen = self._repository.look(session, batch, self._policy)
        judged = {key: decide(event_facts.facts).outcome for key, event_facts in seen.items()}
        grants = batch.only(key for key in batch.ids if judged.get(key) in GRANTS)
        written = self._repository.insert_granted(session, grants, guard) if grants else set()
        granted = {key: judged[key] for key in written}
        for outcome in set(granted.values()):
            marked = batch.among([key for key in granted if granted[key] is outcome])
            self._repository.mark(session, marked, outcome)
        payment_ids = [str(batch[key].payment_id) for key in written]
        if letters := open_confirmations(session, self._tables, payment_ids):
            self._outbox.close_letters(session, letters)
        return granted


def _switched_on(plans: Mapping[str, str]) -> dict[str, str]:
    """Return the planner settings that ``plans`` switches off, with the value ``on``."""
    return {name: "on" for name in plans if name.startswith("enable_")}


def _as_batch(payments: Sequence[FoundPayment]) -> Batch:
    """Return a batch with one substitute event per payment. The id of an event is the position of its payment."""
    return Batch(
        ids=range(len(payments)),
        event_ids=[str(backfill_event_id(payment.payment_id)) for payment in payments],
        event_types=[PURCHASE_BACKFILLED] * len(payments),
        payment_ids=[str(payment.payment_id) for payment in payments],
        attempts=[0] * len(payments),
        lateness=[0.0] * len(payments),
        repeated=[Repeated()] * len(payments),
    )


def _result_of(part: Sequence[FoundPayment], granted: Mapping[int, Outcome], locks: PairLocks) -> BackfillResult:
    result = BackfillResult()
    for key, payment in enumerate(part):
        match granted.get(key):
            case Outcome.CREATED:
                result.created.append(payment)
            case Outcome.RECOVERED:
                result.recovered.append(payment)
            case _:
                (result.contended if key in locks.contended else result.explained).append(payment)
    return result
