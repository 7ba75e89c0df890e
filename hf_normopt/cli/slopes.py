"""Exponents over width and depth: of every parameter, of every role, and as JSON (`results`)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .coordinates import PLACES, Measurement, Reading

TOLERANCE = 0.15  # of an exponent that counts as 0: what three steps on one batch can tell
QUANTITIES = ("initial", "own", "change", "size")


class Run(NamedTuple):
    """A measurement, and of what."""

    width: int
    depth: int
    rate: float
    found: Measurement


@dataclass(frozen=True)
class Slopes:
    """Exponents of a parameter at one rate; None where something is 0, infinite or unseen.

    Attributes:
        name: of the parameter.
        role: what it does in this place.
        initial: of the RMS of its module's outputs before any step.
        own: of the most that one of its steps alone does to these outputs.
        change: of what all steps of all layers do to these outputs.
        size: of the largest of its steps, in the role's norm.
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

    parameters: int
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


def parameter_slopes(found: Mapping[int, Measurement]) -> list[Slopes]:
    """The exponents of every parameter.

    Args:
        found: by width, or by depth; parameters that not all of them have are left out.
    """
    sizes = list(found)
    tables = [_by_name(one.readings) for one in found.values()]
    slopes = []
    for name, first in tables[0].items():
        rows = [table[name] for table in tables if name in table]
        if len(rows) == len(tables):
            slopes.append(
                Slopes(
                    name,
                    first[0].role,
                    exponent(sizes, [row[0].output for row in rows]),
                    exponent(sizes, [_largest(r.own for r in row) for row in rows]),
                    exponent(sizes, [row[-1].change for row in rows]),
                    exponent(sizes, [_largest(r.size for r in row) for row in rows]),
                )
            )
    return slopes


def role_slopes(slopes: Sequence[Slopes], quantity: str) -> dict[str, Spread]:
    """The spread of one quantity's exponents, by role."""
    found = {}
    for role in PLACES:
        members = [(s.name, getattr(s, quantity)) for s in slopes if s.role == role]
        known = [(name, value) for name, value in members if value is not None]
        if known:
            name, worst = max(known, key=lambda pair: abs(pair[1]))
            median = statistics.median(value for _, value in known)
            found[role] = Spread(len(known), median, worst, name)
    return found


def verdict(spread: Spread, sizes: Sequence[int], over: str = "width") -> str:
    """What the exponents of a role say, in words.

    Args:
        spread: of the role.
        sizes: the widths or depths that were compared.
        over: "width" or "depth".
    """
    text = _phrase(spread.median, sizes, over)
    if abs(spread.worst) > TOLERANCE and abs(spread.worst - spread.median) > TOLERANCE:
        text += (
            f"; {spread.worst_name.removesuffix('.weight')} {_phrase(spread.worst, sizes, over)}"
        )
    return text


def results(runs: Sequence[Run]) -> dict[str, Any]:
    """What is found, as plain data: the fields are described in docs/width.md."""
    first, roles, parameters = runs[0], [], []
    for rate in dict.fromkeys(run.rate for run in runs):
        for over in ("width", "depth"):
            other = "depth" if over == "width" else "width"
            series = {
                getattr(run, over): run.found
                for run in runs
                if run.rate == rate and getattr(run, other) == getattr(first, other)
            }
            slopes = parameter_slopes(series) if len(series) > 1 else []
            parameters += [{"over": over, "rate": rate, **asdict(one)} for one in slopes]
            for quantity in QUANTITIES:
                for role, spread in role_slopes(slopes, quantity).items():
                    where = {"over": over, "rate": rate, "quantity": quantity, "role": role}
                    words = verdict(spread, list(series), over)
                    roles.append({**where, **asdict(spread), "verdict": words})
    return {
        "rates": list(dict.fromkeys(run.rate for run in runs)),
        "widths": sorted({run.width for run in runs}),
        "depths": sorted({run.depth for run in runs}),
        "roles": roles,
        "parameters": parameters,
        "runs": [
            {
                "width": run.width,
                "depth": run.depth,
                "rate": run.rate,
                "losses": [_finite(loss) for loss in run.found.losses],
                "readings": [
                    {key: _finite(value) for key, value in asdict(reading).items()}
                    for reading in run.found.readings
                ],
            }
            for run in runs
        ],
    }


def _phrase(slope: float, sizes: Sequence[int], over: str) -> str:
    if abs(slope) <= TOLERANCE:
        return f"does not depend on {over}"
    factor = (max(sizes) / min(sizes)) ** abs(slope)
    verb, than = ("grows", "times") if slope > 0 else ("shrinks", "times less")
    return f"{verb} as {over}^{slope:.1f}: {factor:.2g} {than} from {min(sizes)} to {max(sizes)}"


def _by_name(readings: Sequence[Reading]) -> dict[str, list[Reading]]:
    table: dict[str, list[Reading]] = {}
    for reading in readings:
        table.setdefault(reading.name, []).append(reading)
    return table


def _largest(values: Iterable[float | None]) -> float | None:
    """Of the steps: later ones may be small where the batch is learned, which says nothing."""
    return max((value for value in values if value is not None), default=None)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
