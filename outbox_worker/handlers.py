"""What the worker does with each type of event: one entry per type, in a table that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from sqlalchemy.orm import Session

from outbox_worker.decision import RetryPolicy, decide, refused
from outbox_worker.guard import GuardState
from outbox_worker.health import is_owned
from outbox_worker.model import (
    GRANTS,
    PURCHASE_CONFIRMED,
    Batch,
    Facts,
    Guard,
    Outcome,
    Verdict,
    Verdicts,
)
from outbox_worker.purchases import PairLocks, PurchaseRepository, Sight
from outbox_worker.schema import Tables

_CLEAN = Verdict(Outcome.CREATED, clean=True)


@dataclass(frozen=True, slots=True)
class Footing:
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

    def apply(self, session: Session, batch: Batch, footing: Footing) -> Verdicts:
        """Do the work and return a verdict per event; an event without one stays in the outbox as it was.

        Marks, removal, retries and dead letters are the processor's. An exception rolls all of it back.
        """
        ...


Handlers = Mapping[str, Handler]


_HANDLED_TYPES = (PURCHASE_CONFIRMED,)

UnknownTypes = Literal["bury", "ignore"] | None


def claimed_types(session: Session, tables: Tables, unknown_types: UnknownTypes) -> tuple[str, ...] | None:
    """The event types to claim; None: all, so that unknown ones are buried (the default on an outbox of ours).

    An adopted outbox is shared: there, unless told otherwise, events that we do not handle belong to somebody else.
    """
    choice = unknown_types or ("bury" if is_owned(session, tables.outbox) else "ignore")
    return None if choice == "bury" else _HANDLED_TYPES


def build_handlers(repository: PurchaseRepository, policy: RetryPolicy) -> Handlers:
    """The table."""
    return {
        PURCHASE_CONFIRMED: ConfirmedPurchases(repository, policy),
    }


def judge_unhandled(batch: Batch) -> Verdicts:
    """Rule 1: events of a type that the table does not hold."""
    return dict.fromkeys(batch, decide(Facts(handled=False)))


class ConfirmedPurchases:
    """Makes the purchase that a confirmed payment is owed."""

    def __init__(self, repository: PurchaseRepository, policy: RetryPolicy) -> None:
        self._repository = repository
        self._policy = policy

    def apply(self, session: Session, batch: Batch, footing: Footing) -> Verdicts:
        """One statement for all events that nothing speaks against; the others are judged under their pairs' locks.

        Raises OutOfOrder when one of the others is owed a purchase, too: purchases are written in one order, and those
        of later pairs stand already.
        """
        clean = set() if footing.judges_all else self._insert_clean(session, batch, footing)
        verdicts = dict.fromkeys(clean, _CLEAN)
        if len(clean) == len(batch):
            return verdicts
        rest = batch.without(clean)
        locks = footing.locks or self._repository.lock_pairs(session, rest, footing.guard.lock_capacity)
        return verdicts | self._judge(session, rest, footing.guard, locks.keys, may_write=not clean)

    def _insert_clean(self, session: Session, batch: Batch, footing: Footing) -> set[int]:
        """Offer the first event of each payment, so that a written purchase tells which event made it.

        Under the guard ``lock`` its pair must be locked, too: a payment that was not there when the locks were taken
        may have appeared since.
        """
        firsts = dict(zip(reversed(batch.payments()), reversed(batch.ids), strict=True))
        offered = batch if len(firsts) == len(batch) else batch.only(reversed(firsts.values()))
        if footing.guard.guard is Guard.LOCK:
            locked = footing.locks.locked if footing.locks else frozenset()
            offered = offered.only(key for key in offered.ids if key in locked)
        if not offered:
            return set()
        return self._repository.insert_clean(session, offered, footing.guard, looks_at_marks=footing.looks_at_marks)

    def _judge(
        self, session: Session, batch: Batch, guard: GuardState, held: frozenset[int], *, may_write: bool
    ) -> Verdicts:
        """Look, decide, write; look again at what a write changed. Every round settles an event or is the last."""
        verdicts: Verdicts = {}
        tried: set[int] = set()
        waiting = batch
        while waiting:
            seen = self._repository.look(session, waiting, self._policy)
            judged = {key: decide(sight.facts) for key, sight in seen.items() if _is_locked(sight, held)}
            grants = {key for key, verdict in judged.items() if verdict.outcome in GRANTS}
            verdicts |= {key: verdict for key, verdict in judged.items() if key not in grants}
            verdicts |= {key: self._unwritable(seen[key]) for key in grants & tried}
            if grants and not may_write:
                raise OutOfOrder("a purchase is owed behind purchases of later pairs")
            firsts = _one_per_pair(batch, grants - tried, seen)
            made = self._repository.insert_granted(session, firsts, guard) if firsts else set()
            verdicts |= {key: judged[key] for key in made}
            tried |= set(firsts)
            waiting = batch.only(grants - verdicts.keys())
        return verdicts

    def _unwritable(self, sight: Sight) -> Verdict:
        return refused("the purchase was not written, and nothing that explains it is there", sight.facts.last_try)


def _is_locked(sight: Sight, held: frozenset[int]) -> bool:
    return sight.key is None or sight.key in held


def _one_per_pair(batch: Batch, keys: set[int], seen: Mapping[int, Sight]) -> Batch:
    """The oldest event of each pair; the others of the pair are judged again when its purchase is there."""
    oldest: dict[int | None, int] = {}
    for key in batch:
        if key in keys:
            oldest.setdefault(seen[key].key, key)
    return batch.only(oldest.values())
