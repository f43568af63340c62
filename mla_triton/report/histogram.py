"""How the errors of a case are spread: rows counted by their share of the budget, on a log axis."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch

DECADES = (-3, 2)
"""From a thousandth of the budget to a hundred times it; what lies beyond has bars of its own."""
PER_DECADE = 8
EDGES = tuple(
    10 ** (DECADES[0] + n / PER_DECADE) for n in range((DECADES[1] - DECADES[0]) * PER_DECADE + 1)
)
AT_BUDGET = -DECADES[0] * PER_DECADE
"""The edge that is 1."""
WIDTH, HEIGHT = 320, 72
MARGIN, BASE = 12, 56
"""Pixels left and right of the axis, and from the top to it."""


def counts(shares: torch.Tensor) -> list[int]:
    """Rows up to the first edge, up to each further one, and beyond the last.

    A row that is exactly at its budget, which is right, counts among those up to it.
    """
    edges = torch.tensor(EDGES, dtype=torch.float64, device=shares.device)
    places = torch.bucketize(shares.flatten().double(), edges)
    return torch.bincount(places, minlength=len(EDGES) + 1).tolist()


def svg(numbers: Sequence[int], title: str) -> str:
    """The counts as an image to stand inside a page; colours come from the page's style."""
    step = (WIDTH - 2 * MARGIN) / len(numbers)
    highest = max([*numbers, 1])

    def bars(kind: str, places: range) -> str:
        path = ""
        for place in places:
            if numbers[place]:
                # A single row among thousands is still to be seen.
                tall = max(1.5, (BASE - 8) * numbers[place] / highest)
                left = MARGIN + place * step
                path += f"M{left:.1f} {BASE}v-{tall:.1f}h{step - 0.6:.1f}v{tall:.1f}z"
        return f'<path class="{kind}" d="{path}"/>' if path else ""

    ticks = ""
    for decade in range(DECADES[0], DECADES[1] + 1):
        # The bar of what is below the first edge comes before it.
        x = MARGIN + ((decade - DECADES[0]) * PER_DECADE + 1) * step
        kind = "budget" if decade == 0 else "tick"
        top = 2 if decade == 0 else BASE
        ticks += f'<path class="{kind}" d="M{x:.1f} {top}V{BASE + 4}"/>'
        ticks += f'<text x="{x:.1f}" y="{BASE + 14}" text-anchor="middle">{10.0**decade:g}</text>'
    within = range(AT_BUDGET + 1)
    beyond = range(AT_BUDGET + 1, len(numbers))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">'
        f"<title>{escape(title)}</title>"
        f'<path class="axis" d="M{MARGIN} {BASE}H{WIDTH - MARGIN}"/>{ticks}'
        f"{bars('within', within)}{bars('beyond', beyond)}</svg>"
    )
