"""What `forward` does with every parameter, seen in one pass without arithmetic.

    seen = observe(model, inputs)
    seen.uses["layer.weight"]      # {"product": Layout("out in")}
    seen.matrices["layer.weight"]  # how the module divides what it gives
    seen.fields                    # which matrices made each output last

A twin of the model (`twin.py`) runs under a dispatch mode (`watch.py`).
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import re
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from torch import nn

from .fields import are_asked
from .follow import note_of, tensors_of
from .inputs import Inputs, candidates, normalise, with_fields, with_labels, with_places
from .repairs import approached, axes_of, described, repaired
from .seen import Seen
from .twin import Twin, structure, undisturbed, unwrapped
from .watch import EndlessError, Lists, Watch

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_ALONE = 60  # kinds of modules that run alone
_TRIES = 16  # inputs of such a module
_GUESSES = 12  # of these before those that were refused are changed
_FARTHEST = 6  # refused inputs that are changed
_CHANGES = 6  # that are tried in turn
_TURNS = 20
_FARTHER = 1  # turns later come changes that led no farther
_ALIKE = 2  # inputs that were refused for one reason, before others that were for the same
# Operations after which neither the model nor, counted anew, what it did not reach is tried on
# other inputs. Of those that a config tells there are few, and one of them is right.
_MOST, _MOST_OF_CONFIG = 3000, 15_000


def observe(model: nn.Module, inputs: Any = None) -> Seen:
    """Run a twin of the model once and tell what was seen.

    Modules that `forward` did not reach run alone, on activations of their own width.

    Args:
        model: any module; it is only read.
        inputs: what `forward` takes, see [`inputs.normalise`]; made from its signature if None.
    """
    asked = [] if inputs is None else [normalise(inputs)]
    given = itertools.chain(asked, candidates(model))
    with undisturbed(model) as twin:
        seen = _best(twin, twin.module, "", given)
        seen.alike = twin.alike
        seen.copy_to_equals()
        _train_inplace(seen, twin)
        seen.ran = set(seen.uses)
        twin.spent = 0
        _observe_rest_inplace(seen, twin, unwrapped(model))
        seen.copy_to_siblings(twin.shapes)
    return seen


def _best(twin: Twin, module: nn.Module, path: str, given: Iterable[Any], tries: int = 60) -> Seen:
    """What was seen on the first inputs that a module takes, or on those that led farthest.

    If it takes none of those that are given, they are changed as its errors ask.
    """
    attempts = _Attempts(twin, module, path)
    guesses = itertools.islice(_as_far_as_they_go(given), tries)
    for inputs in itertools.islice(guesses, 1):
        if attempts.run(inputs):
            return attempts.best
    if are_asked(attempts.best.failure) and not hasattr(module, "config"):
        guesses = itertools.islice(_as_far_as_they_go(with_fields(module)), tries)
    while few := list(itertools.islice(guesses, _GUESSES)):
        if any(attempts.run(inputs) for inputs in few):
            return attempts.best
        if not hasattr(module, "config") and attempts.repair(_GUESSES):
            return attempts.best
    if not hasattr(module, "config"):
        attempts.repair(tries)
    return attempts.best


class _Attempts:
    """Runs of a module on several inputs, and what was seen on those that led farthest."""

    def __init__(self, twin: Twin, module: nn.Module, path: str) -> None:
        self.twin, self.module, self.path = twin, module, path
        self.best = Seen(failure="no inputs are known for it")
        self.tried: set[str] = set()
        self.errors: Counter[str] = Counter()
        self.number = itertools.count()  # of the runs, where two led equally far
        self.refused: list[_Refused] = []

    def run(self, inputs: Inputs, before: _Refused | None = None) -> bool:
        """Run on some inputs; whether no others need to be tried.

        Args:
            inputs: positional and keyword arguments.
            before: the refused ones of which these are a change.
        """
        args, kwargs = inputs
        for _ in range(5):
            known = described((args, kwargs))
            seen = _run(self.twin, self.module, self.path, args, kwargs)
            if described((args, kwargs)) != known:
                continue  # once more with the fields that were asked for
            if not seen.failure:
                self.best = seen
                return True
            if len(seen.uses) > len(self.best.uses) or not self.best.uses:
                self.best = seen
            if seen.failure.startswith((EndlessError.__name__, RecursionError.__name__)):
                return True  # other inputs would take as long
            mended = with_places(self.module, kwargs, seen.failure)
            if mended is None:
                break
            kwargs = mended
        if self.twin.spent > (_MOST_OF_CONFIG if hasattr(self.module, "config") else _MOST):
            return True
        self.tried.add(described((args, kwargs)))
        heapq.heappush(self.refused, self.refusal((args, kwargs), seen, before))
        return False

    def refusal(self, inputs: Inputs, seen: Seen, before: _Refused | None) -> _Refused:
        """When to change refused inputs: soon, if they led farther than what they changed."""
        error = re.sub(r"\d+", "", seen.failure)
        self.errors[error] += 1
        # an axis too many adds an operation or two, by which it does not lead farther
        cost = 2 * axes_of(inputs, seen.failure) - seen.operations
        reached = (len(seen.uses), seen.operations)
        turn = 0 if before is None else before.turn + (0 if reached > before.reached else _FARTHER)
        order = (-len(seen.uses), self.errors[error] // _ALIKE, cost, next(self.number))
        changes = repaired(inputs, seen.failure)
        if before is not None and error == re.sub(r"\d+", "", before.failure):
            near = approached(before.inputs, inputs, before.failure, seen.failure)
            changes = itertools.chain(near, changes)
        return _Refused(turn, order, reached, inputs, seen.failure, changes)

    def repair(self, tries: int) -> bool:
        """Change what led farthest as the error asks; whether no others need to be tried.

        A few changes of each are tried before more of any.
        """
        self.refused = heapq.nsmallest(_FARTHEST, self.refused, key=attrgetter("order"))
        heapq.heapify(self.refused)
        while self.refused and tries:
            refused = heapq.heappop(self.refused)
            for inputs in itertools.islice(refused.changes, _CHANGES):
                if tries and described(inputs) not in self.tried:
                    tries -= 1
                    if self.run(inputs, refused):
                        return True
            if refused.turn < _TURNS:
                heapq.heappush(self.refused, replace(refused, turn=refused.turn + 1))
        return False


@dataclass(frozen=True, order=True)
class _Refused:
    """Inputs that were refused.

    Attributes:
        turn: when they are changed next.
        order: which of those of one turn come first.
        reached: the parameters and operations that they led to.
        inputs: themselves.
        failure: the error.
        changes: of them.
    """

    turn: int
    order: tuple[int, ...]
    reached: tuple[int, int] = field(compare=False)
    inputs: Inputs = field(compare=False)
    failure: str = field(compare=False)
    changes: Iterator[Inputs] = field(compare=False)


def _as_far_as_they_go(given: Iterable[Any]) -> Iterator[Any]:
    """Inputs, up to the first that cannot be made: configs hold anything."""
    with contextlib.suppress(Exception):
        yield from given


def _run(
    twin: Twin, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Seen:
    watch = Watch(twin)
    try:
        with watch.hooks(), watch, Lists():
            watch.given((args, kwargs))
            output = module(*args, **kwargs)
        watch.returned(path, output)
        for tensor in tensors_of(output):
            watch.use(note_of(tensor))
    except Exception as error:  # foreign code raises anything
        watch.seen.failure = f"{type(error).__name__}: {error} ({_place(error)})"
        watch.ended()
    watch.finish()
    watch.seen.operations, watch.seen.inputs = watch.operations, (args, kwargs)
    twin.spent += watch.operations
    return watch.seen


def _train_inplace(seen: Seen, twin: Twin) -> None:
    """Run once more in training mode, if not all was reached: noise, and what takes labels.

    Models with a config have labels for that, and run but once.
    """
    names = {twin.names.get(id(parameter)) for parameter in twin.module.parameters()}
    if seen.failure or names <= seen.uses.keys() or hasattr(twin.module, "config"):
        return
    modules = list(twin.module.modules())
    for module in modules:
        module.training = True
    trained = (_run(twin, twin.module, "", *i) for i in with_labels(twin.module, seen.inputs))
    ended = next((run for run in trained if not run.failure), None)
    for module in modules:
        module.training = False
    if ended is not None:
        seen.update(ended)
        seen.also_returned(ended)


def _observe_rest_inplace(seen: Seen, twin: Twin, model: nn.Module) -> None:
    """Run alone what was not reached; of equal modules the first."""
    known: dict[Any, str] = {}
    todo = [("", model)]
    while todo and len(known) < _ALONE:
        path, module = todo.pop(0)
        names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
        missing = [name for name in names if name not in seen.uses or name in seen.partly]
        if not missing or not is_worth_running(module):
            continue
        if path and len(missing) == len(names) and not isinstance(module, _CONTAINERS):
            kind = structure(module)
            if kind in known:
                first = known[kind]
                for name in names:
                    seen.alike[name] = first + name.removeprefix(path)
                continue
            copy = twin.copies.get(id(module))
            if copy is not None:
                known[kind] = path
                alone = _best(twin, copy, path, candidates(module), _TRIES)
                seen.update(alone)
                if not alone.failure:
                    continue
        todo[:0] = [
            (f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()
        ]
    seen.copy_to_equals()


def is_worth_running(module: nn.Module) -> bool:
    """Whether what a module does is told by more than the class of torch that it is of."""
    return any(
        not type(part).__module__.startswith("torch.") and next(part.parameters(), None) is not None
        for part in module.modules()
    )


def _place(error: Exception) -> str:
    """The last line of code that is not this package's or torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "hf_normopt" not in f.filename]
    frame = (own or frames)[-1]
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
