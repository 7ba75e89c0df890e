"""Activations over width, one line for each step, as a picture: `save_curves`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ..cards.files import check_picture
from .coordinates import PLACES
from .slopes import Run

SUFFIXES = (".png", ".svg", ".pdf")
_QUANTITIES = (
    ("output", "RMS of the outputs"),
    ("change", "RMS of their change"),
    ("own", "RMS of the own step's part"),
)


def save_curves(file: str, title: str, runs: Sequence[Run]) -> None:
    """Draw the median of each role over width, at the first rate, one line for each step.

    Raises:
        ValueError, OSError, ImportError: see [`check_picture`].
    """
    check_picture(file, SUFFIXES)
    from matplotlib.figure import Figure

    runs = [run for run in runs if (run.rate, run.depth) == (runs[0].rate, runs[0].depth)]
    present = {reading.role for reading in runs[0].found.readings}
    roles = [role for role in PLACES if role in present]
    steps = max(reading.step for reading in runs[0].found.readings)
    figure = Figure(figsize=(3 * len(roles) + 1, 9), layout="constrained")
    figure.suptitle(f"{title}, rate {runs[0].rate:g}")
    grid = figure.subplots(len(_QUANTITIES), len(roles), squeeze=False)
    for axes_row, (quantity, label) in zip(grid, _QUANTITIES, strict=True):
        for axes, role in zip(axes_row, roles, strict=True):
            _draw(axes, runs, role, quantity, steps)
            axes.set(title=role, xlabel="width", ylabel=label)
    grid[0][0].legend(fontsize="small")
    figure.savefig(file, dpi=110)


def _draw(axes: Any, runs: Sequence[Run], role: str, quantity: str, steps: int) -> None:
    from matplotlib import colormaps

    heights: list[float] = []
    for step in range(steps + 1):
        points = [(run.width, _median(run, role, step, quantity)) for run in runs]
        known = [(width, value) for width, value in points if value]
        if known:
            colour = colormaps["viridis"](step / max(steps, 1) * 0.9)
            widths, values = zip(*known, strict=True)
            axes.plot(widths, values, ".-", color=colour, label=f"{step} steps")
            heights += values
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if heights:  # a decade or more, so that what is flat looks flat
        middle = math.sqrt(min(heights) * max(heights))
        axes.set_ylim(min(0.8 * min(heights), middle / 3), max(1.25 * max(heights), middle * 3))
    axes.grid(alpha=0.3)


def _median(run: Run, role: str, step: int, quantity: str) -> float | None:
    values = [
        value
        for reading in run.found.readings
        if (reading.role, reading.step) == (role, step)
        and (value := getattr(reading, quantity)) is not None
        and 0 < value < math.inf
    ]
    return statistics.median(values) if values else None
