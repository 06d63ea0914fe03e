"""Makes owed purchases, with the statements and the guard of the daemon.

Each transaction handles at most ``CHUNK`` payments. The transaction locks the pairs, checks the
payments again, and writes purchases and marks. If a transaction fails because of a payment or a
lock, ``make`` tries each half of the payments in a new transaction. In the end, each payment that
the database refuses, or that another transaction blocks, is alone in its transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database, check_deferred
from outbox_worker.database.failures import (
    TIMED_OUT,
    UNIQUE_VIOLATION,
    Failure,
    classify,
    describe,
    is_arbiter_lost,
    sqlstate,
)
from outbox_worker.database.planner import INDEX_PLANS, set_local
from outbox_worker.database.retry import retry_transaction
from outbox_worker.database.statements import Statement
from outbox_worker.decision import RetryPolicy, decide
from outbox_worker.errors import Inconsistent
from outbox_worker.keys import Key, KeyKind
from outbox_worker.model import (
    GRANTS,
    PURCHASE_BACKFILLED,
    Batch,
    FoundPayment,
    Guard,
    Outcome,
    Repeated,
    Verdict,
    Verdicts,
    halves,
)
from outbox_worker.reconcile.scan import plans
from outbox_worker.schema.tables import Tables
from outbox_worker.store.dead_letters import open_confirmations
from outbox_worker.store.guard import GuardState, GuardWatch
from outbox_worker.store.outbox import Outbox
from outbox_worker.store.payment_classes import PaymentClass, portion_statement
from outbox_worker.store.purchases import PurchaseRepository, backfill_event_id, backfill_event_of

CHUNK = 500
"""The largest number of payments in one transaction. The transaction locks the pair of each payment
until COMMIT."""
_ATTEMPTS = 8
_LOCK_SECONDS = 1.0
"""How long a statement waits for a lock. The time is short, because each half of the blocked
payments waits again."""
_BLOCKED_IN_A_ROW = 10
"""After this many blocked transactions in a row, ``make`` does not halve the payments of a blocked
transaction.

Probably, another transaction has locked a whole table. Then each half would wait for that lock.
"""
_DIVIDED = (Failure.EVENT, Failure.GUARD, Failure.UNCLEAR, Failure.RETRY)
"""After a failure of these classes, ``make`` halves the payments of the transaction. One payment
can be the cause."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A payment whose purchase the database refused, and the error."""

    payment: FoundPayment
    detail: str


NOT_WRITTEN = "the database wrote no purchase and raised no error; a trigger or rule of the table may prevent it"


@dataclass
class BackfillResult:
    """The payments that were owed a purchase during the scan, in one list for each result."""

    created: list[FoundPayment] = field(default_factory=list)
    recovered: list[FoundPayment] = field(default_factory=list)
    """Payments whose purchase was made again. A mark proves that an earlier purchase existed, but
    that purchase is missing now."""
    explained: list[FoundPayment] = field(default_factory=list)
    """Payments that are no longer owed a purchase, because another process settled them after the scan."""
    contended: list[FoundPayment] = field(default_factory=list)
    """Payments whose purchase was not made. Another transaction had locked their pair, or a row
    that the purchase needs."""
    refused: list[Refusal] = field(default_factory=list)
    withheld: list[FoundPayment] = field(default_factory=list)
    """Payments that got no purchase. An older unexplained payment of the same pair is owed the
    purchase, but the scan did not read that payment."""

    @property
    def purchases(self) -> list[FoundPayment]:
        return self.created + self.recovered

    def __iadd__(self, other: BackfillResult) -> BackfillResult:
        for name in self.__dataclass_fields__:
            getattr(self, name).extend(getattr(other, name))
        return self


def choose_owed(unexplained: Iterable[FoundPayment]) -> tuple[list[FoundPayment], list[FoundPayment]]:
    """Return two lists: the oldest payment of each pair, and all other payments.

    A payment of the first list is owed a purchase. A payment of the second list is a duplicate.
    """
    by_age = sorted(unexplained, key=lambda payment: payment.age)
    oldest = {payment.pair: payment for payment in reversed(by_age)}
    return (
        [payment for payment in by_age if oldest[payment.pair] is payment],
        [payment for payment in by_age if oldest[payment.pair] is not payment],
    )


def left_of(unexplained: Iterable[FoundPayment], result: BackfillResult) -> list[FoundPayment]:
    """Return the payments that stay unexplained: all payments of each pair for which no purchase was made."""
    refused = [each.payment for each in result.refused]
    failed = {payment.pair for payment in [*result.contended, *refused, *result.withheld]}
    return [payment for payment in unexplained if payment.pair in failed]


OnWritten = Callable[[Session, Sequence[FoundPayment], BackfillResult], None]
"""``OwedPurchases.make`` calls this function before each COMMIT. The arguments are the session, the
payments and the result of the transaction. The function can write to the database, too."""


class OwedPurchases:
    """Makes owed purchases in one database."""

    def __init__(
        self,
        database: Database,
        tables: Tables,
        policy: RetryPolicy,
        guard: GuardWatch,
        *,
        by_index: bool,
        looks_for_older: bool = False,
    ) -> None:
        """``looks_for_older``: whether the scan can have left out older unexplained payments."""
        self._looks_for_older = looks_for_older
        self._database, self._tables, self._policy, self._guard = database, tables, policy, guard
        self._repository = PurchaseRepository(tables, partial(backfill_event_of, tables.event_key))
        self._outbox = Outbox(tables, None)
        self._classes = Statement(portion_statement(tables, by_index=by_index))
        looking, writing = plans(by_index), INDEX_PLANS if by_index else {}
        self._looking = {**_switched_on(writing), **looking}
        self._writing = {**_switched_on(looking), **writing}
        self._limits = {"lock_timeout": str(round(_LOCK_SECONDS * 1000))}

    @classmethod
    def start(
        cls,
        database: Database,
        tables: Tables,
        policy: RetryPolicy,
        guard: GuardWatch,
        *,
        looks_for_older: bool = False,
    ) -> OwedPurchases:
        """Check which guard is in force and whether indexes find purchases by payment and by pair."""
        with database.transaction() as session:
            state = guard.probe(session)
        by_index = state.has_index_paths
        return cls(database, tables, policy, guard, by_index=by_index, looks_for_older=looks_for_older)

    def withheld(self, owed: Sequence[FoundPayment]) -> list[FoundPayment]:
        """Return the payments whose pair has an older unexplained payment outside the scan.

        The result is only a forecast, because this method does not lock the pairs. ``make`` checks
        the payments again.
        """
        found: list[FoundPayment] = []
        for start in range(0, len(owed) if self._looks_for_older else 0, CHUNK):
            part = owed[start : start + CHUNK]
            with self._database.transaction(**self._writing) as session:
                behind = self._behind_older(session, _as_batch(part, self._tables.event_key))
            found += [payment for key, payment in enumerate(part) if key in behind]
        return found

    def make(self, owed: Sequence[FoundPayment], on_written: OnWritten) -> Iterator[BackfillResult]:
        """Make one purchase for each payment.

        Yield the result of each transaction after its COMMIT. All payments must have different
        pairs. If another transaction locks a row that a purchase needs, the result lists the
        payment as contended. Raises a database error if neither a payment nor a lock has caused it.
        """
        size = min(CHUNK, self._guard.state.lock_capacity)
        parts = [owed[at : at + size] for at in range(0, len(owed), size)][::-1]
        tried: set[Key] = set()
        is_writable, blocked = False, 0
        while parts:
            part = parts.pop()
            transact = partial(self._transact, part, on_written)
            try:
                result = retry_transaction(transact, attempts=_ATTEMPTS, gives_up=_has_timed_out)
                blocked = 0
            except (DBAPIError, Inconsistent) as error:
                is_blocked = classify(error) is Failure.RETRY
                is_stuck = is_blocked and blocked >= _BLOCKED_IN_A_ROW
                if smaller := [] if is_stuck else self._smaller(part, error, tried):
                    parts += smaller
                    continue
                is_unclear = classify(error) is Failure.UNCLEAR and not isinstance(error, Inconsistent)
                if is_unclear and not is_writable:
                    raise  # no purchase was written yet: the database itself can be the cause
                blocked += is_blocked
                result = BackfillResult(contended=list(part)) if is_blocked else _refused(part, error)
            is_writable = is_writable or bool(result.purchases)
            yield result

    def _smaller(
        self, part: Sequence[FoundPayment], error: DBAPIError | Inconsistent, tried: set[Key]
    ) -> Sequence[Sequence[FoundPayment]]:
        """Return the groups of payments to try next: the halves of ``part``, or ``part`` itself.

        The last group comes first, because the caller takes groups from the end of its list. Return
        no group if ``part`` is one payment that is refused or blocked. Raises ``error`` if no
        payment can be its cause.
        """
        if classify(error) not in _DIVIDED and not isinstance(error, Inconsistent):
            raise error
        if is_arbiter_lost(error) and self._guard.state.guard is Guard.INDEX:
            self._guard.fall_back()
            return [part]
        if len(part) > 1:
            return halves(part)[::-1]
        if sqlstate(error) == UNIQUE_VIOLATION and part[0].payment_id not in tried:
            tried.add(part[0].payment_id)
            return [part]  # another transaction inserted a purchase first: check again
        return []

    def _transact(self, part: Sequence[FoundPayment], on_written: OnWritten, _failed: int) -> BackfillResult:
        """Lock the pairs, check the payments again and write their purchases, in one transaction."""
        batch, guard = _as_batch(part, self._tables.event_key), self._guard.state
        with self._database.transaction(**self._limits, **self._writing) as session:
            locks = self._repository.lock_pairs(session, batch, guard.lock_capacity)
            owed = self._still_unexplained(session, batch.only(key for key in locks.order if key in locks.locked))
            behind = self._behind_older(session, owed) if self._looks_for_older else set()
            verdicts = self._judge(session, owed.without(behind))
            granted = self._grant(session, owed, verdicts, guard)
            settled = locks.contended | behind | granted.keys()
            unsettled = self._still_unexplained(session, batch.without(settled))
            left = {key: _why_not(verdicts.get(key)) for key in unsettled}
            result = _result_of(part, granted, locks.contended, behind, left)
            on_written(session, part, result)
        return result

    def _behind_older(self, session: Session, owed: Batch) -> set[int]:
        """Return the events whose pair has an older unexplained payment.

        The older payment counts even if the scan did not read it.
        """
        standing = self._repository.standing_payments(session, owed) if owed else {}
        oldest = {
            key: next((each.payment_id for each in found if each.kind == PaymentClass.UNEXPLAINED), None)
            for key, found in standing.items()
        }
        return {key for key, payment_id in oldest.items() if payment_id not in (None, owed[key].payment_id)}

    def _still_unexplained(self, session: Session, batch: Batch) -> Batch:
        """Return the events whose payments are still unexplained. Call this method after locking the pairs."""
        if not batch:
            return batch
        values = {"ids": batch.payment_ids, "lists": True, "since": None, "before": None}
        set_local(session, self._looking)
        rows = self._classes.execute(session, values).all()
        set_local(session, self._writing)
        unexplained = {str(row.id) for row in rows if row.kind == PaymentClass.UNEXPLAINED.value}
        return batch.only(key for key in batch if batch[key].payment_id in unexplained)

    def _judge(self, session: Session, batch: Batch) -> Verdicts:
        """Decide the outcome of each payment by the worker's rules."""
        seen = self._repository.look(session, batch, self._policy) if batch else {}
        return {key: decide(event_facts.facts) for key, event_facts in seen.items()}

    def _grant(self, session: Session, batch: Batch, verdicts: Verdicts, guard: GuardState) -> dict[int, Outcome]:
        """Create the purchases that the outcomes in ``verdicts`` allow, write marks, and close dead letters."""
        grants = batch.only(key for key in batch.ids if key in verdicts and verdicts[key].outcome in GRANTS)
        written = self._repository.insert_granted(session, grants, guard) if grants else set()
        if not written:
            return {}
        granted = {key: verdicts[key].outcome for key in written}
        for outcome in set(granted.values()):
            marked = batch.among([key for key in granted if granted[key] is outcome])
            self._repository.mark(session, marked, outcome)
        payment_ids = [str(batch[key].payment_id) for key in written]
        if letters := open_confirmations(session, self._tables, payment_ids):
            self._outbox.close_letters(session, letters)
        if "INSERT" in guard.triggers_on:
            check_deferred(session)
            self._repository.read_back(session, payment_ids, is_active=True)
        return granted


def _switched_on(plans: Mapping[str, str]) -> dict[str, str]:
    """Return settings that switch on every planner method that ``plans`` switches off."""
    return {name: "on" for name in plans if name.startswith("enable_")}


def _as_batch(payments: Sequence[FoundPayment], event_key: KeyKind) -> Batch:
    """Return a batch with one substitute event for each payment.

    The id of an event is the position of its payment.
    """
    return Batch(
        ids=range(len(payments)),
        event_ids=[str(backfill_event_id(payment.payment_id, event_key)) for payment in payments],
        event_types=[PURCHASE_BACKFILLED] * len(payments),
        payment_ids=[str(payment.payment_id) for payment in payments],
        attempts=[0] * len(payments),
        lateness=[0.0] * len(payments),
        repeated=[Repeated()] * len(payments),
    )


def _refused(part: Sequence[FoundPayment], error: DBAPIError | Inconsistent) -> BackfillResult:
    detail = NOT_WRITTEN if isinstance(error, Inconsistent) else describe(error)
    return BackfillResult(refused=[Refusal(payment, detail) for payment in part])


def _why_not(verdict: Verdict | None) -> str:
    """Return why a payment got no purchase.

    Either ``decide`` gave a reason, or the database wrote nothing.
    """
    return NOT_WRITTEN if verdict is None or verdict.reason is None else f"{verdict.reason}: {verdict.detail}"


def _has_timed_out(error: BaseException) -> bool:
    return sqlstate(error) in TIMED_OUT


def _result_of(
    part: Sequence[FoundPayment],
    granted: Mapping[int, Outcome],
    contended: Collection[int],
    behind: Collection[int],
    left: Mapping[int, str],
) -> BackfillResult:
    """Sort the payments by result.

    ``left``: the reason for each payment that is still unexplained after the writes.
    """
    result = BackfillResult()
    for key, payment in enumerate(part):
        match granted.get(key):
            case Outcome.CREATED:
                result.created.append(payment)
            case Outcome.RECOVERED:
                result.recovered.append(payment)
            case _ if key in contended:
                result.contended.append(payment)
            case _ if key in behind:
                result.withheld.append(payment)
            case _ if key in left:
                result.refused.append(Refusal(payment, left[key]))
            case _:
                result.explained.append(payment)
    return result
