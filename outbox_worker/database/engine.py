"""Opens connections and transactions. If the answer to a COMMIT was lost, finds out whether the COMMIT succeeded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Literal, cast

import psycopg
import tenacity
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine.interfaces import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.deadline import GRACE_SECONDS, BoundedConnection, bounded
from outbox_worker.database.direct import Direct
from outbox_worker.database.encodings import read_leniently
from outbox_worker.database.failures import Failure, classify, server_message, standbys_among
from outbox_worker.database.planner import set_local
from outbox_worker.embedded import server as embedded
from outbox_worker.errors import CommitLost, DatabaseUnavailable
from outbox_worker.settings import Settings

APPLICATION_NAME = "outbox-worker"

_PLAIN = {
    "array_nulls": "on",  # the worker sends arrays that contain NULL, for example of payment ids
    "datestyle": "ISO",  # due times are sent as text; other date styles write ambiguous time zones
    "extra_float_digits": "1",  # below 1, the server rounds times and durations
    "quote_all_identifiers": "off",  # the worker compares the index predicate as printed
    "transaction_timeout": "0",  # PostgreSQL 17 and later; the worker limits single statements instead
}
"""PostgreSQL parameters that the worker sets in each transaction.

If the role or the database has other values, some of the worker's statements fail.
"""

# what: switches time limits off for this session · lock: none
_LIFT = (
    "SELECT set_config('statement_timeout', '0', false), set_config('lock_timeout', '0', false),"
    " set_config('idle_in_transaction_session_timeout', '0', false), set_config('idle_session_timeout', '0', false)"
)
_TRIES = 5

_KEEPALIVE = {"keepalives": 1, "keepalives_idle": 2, "keepalives_interval": 1, "keepalives_count": 2}


class Database:
    """Opens transactions in one database.

    Each transaction sets its time-outs itself. The time-outs therefore also work through a pooler.
    The server cancels a statement that runs longer than ``deadline_seconds``. The client waits
    about equally long for an answer. If ``deadline_seconds`` is None, no limit applies, for example
    for migrations.

    If ``looks`` is true, all transactions are READ ONLY, and the server can be a standby. If
    ``looks`` is false, the server must be a primary. All transactions are then READ WRITE, even if
    ``default_transaction_read_only`` is on.
    """

    def __init__(
        self, settings: Settings, *, connections: int = 1, deadline_seconds: float | None, looks: bool = False
    ) -> None:
        self._settings, self._deadline_seconds, self._looks = settings, deadline_seconds, looks
        self._can_queue = settings.pooler != "transaction" and psycopg.Pipeline.is_supported()
        self.engine = _create_engine(settings, connections, deadline_seconds, looks=looks)

    def with_deadline(self, seconds: float) -> Database:
        """Return a new ``Database`` with the same settings and another deadline.

        The caller must close the new ``Database``.
        """
        return Database(self._settings, deadline_seconds=seconds, looks=self._looks)

    @contextmanager
    def transaction(self, **parameters: str) -> Iterator[Session]:
        """Run a READ COMMITTED transaction and commit it at the end.

        The PostgreSQL parameters in ``parameters`` apply only to this transaction.
        """
        with Session(self.engine) as session:
            set_local(session, self._limits() | parameters)
            yield session
            session.commit()

    @contextmanager
    def snapshot(self) -> Iterator[Session]:
        """Run a REPEATABLE READ, READ ONLY transaction.

        All statements in the transaction see the same state of the database.
        """
        engine = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with Session(engine) as session:
            set_local(session, self._limits())
            yield session

    def direct(self, **parameters: str) -> AbstractContextManager[Direct]:
        """Run a READ COMMITTED transaction on a psycopg connection. The caller calls ``commit``.

        Raises the errors of psycopg. If libpq has no pipelines, the client does not send BEGIN and
        the parameters together with the first statement. A pooler in transaction mode has the same
        effect.
        """
        return self._direct(parameters, looks=False)

    def look(self, **parameters: str) -> AbstractContextManager[Direct]:
        """Run a transaction like ``direct``, but with one statement that only reads.

        The transaction takes one round trip.
        """
        return self._direct(parameters, looks=True)

    @contextmanager
    def _direct(self, parameters: Mapping[str, str], *, looks: bool) -> Iterator[Direct]:
        pooled = self.engine.raw_connection()
        connection = cast("BoundedConnection", pooled.driver_connection)
        try:
            limits = {**self._limits(), **parameters}
            with Direct(connection, limits, queues=self._can_queue, looks=looks) as transaction:
                yield transaction
        except BaseException as error:
            if classify(error) is Failure.RECONNECT:
                pooled.invalidate(error)
            raise
        finally:
            if connection.closed and pooled.is_valid:
                pooled.invalidate()
            pooled.close()

    def commit(self, session: Session | Direct, transaction_id: str | None) -> Literal["commit", "unknown"]:
        """Commit. If the connection is lost before the answer, ask the server whether the transaction was committed.

        Return ``unknown`` if COMMIT got no answer, but the server later confirms the transaction.
        Raises CommitLost if the transaction was rolled back, or if the server does not know the
        result. Raises the error of the database if the database refuses to commit.
        """
        try:
            session.commit()
        except (DBAPIError, psycopg.Error) as error:
            if classify(error) is not Failure.RECONNECT or transaction_id is None:
                raise
            session.close()
            with suppress(DBAPIError):  # no server answers, or a promoted standby does not know the transaction
                if self.was_committed(transaction_id):
                    return "unknown"
            raise CommitLost("The connection was lost during COMMIT; the batch is settled again.") from error
        return "commit"

    def was_committed(self, transaction_id: str) -> bool | None:
        """Ask the server whether it committed a transaction whose COMMIT got no answer.

        Repeat ``pg_xact_status`` until the transaction has ended or the deadline has passed. Return
        None if the server no longer knows the result, or if the deadline has passed.
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
        """Open a connection as a check. Raises DatabaseUnavailable with a one-sentence message."""
        try:
            with self.engine.connect():
                pass
        except DBAPIError as error:
            raise unavailable(error) from None

    def close(self) -> None:
        self.engine.dispose()

    def _limits(self) -> dict[str, str]:
        if self._deadline_seconds is None:
            return {**_PLAIN, "statement_timeout": "0", "lock_timeout": "0"}
        milliseconds = max(1, round(self._deadline_seconds * 1000))
        return {
            **_PLAIN,
            "statement_timeout": str(milliseconds),
            "lock_timeout": str(max(1, milliseconds // 5)),
            "idle_in_transaction_session_timeout": str(milliseconds),
        }


def unavailable(error: BaseException) -> DatabaseUnavailable:
    """Return the error for a connection that failed or broke.

    The text of the error contains libpq's message, but not the URL.
    """
    if standbys := standbys_among(error):
        takes = "is a standby, which takes" if len(standbys) == 1 else "are standbys, which take"
        return DatabaseUnavailable(
            f"No connection to a primary: {' and '.join(standbys)} {takes} no writes. Give the URL of the primary in "
            "OUTBOX_DATABASE_URL, or promote the standby. Commands that only look also work on a standby."
        )
    return DatabaseUnavailable(f"No connection to the database: {server_message(error)}")


# what: checks deferred constraints and runs deferred triggers now instead of at COMMIT · lock: none
_RUN_DEFERRED = text("SET CONSTRAINTS ALL IMMEDIATE")
# what: defers the constraints again, until the next check · lock: none
_DEFER_AGAIN = text("SET CONSTRAINTS ALL DEFERRED")


def check_deferred(session: Session) -> None:
    """Run the deferred triggers and check the deferred constraints now, before COMMIT.

    Raise the error that COMMIT would raise.
    """
    session.execute(_RUN_DEFERRED)
    session.execute(_DEFER_AGAIN)


@contextmanager
def savepoint(session: Session) -> Iterator[None]:
    """Run the ``with`` block in a savepoint. If the block fails, roll back to the savepoint.

    Do not nest these savepoints. A nested transaction of SQLAlchemy would take the time of one more
    statement. RELEASE SAVEPOINT is not needed: COMMIT ends all savepoints. A later savepoint with
    the same name hides the earlier savepoint.
    """
    connection = session.connection()
    connection.exec_driver_sql("SAVEPOINT attempt")
    try:
        yield
    except BaseException:
        if not connection.invalidated:
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT attempt")
        raise


def connect_directly(settings: Settings, *, looks: bool = False) -> psycopg.Connection:
    """Open an autocommit connection for LISTEN that bypasses the pooler.

    If ``looks`` is true, the server can be a standby. Raises psycopg.OperationalError.
    """
    where = conninfo_to_dict(settings.listen_conninfo) if settings.listen_conninfo else _where(settings)
    arguments = _connect_arguments(settings.database_deadline_seconds)
    (kind, *_) = _kinds_of_server(where, looks=looks)
    return psycopg.connect(**{**where, **arguments, "target_session_attrs": kind, "autocommit": True})


def _where(settings: Settings) -> dict[str, Any]:
    """Return connection arguments for psycopg. Start the embedded server if it is configured but not running."""
    if settings.embedded_directory is not None:
        return embedded.ensure_server(settings.embedded_directory, bin_dir=settings.embedded_bin_dir)
    return conninfo_to_dict(settings.conninfo)


def _connect_arguments(deadline_seconds: float) -> dict[str, Any]:
    return {
        "connect_timeout": max(2, round(deadline_seconds)),
        "application_name": APPLICATION_NAME,
        "client_encoding": "UTF8",
        "tcp_user_timeout": round(deadline_seconds * 1000),
        **_KEEPALIVE,
    }


def _kinds_of_server(where: Mapping[str, Any], *, looks: bool) -> list[str]:
    """Return the values of ``target_session_attrs`` in the order in which the caller must try them.

    A command that only reads can use any server. If the URL contains ``target_session_attrs``, a
    command that only reads uses this value. If the URL names several hosts, try the primary first.
    A standby can be behind the primary.

    The value ``read-write`` is not used. ``read-write`` also refuses a primary if
    ``default_transaction_read_only`` is on.
    """
    if not looks:
        return ["primary"]
    if given := where.get("target_session_attrs"):
        return [str(given)]
    has_several = any("," in str(where.get(key, "")) for key in ("host", "hostaddr"))
    return ["primary", "any"] if has_several else ["any"]


def _connect(settings: Settings, answer_seconds: float | None, *, looks: bool) -> BoundedConnection:
    """Open a connection, and cut it if an answer takes longer than ``answer_seconds``.

    If ``answer_seconds`` is None, the connection has no limit.
    """
    where = _where(settings)
    first, *others = _kinds_of_server(where, looks=looks)
    arguments = {**where, **_connect_arguments(settings.database_deadline_seconds)}
    try:
        connection = BoundedConnection.connect(**{**arguments, "target_session_attrs": first})
    except psycopg.OperationalError:
        if not others:
            raise
        connection = BoundedConnection.connect(**{**arguments, "target_session_attrs": others[0]})
    connection.read_only = looks  # psycopg then begins every transaction READ ONLY or READ WRITE
    read_leniently(connection)
    if settings.pooler == "transaction":
        connection.prepare_threshold = None  # the next transaction can run in another backend
    else:
        _lift_time_limits(connection)
    return connection if answer_seconds is None else bounded(connection, answer_seconds + GRACE_SECONDS)


def _lift_time_limits(connection: psycopg.Connection[Any]) -> None:
    """Switch off the time limits of the role and of the database. Each transaction sets new limits.

    A very short limit could cancel the statement with which a transaction sets its limits. A very
    short limit can also cancel the statement of this function. This function therefore tries a few
    times.
    """
    connection.autocommit = True
    for _ in range(_TRIES):
        try:
            connection.execute(_LIFT)
            break
        except psycopg.errors.QueryCanceled:
            continue
    connection.autocommit = False


def _create_engine(settings: Settings, connections: int, deadline_seconds: float | None, *, looks: bool) -> Engine:
    engine = create_engine(
        "postgresql+psycopg://",
        creator=partial(_connect, settings, deadline_seconds, looks=looks),
        pool_size=connections,
        max_overflow=1,
        pool_timeout=deadline_seconds or settings.database_deadline_seconds,
        pool_use_lifo=True,
        isolation_level="READ COMMITTED",
        hide_parameters=True,
    )
    event.listen(engine, "handle_error", _drop_lost_connections)
    return engine.execution_options(postgresql_readonly=True) if looks else engine


def _drop_lost_connections(context: ExceptionContext) -> None:
    """Drop a connection if later statements would also fail, for example on a read-only server."""
    if classify(context.original_exception) is Failure.RECONNECT:
        context.is_disconnect = True
