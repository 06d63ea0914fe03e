"""What the worker does with each type of event: one entry per type, in a table that can be read."""

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
    """On what footing a batch is handled."""

    guard: GuardState
    locks: PairLocks | None = None
    """The pairs already locked; None: the handler locks those it must judge."""
    looks_at_marks: bool = True
    """Otherwise events are taken for new, and the attempt fails by 23505 where one is marked."""
    judges_all: bool = False
    """Judge every event: the fast statement would write purchases in front of one that is owed."""


class OutOfOrder(Exception):
    """Every event of the batch must be judged: a purchase would be written out of the order that all workers keep."""


class Handler(Protocol):
    """Handles claimed events of one type, a batch at a time, inside the session's transaction."""

    def apply(self, session: Session, batch: Batch, plan: AttemptPlan) -> Verdicts:
        """Do the work and return a verdict per event; an event without one stays in the outbox as it was.

        Marks, removal, retries and dead letters are the processor's. An exception rolls all of it back.
        """
        ...


Handlers = Mapping[str, Handler]


HANDLED_TYPES = (PURCHASE_CONFIRMED, PURCHASE_REFUNDED)

UnknownTypes = Literal["bury", "ignore"] | None


def claimed_types(session: Session, tables: Tables, unknown_types: UnknownTypes) -> tuple[str, ...] | None:
    """The event types to claim; None: all, so that unknown ones are buried (the default on an outbox of ours).

    An adopted outbox is shared: there, unless told otherwise, events that we do not handle belong to somebody else.
    """
    choice = unknown_types or ("bury" if is_owned(session, tables.outbox) else "ignore")
    return None if choice == "bury" else HANDLED_TYPES


def build_handlers(repository: PurchaseRepository, policy: RetryPolicy) -> Handlers:
    """The table."""
    return {
        PURCHASE_CONFIRMED: ConfirmedPurchases(repository, policy),
        PURCHASE_REFUNDED: RefundedPurchases(repository, policy),
    }


def judge_unhandled(batch: Batch) -> Verdicts:
    """Rule 1: events of a type that the table does not hold."""
    return dict.fromkeys(batch, decide(Facts(handled=False)))


class _UnderLocks(ABC):
    """What the handlers of purchases share: look, decide and write under the pairs' locks."""

    def __init__(self, repository: PurchaseRepository, policy: RetryPolicy) -> None:
        self._repository = repository
        self._policy = policy

    @abstractmethod
    def _choose(self, batch: Batch, seen: Mapping[int, EventFacts]) -> Batch:
        """Those of the events that one statement can write; the others are judged again when it has."""

    @abstractmethod
    def _write(self, session: Session, batch: Batch, guard: GuardState) -> set[int]:
        """Write the purchases of events that ``decide`` said are written; return those of which one stands."""

    def _lock(self, session: Session, batch: Batch, plan: AttemptPlan) -> frozenset[int]:
        """The keys of the pairs that are locked from now on."""
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
        """Decide by what was seen, write; look again at what a write changed.

        Every round settles an event or is the last.
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
                raise OutOfOrder("a purchase is owed behind purchases of later pairs")
            chosen = self._choose(batch.among(writing - tried), seen)
            made = self._write(session, chosen, guard) if chosen else set()
            verdicts |= {key: judged[key] for key in made}
            tried |= chosen.keys()
            waiting = batch.among(writing - verdicts.keys())
            seen = self._look(session, waiting) if waiting else {}
        return verdicts


class ConfirmedPurchases(_UnderLocks):
    """Makes the purchase that a confirmed payment is owed."""

    def apply(self, session: Session, batch: Batch, plan: AttemptPlan) -> Verdicts:
        """One statement for all events that nothing speaks against; the others are judged under their pairs' locks.

        Raises OutOfOrder when one of the others is owed a purchase, too: purchases are written in one order, and those
        of later pairs stand already.
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
        """Offer the first event of each payment, so that a written purchase tells which event made it.

        Under the guard ``lock`` its pair must be locked, too: a payment that was not there when the locks were taken
        may have appeared since.
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
    """Takes the purchase of a refunded payment back, and grants the pair to another that was paid for."""

    def apply(self, session: Session, batch: Batch, plan: AttemptPlan) -> Verdicts:
        """All refunds by one statement; then, in statements of their own, who else stands, and their purchases."""
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
        """Where a pair is free now, grant the oldest payment that is owed it; look again at what was not written.

        Which other payments stand is looked for once the refunds are written: nobody is told any more that one of them
        is a duplicate, because that needs the pair's lock.
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
            made = self._repository.insert_granted(session, next_payments, guard) if chosen else set()
            verdicts |= {key: Verdict(Outcome.REVOKED, writes=True, passed_to=owed[key]) for key in made}
            tried |= chosen.keys()
            waiting = chosen.without(made)
        return verdicts


def _owed(standing: Sequence[StandingPayment], event_facts: EventFacts) -> str | None:
    """The oldest payment of a pair that nothing explains.

    Where the pair was free before the refund, none while the event of another waits in the outbox: another worker may
    be writing its purchase, and must not be waited for. Where the refund freed it, that worker waits for us.
    """
    is_open = event_facts.facts.purchase_active or all(each.kind is not PaymentClass.IN_FLIGHT for each in standing)
    unexplained = (each.payment_id for each in standing if each.kind is PaymentClass.UNEXPLAINED)
    return next(unexplained, None) if is_open else None


def _unwritable(event_facts: EventFacts) -> Verdict:
    return refused("the purchase was not written, and nothing that explains it is there", event_facts.facts.last_try)


def _is_locked(event_facts: EventFacts, held: frozenset[int]) -> bool:
    return event_facts.key is None or event_facts.key in held


def _first_of_each(batch: Batch, belongs_to: Mapping[int, Hashable]) -> Batch:
    """The first event of each pair, or of each payment."""
    firsts: dict[Hashable, int] = {}
    for key in batch:
        firsts.setdefault(belongs_to[key], key)
    return batch.only(firsts.values())
