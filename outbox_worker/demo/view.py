"""Prints the demonstration: a live picture if stdout is a terminal, otherwise plain lines."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import fill, wrap
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from outbox_worker import terminal
from outbox_worker.durations import count_of
from outbox_worker.model import Outcome, Reason

WIDTH = 80
"""The maximal length of a plain line in characters."""


@dataclass(frozen=True, slots=True)
class Scene:
    """The state of the demonstration at one moment."""

    seconds: float
    progress: float
    owed: int
    outcomes: Mapping[str, int]
    per_second: float


class View(Protocol):
    """Shows the demonstration."""

    def say(self, seconds: float, sentence: str) -> None: ...

    def show(self, scene: Scene) -> None: ...


@contextmanager
def open_view() -> Iterator[View]:
    """Open the live view if stdout is a terminal, otherwise the plain view."""
    if not sys.stdout.isatty():
        yield PlainView()
        return
    with Live(console=Console(highlight=False), refresh_per_second=8) as live:
        yield LiveView(live)


def print_events(outcomes: Mapping[str, int]) -> None:
    """Print each outcome with its meaning and its number of events."""
    terminal.line(f"\nOutcomes of {count_of(sum(outcomes.values()), 'event')}", "bold")
    terminal.facts(
        [(name, f"{outcomes[name]:>7,}  {meaning}") for name, meaning in _MEANINGS.items() if name in outcomes]
    )
    terminal.line("")


def print_sentence(sentence: str, style: str) -> None:
    """Print the sentence that states the result."""
    terminal.line(sentence if sys.stdout.isatty() else fill(sentence, WIDTH), style)


class PlainView:
    """Prints lines for a pipe or a log."""

    def __init__(self) -> None:
        self._shown = -2.0

    def say(self, seconds: float, sentence: str) -> None:
        for text in wrap(f"{seconds:5.1f} s  {sentence}", WIDTH, subsequent_indent=" " * 9):
            terminal.line(text)

    def show(self, scene: Scene) -> None:
        """Print a summary every two seconds."""
        if scene.seconds - self._shown >= 2:
            self._shown = scene.seconds
            self.say(scene.seconds, _summary(scene))


class LiveView:
    """Draws a picture on a terminal and refreshes it several times per second."""

    LINES = 10

    def __init__(self, live: Live) -> None:
        self._live = live
        self._said: deque[Text] = deque(maxlen=self.LINES)
        self._scene: Scene | None = None

    def say(self, seconds: float, sentence: str) -> None:
        self._said.append(Text.assemble((f"{seconds:5.1f} s  ", "dim"), sentence))
        self._draw()

    def show(self, scene: Scene) -> None:
        self._scene = scene
        self._draw()

    def _draw(self) -> None:
        parts = [_picture(self._scene)] if self._scene else []
        self._live.update(Group(*parts, Text(), *self._said))


def _picture(scene: Scene) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    table.add_row("paid", f"{scene.progress:.0%}", Text("█" * round(scene.progress * 40), style="cyan"))
    table.add_row("owed", f"{scene.owed:,}", "")
    table.add_row("settled / s", f"{scene.per_second:,.0f}", "")
    total = sum(scene.outcomes.values()) or 1
    for outcome in Outcome:
        if count := scene.outcomes.get(outcome, 0):
            table.add_row(outcome, f"{count:,}", Text("█" * max(1, round(count / total * 40)), style=_COLOURS[outcome]))
    return table


_MEANINGS = {
    Outcome.CREATED: "paid: the purchase was made",
    Outcome.RECOVERED: "marked, but without a purchase: made now",
    Outcome.ALREADY_EXISTS: "delivered a second time",
    Outcome.DUPLICATE_PAYMENT: "paid a second time: must be refunded",
    Outcome.SUPPRESSED: "refunded before it was settled: no purchase",
    Outcome.REVOKED: "refunded: taken back, or now paid by another",
    Reason.PAYMENT_MISMATCH: "contradicts its payment: a person decides",
    Reason.INVALID_PAYLOAD: "payload is not an object: a dead letter",
    Reason.UNSUPPORTED_EVENT_TYPE: "unknown event type: a dead letter",
}

_COLOURS = {
    Outcome.CREATED: "green",
    Outcome.RECOVERED: "bright_green",
    Outcome.ALREADY_EXISTS: "blue",
    Outcome.DUPLICATE_PAYMENT: "yellow",
    Outcome.SUPPRESSED: "magenta",
    Outcome.REVOKED: "magenta",
    Outcome.RETRIED: "cyan",
    Outcome.DEAD: "red",
}


def _summary(scene: Scene) -> str:
    outcomes = ", ".join(f"{count:,} {name}" for name, count in scene.outcomes.items() if count)
    return f"{scene.progress:.0%} paid, {scene.owed:,} owed, {scene.per_second:,.0f}/s; {outcomes or 'nothing yet'}"
