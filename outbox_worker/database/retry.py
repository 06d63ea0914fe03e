"""Repeats a failed transaction, or waits until the database is available again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event
from typing import Protocol, TypeVar, cast

import tenacity

from outbox_worker.database.failures import Failure, classify
from outbox_worker.errors import SchemaError, SettingError

T = TypeVar("T")


class Sleep(Protocol):
    """An object that lets a thread sleep for at most ``timeout`` seconds.

    ``wait`` returns True if something woke the thread before the time-out.
    """

    def wait(self, timeout: float) -> bool: ...


class Stop(Sleep, Protocol):
    """A stop flag for which a thread can wait.

    The flag is a ``threading.Event`` or the ``Signals`` of the main thread.
    """

    def is_set(self) -> bool: ...


def retry_transaction(
    work: Callable[[int], T], *, attempts: int, gives_up: Callable[[BaseException], bool] = lambda _: False
) -> T:
    """Run ``work``. If it fails with an error of the class ``retry``, run it again.

    ``work`` runs at most ``attempts`` times. The argument of ``work`` is the number of failures so
    far. If all attempts fail, raises the last error. Raises an error at once if its class is not
    ``retry``, or if ``gives_up`` returns True for the error.
    """
    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: _is_worth_repeating(error) and not gives_up(error)),
        wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5),
        stop=tenacity.stop_after_attempt(attempts),
        reraise=True,
    )
    for attempt in again:
        with attempt:
            return work(attempt.retry_state.attempt_number - 1)
    raise AssertionError("tenacity returns or raises")


def wait_out_outage(
    work: Callable[[], T],
    stop: Stop,
    on_failure: Callable[[BaseException, float], None],
    seconds: float | None = None,
) -> T | None:
    """Run ``work`` until it succeeds, and return its result. Return None if the flag ``stop`` is set first.

    Call ``on_failure(error, pause_seconds)`` before each pause. The pauses are random and grow up to ten seconds.
    Raises SchemaError and SettingError at once. If ``seconds`` is given, raises the last error
    after this many seconds.
    """
    flag = cast("Event", stop)  # tenacity uses only the methods that Stop has
    told_to_stop = tenacity.stop_when_event_set(flag)
    patient = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_worth_waiting_for),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=10),
        sleep=tenacity.sleep_using_event(flag),
        stop=told_to_stop if seconds is None else told_to_stop | tenacity.stop_after_delay(seconds),
        before_sleep=partial(_report_failure, on_failure),
        retry_error_callback=partial(_give_up, stop),
    )
    return patient(work)


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
