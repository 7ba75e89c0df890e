"""What a few steps on one batch do to every module's output: `measure`.

For each parameter, at each step, with x what its module takes and y what it gives:

| quantity | what it is                                                                      |
| -------- | ------------------------------------------------------------------------------- |
| `output` | RMS(y), before the step                                                         |
| `change` | RMS(y - y at the start), before the step: of all steps so far, and all layers   |
| `own`    | RMS of what the step of this parameter alone does to y, over RMS(x) if it is    |
|          | a matrix on activations: RMS(ΔW x) / RMS(x)                                     |
| `size`   | ‖ΔW‖ in the norm of its role                                                    |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..norms.operators import Norm
from ..optim.groups import kind_of
from ..optim.rules import Policy
from ..roles import ROLES, ParamSpec
from ..roles.follow import tensors_of
from ..roles.inputs import candidates
from ..roles.makers import Case
from ..trainer.gauge import singular

Batch = dict[str, Any]
_MATRICES = ("linear", "conv", "head")  # act on activations, whose size counts
# What a parameter does in one place. A table that is the head too is a head where it is that, and
# has a place of its own where it is looked up: no step is right in both.
TIED = "embedding/tied"
PLACES = (*ROLES, TIED)
_TRIES = 20


@dataclass(frozen=True)
class Reading:
    """A parameter at one step; see this module's docstring.

    None where it was not seen. Outputs and their change stand with a module's first parameter.
    """

    name: str
    role: str
    step: int
    output: float | None = None
    change: float | None = None
    own: float | None = None
    size: float | None = None


@dataclass(frozen=True)
class Measurement:
    """The readings of one model, and its loss before every step and after the last."""

    readings: list[Reading]
    losses: list[float]


def example_batch(model: nn.Module, seed: int = 0) -> tuple[Batch, Callable[[], Tensor]]:
    """Inputs that the model takes, with labels if it takes them, and its loss on them.

    Without labels, the loss is the mean square distance of the first output from a random target.

    Raises:
        ValueError: if no inputs are found that `forward` takes.
    """
    generator = torch.Generator().manual_seed(seed)
    failure = "no inputs are known for it"
    for _, inputs in islice(candidates(model, device="cpu"), _TRIES):
        batch = {name: _filled(value, name, model, generator) for name, value in inputs.items()}
        try:
            with torch.no_grad():
                output = model(**batch)
        except Exception as error:  # foreign code raises anything
            failure = f"{type(error).__name__}: {error}"
            continue
        return _with_labels(model, batch, output, generator)
    raise ValueError(f"No inputs were found that {type(model).__name__} takes: {failure}.")


def measure(
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    specs: Sequence[ParamSpec],
    policy: Policy,
    steps: int = 3,
) -> Measurement:
    """Take a few steps and read every parameter.

    Args:
        model: it is trained.
        loss: runs the model on the one batch.
        optimizer: of the model's parameters.
        specs: of `classify`.
        policy: whose norms measure a step.
        steps: how many.
    """
    watch = _Watch(model, specs, policy)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        with watch.hooks():
            value = loss()
        losses.append(value.item())
        value.backward()
        before = {key: param.detach().clone() for key, param in watch.params.items()}
        optimizer.step()
        watch.read(step, before)
    with watch.hooks(), torch.no_grad():
        losses.append(loss().item())
    watch.read(steps, None)
    return Measurement(watch.readings, losses)


@dataclass
class _Use:
    """A parameter in one of its modules."""

    name: str  # of the parameter, in the model
    local: str  # in the module
    module: nn.Module
    spec: ParamSpec
    norm: Norm


class _Watch:
    """Sees what modules take and give, and reads their parameters."""

    def __init__(self, model: nn.Module, specs: Sequence[ParamSpec], policy: Policy) -> None:
        self.readings: list[Reading] = []
        self.params = {id(param): param for param in model.parameters()}
        by_name = dict(model.named_parameters(remove_duplicate=False))
        by_param = {id(by_name[spec.name]): spec for spec in specs}
        self._uses: list[_Use] = []
        for path, module in model.named_modules():
            for local, param in module.named_parameters(recurse=False, remove_duplicate=False):
                if spec := by_param.get(id(param)):
                    norm = policy[kind_of(spec, policy) or spec.role].norm
                    name = f"{path}.{local}".lstrip(".")
                    self._uses.append(_Use(name, local, module, spec, norm))
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}
        self._start: dict[int, Tensor] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """While it lasts, the first call of each module is kept."""
        self._calls = {}
        modules = {id(use.module): use.module for use in self._uses}.values()
        handles = [m.register_forward_hook(self._keep, with_kwargs=True) for m in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        outputs = [t for t in tensors_of(output) if t.is_floating_point()]
        if id(module) not in self._calls and outputs:
            given = tuple(map(_copied, args)), {key: _copied(v) for key, v in kwargs.items()}
            self._calls[id(module)] = (*given, outputs[0].detach().clone())

    @torch.no_grad()
    def read(self, step: int, before: Mapping[int, Tensor] | None) -> None:
        """Read all parameters; `before` is what they were before the step, None if none follows."""
        sizes: dict[int, float] = {}
        read: set[int] = set()  # modules whose outputs are, with their first parameter
        for use in self._uses:
            call = self._calls.get(id(use.module))
            output = change = own = size = None
            role = use.spec.role
            if call is not None:
                args, kwargs, y = call
                start = self._start.setdefault(id(use.module), y)
                if id(use.module) not in read:
                    output = rms(y)
                    change = rms(y - start) if y.shape == start.shape else None
                read.add(id(use.module))
                x = next((t for t in tensors_of((args, kwargs)) if t.is_floating_point()), None)
                if use.spec.also_head or (use.spec.tied_to and role == "head"):
                    role = TIED if x is None else "head"
                if before is not None:
                    matrix = role in _MATRICES and x is not None
                    own = self._own(use, before) / (rms(x) if matrix and x is not None else 1.0)
            param = getattr(use.module, use.local)
            if before is not None:
                key = id(param)
                if key not in sizes:
                    sizes[key] = step_size(use.norm, use.spec, param - before[key])
                size = sizes[key]
            self.readings.append(Reading(use.name, role, step, output, change, own, size))

    def _own(self, use: _Use, before: Mapping[int, Tensor]) -> float:
        """RMS of what the step of one parameter does to the output of its module."""
        args, kwargs, _ = self._calls[id(use.module)]
        param = getattr(use.module, use.local)
        outputs = []
        for value in (before[id(param)], param.detach()):
            output = functional_call(use.module, {use.local: value}, args, kwargs)
            outputs.append(next(t for t in tensors_of(output) if t.is_floating_point()))
        return rms(outputs[1] - outputs[0])


def rms(x: Tensor) -> float:
    """Root mean square of the entries."""
    return float(torch.linalg.vector_norm(x.detach())) / math.sqrt(max(x.numel(), 1))


def step_size(norm: Norm, spec: ParamSpec, change: Tensor) -> float:
    """‖ΔW‖ in the role's norm: the weighted max over its operators."""
    spectral = type(norm).__name__ == "Spectral"
    sizes = []
    for operator in spec.layout.to_operators(change):
        if spectral:
            sizes.append(singular(operator).amax(-1).max() * norm.unit(*operator.shape[-2:]))
        else:
            sizes.append(norm.norm(operator).max())
    return float(torch.stack(sizes).max()) * norm.weight(spec.layout.taps)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _filled(value: Any, name: str, model: nn.Module, generator: torch.Generator) -> Any:
    """Random numbers in floating tensors, random tokens in the place of the usual ones."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator)
    if not name.endswith("input_ids"):
        return value
    config = getattr(model, "config", None)
    special = _special_tokens(config)
    size = int(getattr(config, "vocab_size", None) or int(value.max()) + 1)
    usual = [token for token in range(size) if token not in special] or [0]
    drawn = torch.tensor(usual)[torch.randint(len(usual), value.shape, generator=generator)]
    fixed = torch.tensor([int(v) in special for v in value.flatten()]).view(value.shape)
    return torch.where(fixed, value, drawn)


def _special_tokens(config: Any) -> set[int]:
    found: set[int] = set()
    for name, value in config.to_dict().items() if hasattr(config, "to_dict") else ():
        if name.endswith(("token_id", "token_index")):
            found |= {n for n in (value if isinstance(value, list) else [value]) if n is not None}
    return found


def _with_labels(
    model: nn.Module, batch: Batch, output: Any, generator: torch.Generator
) -> tuple[Batch, Callable[[], Tensor]]:
    outputs = [t for t in tensors_of(output) if t.is_floating_point()]
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and Case(model, "cpu").has("labels"):
        for labels in _labels(logits, generator):
            with_labels = {**batch, "labels": labels}
            try:
                with torch.no_grad():
                    value = model(**with_labels).loss
            except Exception:  # other labels may fit
                continue
            if value is not None and math.isfinite(value):
                return with_labels, partial(_loss, model, with_labels)
    if not outputs:
        raise ValueError(f"{type(model).__name__} gives no floating output for a loss.")
    target = torch.randn(outputs[0].shape, generator=generator)

    def distance() -> Tensor:
        first = next(t for t in tensors_of(model(**batch)) if t.is_floating_point())
        return (first - target).square().mean()

    return batch, distance


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def _labels(logits: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Labels that may fit: a class for each place or row, or a few for each row (CTC)."""
    *places, classes = logits.shape
    if len(places) == 1:  # not one row of each of two: their parts of the gradient would cancel
        yield torch.arange(places[0]) % classes if classes > 2 else torch.ones(*places).long()
    for shape in (places, [places[0], 4]):
        yield torch.randint(min(1, classes - 1), classes, shape, generator=generator)
