"""Defines the handlers of events. ``build_handlers`` returns one handler per event type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.failures import NO_EVENTS_FAULT, classify, is_arbiter_lost
from outbox_worker.decision import RetryPolicy, decide, refused
from outbox_worker.model import PURCHASE_CONFIRMED, PURCHASE_REFUNDED, Batch, Facts, Outcome, Verdict, Verdicts
from outbox_worker.schema.catalogue import is_owned
from outbox_worker.schema.tables import Tables
from outbox_worker.settle.escalation import PartRefused, Step
from outbox_worker.store.guard import GuardState
from outbox_worker.store.pairs import EventFacts, PairLocks, StandingPayment
from outbox_worker.store.payment_classes import PaymentClass
from outbox_worker.store.purchases import PurchaseRepository


@dataclass(frozen=True, slots=True)
class AttemptPlan:
    """The options of one attempt to settle a batch."""

    guard: GuardState
    locks: PairLocks
    """The pairs that are locked already."""
    grants_next: bool = True
    """Whether a refund creates a purchase for the next payment of the pair.

    If false, the worker creates no purchase for this payment, and the verdict names the payment.
    """


class Handler(Protocol):
    """Handles a batch of claimed events of one type inside the session's transaction."""

    def apply(self, session: Session, batch: Batch, plan: AttemptPlan) -> Verdicts:
        """Write the purchases and return a verdict per event.

        An event without a verdict stays unchanged in the outbox. ``Settlement`` then writes marks,
        retries and dead letters, and deletes settled events. If this method raises an exception,
        all of its writes are rolled back.
        """
        ...


Handlers = Mapping[str, Handler]


HANDLED_TYPES = (PURCHASE_CONFIRMED, PURCHASE_REFUNDED)

UnknownTypes = Literal["bury", "ignore"] | None


def claimed_types(session: Session, tables: Tables, unknown_types: UnknownTypes) -> tuple[str, ...] | None:
    """Return the event types that the worker claims, or None for all types.

    If the worker claims all types, events of unknown types become dead letters. The setting
    ``unknown_types`` decides this. If the setting is not given, the creator of the outbox table
    decides. If the worker's migrations created the table, the worker claims all types. If another
    application created the table, the worker leaves events of unknown types to other consumers.
    """
    choice = unknown_types or ("bury" if is_owned(session, tables.outbox) else "ignore")
    return None if choice == "bury" else HANDLED_TYPES


def build_handlers(repository: PurchaseRepository, policy: RetryPolicy) -> Handlers:
    """Return the handler of each event type."""
    return {
        PURCHASE_CONFIRMED: ConfirmedPurchases(repository, policy),
        PURCHASE_REFUNDED: RefundedPurchases(repository, policy),
    }


def judge_unhandled(batch: Batch) -> Verdicts:
    """Return the verdict of rule 1 for events whose type has no handler."""
    return dict.fromkeys(batch, decide(Facts(handled=False)))


class _UnderLocks(ABC):
    """Base class of both handlers.

    The class reads, decides and writes under the locks of the pairs.
    """

    def __init__(self, repository: PurchaseRepository, policy: RetryPolicy) -> None:
        self._repository = repository
        self._policy = policy

    @abstractmethod
    def _choose(self, batch: Batch, seen: Mapping[int, EventFacts]) -> Batch:
        """Choose events whose purchases one statement can write together.

        ``_judge`` judges all other events again after this statement.
        """

    @abstractmethod
    def _write(self, session: Session, batch: Batch, guard: GuardState) -> set[int]:
        """Write the purchases of these events. Return the ids of the events whose purchase was written."""

    def _look(self, session: Session, batch: Batch) -> dict[int, EventFacts]:
        return self._repository.look(session, batch, self._policy)

    def _judge(
        self,
        session: Session,
        batch: Batch,
        seen: Mapping[int, EventFacts],
        held: frozenset[int],
        guard: GuardState,
    ) -> Verdicts:
        """Judge the events and write their purchases.

        Judge an event again if its purchase was not written. In each round except the last, the
        method tries to write a purchase of an event for the first time.
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
            chosen = self._choose(batch.among(writing - tried), seen)
            written = self._write(session, chosen, guard) if chosen else set()
            verdicts |= {key: judged[key] for key in written}
            tried |= chosen.keys()
            waiting = batch.among(writing - verdicts.keys())
            seen = self._look(session, waiting) if waiting else {}
        return verdicts


class ConfirmedPurchases(_UnderLocks):
    """Creates the purchases of confirmed payments."""

    def apply(self, session: Session, batch: Batch, plan: AttemptPlan) -> Verdicts:
        """Judge the events, and create the purchases that are owed."""
        return self._judge(session, batch, self._look(session, batch), plan.locks.keys, plan.guard)

    def _choose(self, batch: Batch, seen: Mapping[int, EventFacts]) -> Batch:
        return _first_of_each(batch, {key: seen[key].key for key in batch})

    def _write(self, session: Session, batch: Batch, guard: GuardState) -> set[int]:
        return self._repository.insert_granted(session, batch, guard)


class RefundedPurchases(_UnderLocks):
    """Deactivates purchases of refunded payments.

    Creates a purchase for another payment of the pair.
    """

    def apply(self, session: Session, batch: Batch, plan: AttemptPlan) -> Verdicts:
        """Deactivate all refunded purchases.

        Then create purchases for the next payments of these pairs.
        """
        seen = self._look(session, batch)
        verdicts = self._judge(session, batch, seen, plan.locks.keys, plan.guard)
        revoked = batch.among({key for key, verdict in verdicts.items() if verdict.outcome is Outcome.REVOKED})
        return verdicts | self._grant_next(session, revoked, seen, plan)

    def _choose(self, batch: Batch, seen: Mapping[int, EventFacts]) -> Batch:
        return _first_of_each(batch, {key: seen[key].facts.payment_id for key in batch})

    def _write(self, session: Session, batch: Batch, _guard: GuardState) -> set[int]:
        return self._repository.revoke(session, batch)

    def _grant_next(
        self, session: Session, revoked: Batch, seen: Mapping[int, EventFacts], plan: AttemptPlan
    ) -> Verdicts:
        """Create a purchase for each pair that has no active purchase now.

        The purchase belongs to the oldest payment of the pair that has no purchase. This method
        reads the payments after the refunds are written, and while the pairs are locked. Therefore
        no other worker can judge a payment as a duplicate between the refund and the new purchase.
        If the database does not write a purchase, the method reads the payments again. The refund
        stays written even if no purchase is written.
        """
        verdicts: Verdicts = {}
        tried: set[int] = set()
        free = revoked.among({key for key in revoked if not seen[key].facts.pair_held})
        waiting = _first_of_each(free, {key: seen[key].key for key in free})
        while waiting:
            standing = self._repository.standing_payments(session, waiting)
            owed = {key: payment for key, found in standing.items() if (payment := _owed(found, seen[key]))}
            unwritten = owed.keys() & tried if plan.grants_next else owed.keys()
            verdicts |= {key: _not_passed_on(owed[key]) for key in unwritten}
            chosen = waiting.among(owed.keys() - unwritten)
            next_payments = replace(chosen, payment_ids=[owed[key] for key in chosen])
            written = self._insert_next(session, next_payments, plan.guard) if chosen else set()
            verdicts |= {key: Verdict(Outcome.REVOKED, writes=True, passed_to=owed[key]) for key in written}
            tried |= chosen.keys()
            waiting = chosen.without(written)
        return verdicts

    def _insert_next(self, session: Session, batch: Batch, guard: GuardState) -> set[int]:
        """Create the purchases of the pairs' next payments.

        If the database refuses one of these purchases, raise PartRefused. The worker then writes
        the refund without this purchase.
        """
        try:
            return self._repository.insert_granted(session, batch, guard)
        except DBAPIError as error:
            if classify(error) in NO_EVENTS_FAULT or is_arbiter_lost(error):
                raise
            raise PartRefused(Step.GRANT_NEXT, error) from error


def _owed(standing: Sequence[StandingPayment], event_facts: EventFacts) -> str | None:
    """Return the oldest payment of a pair in the class ``unexplained``.

    Nothing explains why an unexplained payment has no purchase. Return None if the pair has no
    unexplained payment, or if another worker is possibly writing the pair's purchase.

    If this refund deactivated the pair's active purchase, other workers wait for this transaction
    before they write to the pair. Therefore this transaction can create a purchase. If the pair had
    no active purchase before, another worker is possibly writing a purchase for an event in the
    outbox. If this worker waited for the other worker, the two could deadlock.
    """
    is_open = event_facts.facts.purchase_active or all(each.kind != PaymentClass.IN_FLIGHT for each in standing)
    unexplained = (each.payment_id for each in standing if each.kind == PaymentClass.UNEXPLAINED)
    return next(unexplained, None) if is_open else None


def _not_passed_on(payment_id: str) -> Verdict:
    """Return the verdict on a refund after which the next payment of the pair got no purchase."""
    detail = "the database did not write the purchase and raised no error"
    return Verdict(Outcome.REVOKED, detail=detail, writes=True, refused_next=payment_id)


def _unwritable(event_facts: EventFacts) -> Verdict:
    return refused("the database did not write the purchase and raised no error", event_facts.facts.last_try)


def _is_locked(event_facts: EventFacts, held: frozenset[int]) -> bool:
    return event_facts.key is None or event_facts.key in held


def _first_of_each(batch: Batch, belongs_to: Mapping[int, Hashable]) -> Batch:
    """Keep only the first of all events that have the same value in ``belongs_to``.

    ``belongs_to`` maps each event's key to a pair's key or to a payment.
    """
    firsts: dict[Hashable, int] = {}
    for key in batch:
        firsts.setdefault(belongs_to[key], key)
    return batch.only(firsts.values())
