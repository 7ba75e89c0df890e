"""Which runs are missing: functions of what is known, without memory.

Rates are powers of the square root of 2. A contender begins with three rates a factor of 2 apart
and goes on while its best rate is at an edge; then come the rates on both sides of the best, a
factor of the square root of 2 away. Contenders that needed fewer rates get as many as the one that
needed most. Each one's best rate is then run on fresh seeds, the same for all: same initial
weights, same batches.
"""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import fmean


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        task: its name.
        contender: an optimizer and its options, `name:key=value,key=value`.
        place: of the rate: it is 2^(place / 2).
        seed: of weights and data.
        share: of the task's steps, each a finished schedule.
    """

    task: str
    contender: str
    place: int
    seed: int
    share: float = 1.0

    @property
    def rate(self):
        """The learning rate."""
        return rate_at(self.place)

    def key(self):
        """What identifies it in the file of results."""
        return tuple(asdict(self).values())


@dataclass
class Plan:
    """A comparison on one task.

    Args:
        task: its name.
        contenders: the first is the reference. Each with the rate it begins around.
        tune: seeds for the choice of the rate.
        fresh: seeds for the report.
        shares: of the steps, at which contenders run on the fresh seeds to see when they reach the
            reference's final loss.
        fine: whether to try rates a factor of the square root of 2 from the best.
        most: rates for each contender, at most.
        margin: relative to the reference's value: means that differ by less are equal.
        sign: -1 where more is better.
    """

    task: str
    contenders: dict[str, float]
    tune: tuple[int, ...] = (0, 1)
    fresh: tuple[int, ...] = (10, 11, 12)
    shares: tuple[float, ...] = ()
    fine: bool = True
    most: int = 12
    margin: float = 0.01
    sign: float = 1.0


def rate_at(place):
    """The rate at a place of the grid."""
    return float(f"{2 ** (place / 2):.4g}")


def place_of(rate):
    """The place of the grid that is nearest to a rate; one whose neighbours are × 2."""
    return 2 * round(math.log2(rate))


def tuned(plan, results, contender):
    """The mean over the tuning seeds for each rate that has all of them, less is better.

    Args:
        plan: the comparison.
        results: the value of each run by its key.
        contender: whose.
    """
    found = defaultdict(list)
    for place in {key[2] for key in results if key[1] == contender}:
        values = [results.get(Run(plan.task, contender, place, s).key()) for s in plan.tune]
        if None not in values:
            found[place] = plan.sign * fmean(values)
    return dict(sorted(found.items()))


def best_place(values):
    """The place with the least value; of equal ones, as where all diverged, the lowest."""
    return min(values, key=lambda place: (values[place], place))


def next_places(values, start, fine=True, most=12):
    """The places that a contender wants to know next; none when its best is settled.

    Args:
        values: known, by place.
        start: the place to begin around.
        fine: whether a factor of the square root of 2 is tried.
        most: places in all.
    """
    missing = [p for p in (start - 2, start, start + 2) if p not in values]
    if missing or len(values) >= most:
        return missing[: most - len(values)]
    best, coarse = best_place(values), [p for p in values if (p - start) % 2 == 0]
    if best <= min(coarse):
        return [min(coarse) - 2]
    if best >= max(coarse):
        return [max(coarse) + 2]
    return [p for p in (best - 1, best + 1) if fine and p not in values]


def more_places(values, number):
    """As many more places, nearest to the best first, then outwards."""
    best = best_place(values)
    candidates = sorted(range(best - 40, best + 41), key=lambda p: (abs(p - best), p))
    return [p for p in candidates if p not in values][:number]


def missing(plan, results):
    """The runs that can be made now; an empty list at the end.

    Args:
        plan: the comparison.
        results: the value of each run by its key; infinite where it diverged.
    """
    known = {name: tuned(plan, results, name) for name in plan.contenders}
    wanted = {
        name: next_places(known[name], place_of(rate), plan.fine, plan.most)
        for name, rate in plan.contenders.items()
    }
    if not any(wanted.values()):
        number = max(map(len, known.values()))
        wanted = {name: more_places(v, number - len(v)) for name, v in known.items()}
    runs = [
        Run(plan.task, name, place, seed)
        for name, places in wanted.items()
        for place in places
        for seed in plan.tune
    ]
    if not runs:
        runs = [
            Run(plan.task, name, best_place(known[name]), seed, share)
            for share in (1.0, *plan.shares)
            for seed in plan.fresh
            for name in plan.contenders
        ]
    return [run for run in runs if run.key() not in results]
