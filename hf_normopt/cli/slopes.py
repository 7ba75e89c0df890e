"""Exponents over width and what they say, in words: `parameter_slopes`, `role_slopes`, `verdict`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..roles import ROLES
from .coordinates import Measurement, Reading

TOLERANCE = 0.15  # of an exponent that counts as 0: what three steps on one batch can tell
QUANTITIES = ("initial", "own", "change", "size")


@dataclass(frozen=True)
class Slopes:
    """Exponents of a parameter at one rate; None where something is 0, infinite or unseen.

    Attributes:
        name: of the parameter.
        role: what it does in this place.
        initial: of the RMS of its module's outputs before any step.
        own: of what its steps alone do to these outputs.
        change: of what all steps of all layers do to these outputs.
        size: of the size of its steps in the role's norm.
    """

    name: str
    role: str
    initial: float | None
    own: float | None
    change: float | None
    size: float | None


@dataclass(frozen=True)
class Spread:
    """Exponents of several parameters: the median, and the one farthest from 0."""

    count: int
    median: float
    worst: float
    worst_name: str


def exponent(sizes: Sequence[int], values: Sequence[float | None]) -> float | None:
    """The slope of log values over log sizes, by least squares."""
    if len(sizes) < 2 or any(v is None or not 0 < v < math.inf for v in values):
        return None
    xs = [math.log(size) for size in sizes]
    ys = [math.log(value) for value in values if value is not None]
    return statistics.linear_regression(xs, ys).slope


def parameter_slopes(runs: Mapping[int, Measurement]) -> list[Slopes]:
    """The exponents of every parameter.

    Args:
        runs: by width, or by depth; parameters that not all of them have are left out.
    """
    sizes = list(runs)
    tables = [_by_name(run.readings) for run in runs.values()]
    found = []
    for name, first in tables[0].items():
        if not all(name in table for table in tables):
            continue
        rows = [table[name] for table in tables]
        found.append(
            Slopes(
                name,
                first[0].role,
                exponent(sizes, [row[0].output for row in rows]),
                exponent(sizes, [_mean([r.own for r in row[:-1]]) for row in rows]),
                exponent(sizes, [row[-1].change for row in rows]),
                exponent(sizes, [_mean([r.size for r in row[:-1]]) for row in rows]),
            )
        )
    return found


def role_slopes(slopes: Sequence[Slopes], quantity: str) -> dict[str, Spread]:
    """The spread of one quantity's exponents, by role."""
    found = {}
    for role in ROLES:
        members = [(s.name, getattr(s, quantity)) for s in slopes if s.role == role]
        known = [(name, value) for name, value in members if value is not None]
        if known:
            name, worst = max(known, key=lambda pair: abs(pair[1]))
            median = statistics.median(value for _, value in known)
            found[role] = Spread(len(known), median, worst, name)
    return found


def verdict(spread: Spread, sizes: Sequence[int], what: str = "width") -> str:
    """What the exponents of a role say, in words.

    Args:
        spread: of the role.
        sizes: that were compared.
        what: "width" or "depth".
    """
    text = phrase(spread.median, sizes, what)
    if abs(spread.worst) > TOLERANCE and abs(spread.worst - spread.median) > TOLERANCE:
        text += f"; {spread.worst_name} {phrase(spread.worst, sizes, what)}"
    return text


def phrase(slope: float, sizes: Sequence[int], what: str = "width") -> str:
    """An exponent in words."""
    if abs(slope) <= TOLERANCE:
        return f"does not depend on {what}"
    factor = (max(sizes) / min(sizes)) ** abs(slope)
    verb, size = ("grows", "as large") if slope > 0 else ("shrinks", "as small")
    return f"{verb} as {what}^{slope:.1f}: {factor:.2g} times {size} at {max(sizes)} as at {min(sizes)}"


def _by_name(readings: Sequence[Reading]) -> dict[str, list[Reading]]:
    table: dict[str, list[Reading]] = {}
    for reading in readings:
        table.setdefault(reading.name, []).append(reading)
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    """The geometric mean of what is not 0."""
    logs = [math.log(value) for value in values if value is not None and 0 < value < math.inf]
    return math.exp(statistics.fmean(logs)) if logs else None
