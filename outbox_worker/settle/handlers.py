"""What the worker does with each type of event: a table with one entry per type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from sqlalchemy.orm import Session

from outbox_worker.decision import RetryPolicy, decide, refused
from outbox_worker.model import PURCHASE_CONFIRMED, PURCHASE_REFUNDED, Batch, Facts, Guard, Outcome, Verdict, Verdicts
from outbox_worker.schema.catalogue import is_owned
from outbox_worker.schema.tables import Tables
from outbox_worker.store.guard import GuardState
from outbox_worker.store.pairs import EventFacts, PairLocks, StandingPayment
from outbox_worker.store.payment_classes import PaymentClass
from outbox_worker.store.purchases import PurchaseRepository

_VIA_FAST_PATH = Verdict(Outcome.CREATED, writes=True, via_fast_path=True)


@dataclass(frozen=True, slots=True)
class AttemptPlan:
    """How this attempt treats the batch: guard, locks, marks, whether each event is judged."""

    guard: GuardState
    locks: PairLocks | None = None
    """The pairs that are locked already; None: the handler locks the pairs of the events that it must judge."""
    looks_at_marks: bool = True
    """Look for marks first. Otherwise all events are taken for new, and the attempt fails (23505) if one is marked."""
    judges_all: bool = False
    """Judge every event instead of running the fast statement, which would write purchases out of order."""


class OutOfOrder(Exception):
    """A purchase would be written out of the order in which all workers write: every event must be judged instead."""


class Handler(Protocol):
    """Handles a batch of claimed events of one type inside the session's transaction."""

    def apply(self, session: Session, batch: Batch, plan: AttemptPlan) -> Verdicts:
        """Do the work and return a verdict per event; an event without a verdict stays in the outbox as it was.

        The settlement writes marks, retries and dead letters, and deletes events. An exception rolls back all of it.
        """
        ...


Handlers = Mapping[str, Handler]


HANDLED_TYPES = (PURCHASE_CONFIRMED, PURCHASE_REFUNDED)

UnknownTypes = Literal["bury", "ignore"] | None


def claimed_types(session: Session, tables: Tables, unknown_types: UnknownTypes) -> tuple[str, ...] | None:
    """The event types to claim; None: all types, so that events of unknown types become dead letters.

    ``unknown_types`` decides. By default, unknown types become dead letters if the worker's migrations made the outbox;
    an adopted outbox is shared, and events of unknown types are left to its other consumers.
    """
    choice = unknown_types or ("bury" if is_owned(session, tables.outbox) else "ignore")
    return None if choice == "bury" else HANDLED_TYPES


def build_handlers(repository: PurchaseRepository, policy: RetryPolicy) -> Handlers:
    """The table of handlers, by event type."""
    return {
        PURCHASE_CONFIRMED: ConfirmedPurchases(repository, policy),
        PURCHASE_REFUNDED: RefundedPurchases(repository, policy),
    }


def judge_unhandled(batch: Batch) -> Verdicts:
    """Judge events of a type without a handler: rule 1."""
    return dict.fromkeys(batch, decide(Facts(handled=False)))


class _UnderLocks(ABC):
    """What both handlers share: look, decide and write under the pairs' locks."""

    def __init__(self, repository: PurchaseRepository, policy: RetryPolicy) -> None:
        self._repository = repository
        self._policy = policy

    @abstractmethod
    def _choose(self, batch: Batch, seen: Mapping[int, EventFacts]) -> Batch:
        """Choose the events that one statement can write; the others are judged again afterwards."""

    @abstractmethod
    def _write(self, session: Session, batch: Batch, guard: GuardState) -> set[int]:
        """Write the purchases of these events; return the events that were written."""

    def _lock(self, session: Session, batch: Batch, plan: AttemptPlan) -> frozenset[int]:
        """Lock the pairs of the events, unless the plan has done so; return the lock keys."""
        locks = plan.locks or self._repository.lock_pairs(session, batch, plan.guard.lock_capacity)
        return locks.keys

    def _look(self, session: Session, batch: Batch) -> dict[int, EventFacts]:
        return self._repository.look(session, batch, self._policy)

    def _judge(
        self,
        session: Session,
        batch: Batch,
        seen: Mapping[int, EventFacts],
        held: frozenset[int],
        guard: GuardState,
        *,
        may_write: bool = True,
    ) -> Verdicts:
        """Judge the events, write their purchases, and judge the others again by what the write changed.

        Each round settles at least one event, or is the last.
        """
        verdicts: Verdicts = {}
        tried: set[int] = set()
        waiting = batch
        while waiting:
            judged = {
                key: decide(event_facts.facts) for key, event_facts in seen.items() if _is_locked(event_facts, held)
            }
            writing = {key for key, verdict in judged.items() if verdict.writes}
            verdicts |= {key: verdict for key, verdict in judged.items() if key not in writing}
            verdicts |= {key: _unwritable(seen[key]) for key in writing & tried}
            if writing and not may_write:
                raise OutOfOrder("a purchase is owed, but purchases of later pairs are already written")
            chosen = self._choose(batch.among(writing - tried), seen)
            written = self._write(session, chosen, guard) if chosen else set()
            verdicts |= {key: judged[key] for key in written}
            tried |= chosen.keys()
            waiting = batch.among(writing - verdicts.keys())
            seen = self._look(session, waiting) if waiting else {}
        return verdicts


class ConfirmedPurchases(_UnderLocks):
    """Makes the purchase of a confirmed payment."""

    def apply(self, session: Session, batch: Batch, plan: AttemptPlan) -> Verdicts:
        """Insert the purchases of all clean events by one statement, and judge the others under their pairs' locks.

        Raises OutOfOrder if one of the others is owed a purchase: purchases are written in one order, and the statement
        has already written those of later pairs.
        """
        inserted = set() if plan.judges_all else self._insert_clean(session, batch, plan)
        verdicts = dict.fromkeys(inserted, _VIA_FAST_PATH)
        if len(inserted) == len(batch):
            return verdicts
        rest = batch.without(inserted)
        held = self._lock(session, rest, plan)
        seen = self._look(session, rest)
        return verdicts | self._judge(session, rest, seen, held, plan.guard, may_write=not inserted)

    def _insert_clean(self, session: Session, batch: Batch, plan: AttemptPlan) -> set[int]:
        """Insert the purchases of clean events; return the events written.

        Only the first event of each payment is offered, so that a written purchase tells which event made it. Under the
        guard ``lock`` its pair must be locked: the payment may have become visible after the locks were taken.
        """
        firsts = dict(zip(reversed(batch.payments()), reversed(batch.ids), strict=True))
        offered = batch if len(firsts) == len(batch) else batch.only(reversed(firsts.values()))
        if plan.guard.guard is Guard.LOCK:
            locked = plan.locks.locked if plan.locks else frozenset()
            offered = offered.only(key for key in offered.ids if key in locked)
        if not offered:
            return set()
        return self._repository.insert_clean(session, offered, plan.guard, looks_at_marks=plan.looks_at_marks)

    def _choose(self, batch: Batch, seen: Mapping[int, EventFacts]) -> Batch:
        return _first_of_each(batch, {key: seen[key].key for key in batch})

    def _write(self, session: Session, batch: Batch, guard: GuardState) -> set[int]:
        return self._repository.insert_granted(session, batch, guard)


class RefundedPurchases(_UnderLocks):
    """Takes back the purchase of a refunded payment, and grants the course to another payment of the pair."""

    def apply(self, session: Session, batch: Batch, plan: AttemptPlan) -> Verdicts:
        """Write all refunds by one statement; then find the other payments of these pairs and grant their purchases."""
        held = self._lock(session, batch, plan)
        seen = self._look(session, batch)
        verdicts = self._judge(session, batch, seen, held, plan.guard)
        revoked = batch.among({key for key, verdict in verdicts.items() if verdict.outcome is Outcome.REVOKED})
        return verdicts | self._grant_next(session, revoked, seen, plan.guard)

    def _choose(self, batch: Batch, seen: Mapping[int, EventFacts]) -> Batch:
        return _first_of_each(batch, {key: seen[key].facts.payment_id for key in batch})

    def _write(self, session: Session, batch: Batch, guard: GuardState) -> set[int]:  # noqa: ARG002 - nothing is granted
        return self._repository.revoke(session, batch)

    def _grant_next(
        self, session: Session, revoked: Batch, seen: Mapping[int, EventFacts], guard: GuardState
    ) -> Verdicts:
        """Grant each pair that is free now to the oldest payment that is owed it; look again if one was not written.

        The other payments are read after the refunds are written, under the pairs' locks: meanwhile no other worker can
        judge one of them to be a duplicate.
        """
        verdicts: Verdicts = {}
        tried: set[int] = set()
        free = revoked.among({key for key in revoked if not seen[key].facts.pair_held})
        waiting = _first_of_each(free, {key: seen[key].key for key in free})
        while waiting:
            standing = self._repository.standing_payments(session, waiting)
            owed = {key: payment for key, found in standing.items() if (payment := _owed(found, seen[key]))}
            verdicts |= {key: _unwritable(seen[key]) for key in owed.keys() & tried}
            chosen = waiting.among(owed.keys() - tried)
            next_payments = replace(chosen, payment_ids=[owed[key] for key in chosen])
            written = self._repository.insert_granted(session, next_payments, guard) if chosen else set()
            verdicts |= {key: Verdict(Outcome.REVOKED, writes=True, passed_to=owed[key]) for key in written}
            tried |= chosen.keys()
            waiting = chosen.without(written)
        return verdicts


def _owed(standing: Sequence[StandingPayment], event_facts: EventFacts) -> str | None:
    """The oldest unexplained payment of a pair; None if there is none, or another worker may be granting the pair.

    If the refund freed the pair, any other worker waits for this transaction. If the pair was free before, a payment in
    flight means that another worker may be writing its purchase, and waiting for it could deadlock.
    """
    is_open = event_facts.facts.purchase_active or all(each.kind is not PaymentClass.IN_FLIGHT for each in standing)
    unexplained = (each.payment_id for each in standing if each.kind is PaymentClass.UNEXPLAINED)
    return next(unexplained, None) if is_open else None


def _unwritable(event_facts: EventFacts) -> Verdict:
    return refused("the database did not write the purchase and raised no error", event_facts.facts.last_try)


def _is_locked(event_facts: EventFacts, held: frozenset[int]) -> bool:
    return event_facts.key is None or event_facts.key in held


def _first_of_each(batch: Batch, belongs_to: Mapping[int, Hashable]) -> Batch:
    """Keep the first event of each pair, or of each payment."""
    firsts: dict[Hashable, int] = {}
    for key in batch:
        firsts.setdefault(belongs_to[key], key)
    return batch.only(firsts.values())
