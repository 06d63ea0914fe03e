"""Connections, transactions and outages. tenacity repeats transactions and waits out outages here, nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar
from uuid import UUID

import psycopg
import tenacity
from sqlalchemy import (
    URL,
    ClauseElement,
    ColumnElement,
    CursorResult,
    DateTime,
    Engine,
    Float,
    FromClause,
    Table,
    Text,
    bindparam,
    case,
    cast,
    create_engine,
    event,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine.interfaces import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine, UserDefinedType

from outbox_worker import embedded
from outbox_worker.deadline import GRACE_SECONDS, BoundedConnection, bounded
from outbox_worker.errors import (
    DatabaseUnavailable,
    Failure,
    Inconsistent,
    KeyMissing,
    SchemaError,
    SettingError,
    classify,
    said,
    sqlstate,
)
from outbox_worker.model import Batch, Column, Window
from outbox_worker.settings import Settings

T = TypeVar("T")

APPLICATION_NAME = "outbox-worker"
_LONGEST_SECONDS = 10**9
_FIRST_MOMENT: ColumnElement[Any] = literal_column("CAST('0001-01-02' AS timestamptz)")
_LAST_MOMENT: ColumnElement[Any] = literal_column("CAST('9999-12-30' AS timestamptz)")

INDEX_PLANS: Mapping[str, str] = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}
"""The statistics of queue-like tables mislead the planner; where an index path is meant, only that is left to it, and
the plan is made once: looking for a better one at each execution costs a small batch more than its work."""

FREE_PLANS: Mapping[str, str] = {
    **dict.fromkeys(("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin"), "on"),
    "plan_cache_mode": "force_custom_plan",
}
"""Where no index path may be there: the planner's choice, made anew each time, by what the tables hold now."""

# what: parameters that end with the transaction · lock: none · safe behind a pooler
_SET_LOCAL = "SELECT set_config(key, value, true) FROM jsonb_each_text(CAST(%(parameters)s AS jsonb))"

# what: the same, with the values before · lock: none
_SWITCH_LOCAL = (
    "SELECT key, current_setting(key), set_config(key, value, true) FROM jsonb_each_text(CAST(%(parameters)s AS jsonb))"
)

_KEEPALIVE = {"keepalives": 1, "keepalives_idle": 2, "keepalives_interval": 1, "keepalives_count": 2}


class Keys(UserDefinedType[Column]):
    """An array parameter of keys (integers, UUID strings, names; None for NULL), written as one literal.

    Made for a thousand keys a batch; texts that could hold a comma, a brace or a quote belong into an ARRAY.
    """

    render_bind_cast = True
    cache_ok = True

    def __init__(self, item: str) -> None:
        self.item = item

    def get_col_spec(self, **_: object) -> str:
        return f"{self.item}[]"


def _array_literal(keys: Column | None) -> str:
    if isinstance(keys, str):
        return keys
    keys = keys or ()
    if None in keys:
        keys = ["NULL" if key is None else key for key in keys]
    return "{" + ",".join(map(str, keys)) + "}"


class Stop(Protocol):
    """A flag that can be waited for: a ``threading.Event``, or the main thread's ``Signals``."""

    def is_set(self) -> bool: ...

    def wait(self, timeout: float) -> bool: ...


class Database:
    """One database: an engine, and transactions whose limits are set inside them (safe behind a pooler).

    ``deadline_seconds`` bounds a connection attempt, every statement and every answer; None: statements may take their
    time (migrate).
    """

    def __init__(self, settings: Settings, *, connections: int = 1, deadline_seconds: float | None) -> None:
        self._deadline_seconds = deadline_seconds
        self.engine = _create_engine(settings, connections, deadline_seconds)

    @contextmanager
    def transaction(self, **parameters: str) -> Iterator[Session]:
        """A READ COMMITTED transaction, committed at the end; ``parameters`` hold inside it only."""
        with Session(self.engine) as session:
            set_local(session, self._limits() | parameters)
            yield session
            session.commit()

    @contextmanager
    def snapshot(self) -> Iterator[Session]:
        """A REPEATABLE READ, READ ONLY transaction: every statement in it sees the same moment."""
        engine = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with Session(engine) as session:
            set_local(session, self._limits())
            yield session

    def was_committed(self, transaction_id: str) -> bool | None:
        """What became of a transaction whose COMMIT was never answered; None: not to be known any more.

        Source: ``pg_xact_status``. A transaction still in progress is asked about again until it is decided.
        """
        decided = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda status: status == "in progress"),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=1),
            stop=tenacity.stop_after_delay(self._deadline_seconds or 10),
            retry_error_callback=lambda _: None,
        )
        status = decided(self._transaction_status, transaction_id)
        return None if status is None else status == "committed"

    def _transaction_status(self, transaction_id: str) -> str | None:
        with self.engine.connect() as connection:
            asked = text("SELECT pg_xact_status(CAST(CAST(:id AS text) AS xid8))")
            status: str | None = connection.scalar(asked, {"id": transaction_id})
        return status

    def check(self) -> None:
        """Connect once. Raises DatabaseUnavailable with one sentence."""
        try:
            with self.engine.connect():
                pass
        except DBAPIError as error:
            raise unavailable(error) from None

    def close(self) -> None:
        self.engine.dispose()

    def _limits(self) -> dict[str, str]:
        if self._deadline_seconds is None:
            return {"statement_timeout": "0", "lock_timeout": "0"}
        milliseconds = max(1, round(self._deadline_seconds * 1000))
        return {
            "datestyle": "ISO",  # due times travel as text, and other styles write the zone by an ambiguous name
            "statement_timeout": str(milliseconds),
            "lock_timeout": str(max(1, milliseconds // 5)),
            "idle_in_transaction_session_timeout": str(milliseconds),
        }


def repeat(work: Callable[[int], T], *, attempts: int) -> T:
    """Run a whole unit of work again while it fails with ``retry``, at most ``attempts`` times in all.

    ``work`` is told how often it has failed so far, and raises its last error in the end.
    """
    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_worth_repeating),
        wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5),
        stop=tenacity.stop_after_attempt(attempts),
        reraise=True,
    )
    for attempt in again:
        with attempt:
            return work(attempt.retry_state.attempt_number - 1)
    raise AssertionError("tenacity returns or raises")


def outlast(
    work: Callable[[], T],
    stop: Stop,
    on_failure: Callable[[BaseException, float], None],
    seconds: float | None = None,
) -> T | None:
    """Run ``work`` until it returns, however long the trouble lasts; None when ``stop`` was set meanwhile.

    ``on_failure(error, pause_seconds)`` is called before each pause; pauses grow with jitter to ten seconds. A
    SchemaError and a SettingError are raised at once; with ``seconds`` the last error is raised when so much time has
    passed.
    """
    given_up = _StopWhenSet(stop)
    patient = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_worth_waiting_for),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=10),
        sleep=partial(_sleep, stop),
        stop=given_up if seconds is None else given_up | tenacity.stop_after_delay(seconds),
        before_sleep=partial(_report_failure, on_failure),
        retry_error_callback=partial(_give_up, stop),
    )
    return patient(work)


class _StopWhenSet(tenacity.stop.stop_base):
    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:  # noqa: ARG002 - tenacity's signature
        return self._stop.is_set()


def _sleep(stop: Stop, seconds: float) -> None:
    stop.wait(seconds)


def _is_worth_waiting_for(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, SchemaError | SettingError)


def _give_up(stop: Stop, state: tenacity.RetryCallState) -> None:
    if not stop.is_set() and state.outcome is not None:
        state.outcome.result()  # raises the last error


def _is_worth_repeating(error: BaseException) -> bool:
    return classify(error) is Failure.RETRY


def _report_failure(on_failure: Callable[[BaseException, float], None], state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if error is not None:
        on_failure(error, state.upcoming_sleep)


def unavailable(error: BaseException) -> DatabaseUnavailable:
    """One sentence for a connection that was not made or broke; libpq's own words, without the connection string."""
    return DatabaseUnavailable(f"No connection to the database: {said(error)}")


@contextmanager
def savepoint(session: Session) -> Iterator[None]:
    """All that is done inside stands, or none of it. Not to be nested.

    Plain statements: what SQLAlchemy does around a nested transaction costs a batch as much as a statement. It is not
    released: COMMIT does that, or the next one of the same name hides it.
    """
    connection = session.connection()
    connection.exec_driver_sql("SAVEPOINT attempt")
    try:
        yield
    except BaseException:
        if not connection.invalidated:
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT attempt")
        raise


@contextmanager
def planned(session: Session, **parameters: str) -> Iterator[None]:
    """Parameters of the planner for the statements inside; then those before. A failure leaves that to its rollback."""
    given = {"parameters": json.dumps(parameters)}
    before = {key: value for key, value, _ in session.connection().exec_driver_sql(_SWITCH_LOCAL, given)}
    yield
    set_local(session, before)


@contextmanager
def relying_on_a_key() -> Iterator[None]:
    """An upsert inside, on a key that must be unique. Raises KeyMissing where it is not."""
    try:
        yield
    except DBAPIError as error:
        if sqlstate(error) == KeyMissing.sqlstate:
            raise KeyMissing("A unique key that the worker relies on is not there.") from None
        raise


def within(moment: ColumnElement[Any]) -> ColumnElement[bool]:
    """Inside the window of a batch: parameters ``window_first`` and ``window_last``.

    What names an event by its id names its window, too. Of a queue that was empty when its statistics were gathered
    the planner believes that every index finds one row: it may look an id up in the index ``(due_at, id)``, end to end.
    """
    first, last = (cast(bindparam(f"window_{end}", type_=Text), DateTime(timezone=True)) for end in Window._fields)
    return moment.between(first, last)


def event_of(keys: FromClause, outbox: Table) -> FromClause:
    """The row of each event that ``keys`` name by their ``id``, for a join on nothing else.

    OFFSET 0 keeps the planner from turning the join round, with a queue in front that it believes to be empty.
    """
    row = select(outbox).where(outbox.c.id == keys.c.id, within(outbox.c.due_at))
    return row.offset(literal_column("0")).lateral("event")


def window_of(batch: Batch) -> dict[str, str]:
    """The values of the parameters of ``within``."""
    return {f"window_{end}": moment for end, moment in batch.window._asdict().items()}


def seconds_since(moment: ColumnElement[Any]) -> ColumnElement[float]:
    """Seconds since a moment, by the database's clock and bounded: ``-infinity`` is a timestamp, too. NULL of NULL."""
    elapsed = func.date_part("epoch", func.clock_timestamp()) - func.date_part("epoch", moment)
    return cast(case((moment.is_not(None), func.least(elapsed, _LONGEST_SECONDS))), Float)


def readable(moment: ColumnElement[Any]) -> ColumnElement[Any]:
    """A moment as clients can read it; NULL where it lies outside their calendar, as ``-infinity`` does."""
    return case((moment.between(_FIRST_MOMENT, _LAST_MOMENT), moment)).label(moment.key)


def ids_as(kind: TypeEngine[Any], ids: Iterable[UUID | str]) -> ColumnElement[Any]:
    """Ids as an array of this type, UUID or text, for ``= ANY``."""
    return cast([str(each) for each in ids], ARRAY(Text)).cast(ARRAY(kind))


class Statement:
    """A statement that is sent over and over: rendered once, so that a batch pays for its values only.

    What SQLAlchemy does for a construct at each execution costs a batch of a thousand as much as a tenth of its SQL.
    """

    def __init__(self, clause: ClauseElement) -> None:
        compiled = clause.compile(dialect=PGDialect_psycopg())  # type: ignore[no-untyped-call]
        assert isinstance(compiled, SQLCompiler)  # noqa: S101 - a statement's always is
        self._sql = str(compiled)
        self._constants = {name: bind.value for name, bind in compiled.binds.items()}
        self._keys = {name for name, bind in compiled.binds.items() if isinstance(bind.type, Keys)}

    def __str__(self) -> str:
        return self._sql

    def execute(self, session: Session, values: Mapping[str, Any]) -> CursorResult[Any]:
        """Run it in the session's transaction; ``values`` by the names of its parameters."""
        written = {name: _array_literal(value) if name in self._keys else value for name, value in values.items()}
        return session.connection().exec_driver_sql(self._sql, self._constants | written)


def write(session: Session, statement: Statement, values: Mapping[str, Any], rows: int) -> None:
    """Execute a write that must touch exactly ``rows`` rows: zero, or one too many, is never success.

    Raises Inconsistent, and KeyMissing.
    """
    with relying_on_a_key():
        touched = statement.execute(session, values).rowcount
    if touched != rows:
        raise Inconsistent(f"A statement touched {touched} rows instead of {rows}: {str(statement)[:60]} …")


def connect_directly(settings: Settings) -> psycopg.Connection:
    """An autocommit connection past any pooler, for LISTEN. Raises psycopg.OperationalError."""
    where = _where(settings, settings.listen_url)
    return psycopg.connect(**{**where, **_connect_arguments(settings.database_deadline_seconds), "autocommit": True})


def _where(settings: Settings, url: URL | None = None) -> dict[str, Any]:
    """The address, as psycopg takes it. Whoever finds the embedded server gone starts it again."""
    if url is None and settings.embedded_directory is not None:
        return embedded.ensure_server(settings.embedded_directory, bin_dir=settings.embedded_bin_dir)
    given: dict[str, Any] = PGDialect_psycopg().create_connect_args(url or settings.url)[1]  # type: ignore[no-untyped-call]
    return given


def _connect_arguments(deadline_seconds: float) -> dict[str, Any]:
    return {
        "connect_timeout": max(2, round(deadline_seconds)),
        "application_name": APPLICATION_NAME,
        "target_session_attrs": "read-write",
        "tcp_user_timeout": round(deadline_seconds * 1000),
        **_KEEPALIVE,
    }


def _connect(settings: Settings, answer_seconds: float | None) -> BoundedConnection:
    """A connection of the pool, cut when an answer takes longer than that; None: statements may take their time."""
    arguments = _connect_arguments(settings.database_deadline_seconds)
    connection = BoundedConnection.connect(**{**_where(settings), **arguments})
    if settings.pooler == "transaction":
        connection.prepare_threshold = None  # the next transaction may meet another backend
    return connection if answer_seconds is None else bounded(connection, answer_seconds + GRACE_SECONDS)


def _create_engine(settings: Settings, connections: int, deadline_seconds: float | None) -> Engine:
    engine = create_engine(
        "postgresql+psycopg://",
        creator=partial(_connect, settings, deadline_seconds),
        pool_size=connections,
        max_overflow=1,
        pool_timeout=deadline_seconds or settings.database_deadline_seconds,
        pool_use_lifo=True,
        isolation_level="READ COMMITTED",
        hide_parameters=True,
    )
    event.listen(engine, "handle_error", _drop_lost_connections)
    return engine


def _drop_lost_connections(context: ExceptionContext) -> None:
    """A read-only node answers politely for ever and a stale plan stays stale: treat both as a lost connection."""
    if classify(context.original_exception) is Failure.RECONNECT:
        context.is_disconnect = True


def set_local(session: Session, parameters: Mapping[str, str]) -> None:
    """Set parameters that hold until the transaction ends."""
    session.connection().exec_driver_sql(_SET_LOCAL, {"parameters": json.dumps(parameters)})
