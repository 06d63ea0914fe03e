"""Draws a chart of rates as an SVG file. Each contestant has one bar. The fastest is first."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 720, 26, 12, 150, 120, 34
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.peer{fill:#9aa5b1}.ours{fill:#2a6f97}"
    "@media (prefers-color-scheme:dark){text{fill:#ddd}.peer{fill:#5c6670}.ours{fill:#61a5c2}}"
)


def draw(rates: Mapping[str, float], path: Path, *, events: int, rounds: int) -> None:
    """Write the chart of events per second to ``path``."""
    ordered = sorted(rates.items(), key=lambda each: -each[1])
    height = TOP + len(ordered) * (BAR + GAP) + 10
    scale = (WIDTH - LEFT - RIGHT) / ordered[0][1]
    title = f"Events settled per second ({events:,} events, one process, median of {rounds} rounds)"
    rows = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
        f"<style>{_STYLE}</style>",
        f'<text x="0" y="16">{title}</text>',
    ]
    for row, (name, rate) in enumerate(ordered):
        top = TOP + row * (BAR + GAP)
        middle, long = top + BAR / 2 + 5, max(2.0, rate * scale)
        kind = "ours" if name == "outbox-worker" else "peer"
        rows += [
            f'<text x="{LEFT - 8}" y="{middle:.0f}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{long:.1f}" height="{BAR}" rx="3"/>',
            f'<text x="{LEFT + long + 8:.1f}" y="{middle:.0f}">{rate:,.0f}</text>',
        ]
    path.write_text("\n".join([*rows, "</svg>", ""]), encoding="utf-8")
