"""Loading a checkpoint by parameter names, with checks.

torch matches states by position and does not check: two layers that changed places would swap their
momenta.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..roles.graph import canonical_name

logger = logging.getLogger(__name__)

# What identifies a group; a checkpoint may change all else (lr, weight_decay, ...) but for OWN.
IDENTITY = ("param_names", "param_shapes", "role", "kind", "rule", "layouts")
ON_MISMATCH = ("error", "reset")
OWN = ("schedule", "multiplier", "own", "label", "momentum_dtype", "rounding", "scales")

_CHUNK = 2**18  # entries that a checksum adds at a time

Group = Mapping[str, Any]
State = Mapping[int, Mapping[str, Any]]


class _Entry(NamedTuple):
    """A parameter of a checkpoint or of an optimizer."""

    number: int  # its key in the state
    group: Group
    shape: tuple[int, ...]
    layout: str
    state_text: str  # from `described`; "" if it was not saved

    def fits(self, other: _Entry) -> bool:
        """Whether the state of one can go on as the state of the other."""
        return (self.shape, self.rule, self.layout) == (other.shape, other.rule, other.layout)

    @property
    def rule(self) -> tuple[str, str]:
        return self.group["rule"], self.group["role"]


def matched(
    state_dict: Mapping[str, Any], groups: Sequence[Group], on_mismatch: str, per_role: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """A state dict in the order of an optimizer's groups and with their identity.

    Args:
        state_dict: from a checkpoint.
        groups: of the optimizer that will load it.
        on_mismatch: "error", or "reset": what does not fit is left out, with a warning.
        per_role: whether each group has a step size of its own; else the first group has the one of
            all.

    Returns:
        The state dict, and a complaint for each thing that does not fit.

    Raises:
        ValueError: if the checkpoint is another optimizer's or damaged, or if parameters are
            missing, added, of another shape or under another rule, unless `on_mismatch="reset"`.
    """
    _refuse_others(state_dict)
    states, saved_groups = state_dict["state"], state_dict["param_groups"]
    own = dict(_entries(groups, range(sum(len(group["param_names"]) for group in groups))))
    saved, complaints = _compared(saved_groups, own)
    fitting = {name: saved[name] for name in own if name in saved and saved[name].fits(own[name])}
    damaged = _damaged(fitting, states)
    if damaged:
        name = next(iter(damaged))
        complaints.append(
            f"the state of {some(damaged.keys())} is not what was saved. {name} has "
            f"[{damaged[name]}]; it was saved with [{fitting[name].state_text}]"
        )
    memory: dict[str, Any] = _first(saved_groups, "memory") or {}
    keeps_memory = bool(fitting) and all(map(_is_finite, memory.values()))
    if memory and (complaints or not keeps_memory):
        complaints.append(_memory_complaint(memory, keeps_memory))
    _report(complaints, on_mismatch)

    state = {
        own[name].number: states[entry.number]
        for name, entry in fitting.items()
        if entry.number in states and name not in damaged
    }
    made = [_continued(group, fitting, own) for group in groups]
    for i, group in enumerate(made):
        if not per_role:  # the group that had it may be another now, or frozen
            group["memory"] = memory if keeps_memory and i == 0 else {}
        group["resets"] = [] if i else _first(saved_groups, "resets") or []
        group["guard"] = {} if i else _first(saved_groups, "guard") or {}
    return {**state_dict, "state": state, "param_groups": made}, complaints


def _refuse_others(state_dict: Mapping[str, Any]) -> None:
    """Complain of what is no optimizer's state."""
    absent = [key for key in ("state", "param_groups") if key not in state_dict]
    if absent:
        keys = ", ".join(map(str, state_dict)) or "nothing"
        raise ValueError(
            f"This is no state of an optimizer: it has {keys}, and not {' and '.join(absent)}."
        )


def _memory_complaint(memory: Mapping[str, Any], goes_on: bool) -> str:
    """What becomes of a saved step size beside parameters of which some start anew."""
    values = ", ".join(f"{key} {float(value):.3g}" for key, value in memory.items())
    what = "eta goes on, all else" if goes_on else "it"
    return f"its step size was at {values}: {what} starts anew"


def _compared(
    saved_groups: Sequence[Group], own: Mapping[str, _Entry]
) -> tuple[dict[str, _Entry], list[str]]:
    """The parameters of a checkpoint, and how they differ from those of the optimizer."""
    foreign = [group for group in saved_groups if not all(key in group for key in IDENTITY)]
    if foreign:
        complaint = (
            f"it was not written by NormOpt. Its groups have {', '.join(sorted(foreign[0]))}; "
            f"expected {', '.join(IDENTITY)} among them"
        )
        return {}, [complaint]
    numbers = [number for group in saved_groups for number in group["params"]]
    saved = dict(_entries(saved_groups, numbers))
    return saved, list(_differences(saved, own))


def _report(complaints: Iterable[str], on_mismatch: str) -> None:
    """Warn of each complaint, or raise the first unless `on_mismatch="reset"`."""
    for complaint in complaints:
        if on_mismatch != "reset":
            raise ValueError(
                f"The optimizer's checkpoint does not fit: {complaint}. Resume with the model, "
                "preset, options and overrides that wrote it; or continue with "
                'on_mismatch="reset" (optim_args, NormOptArguments, create_normopt_optimizer), '
                "which starts what does not fit without state; or start anew from the model's "
                "weights."
            )
        logger.warning(
            "The optimizer's checkpoint does not fit: %s. What does not fit starts without state "
            '(on_mismatch="reset").',
            complaint,
        )


def _continued(
    group: Group, fitting: Mapping[str, _Entry], own: Mapping[str, _Entry]
) -> dict[str, Any]:
    """A group of the optimizer with the options of the checkpoint."""
    names = [canonical_name(name) for name in group["param_names"]]
    options = next((fitting[name].group for name in names if name in fitting), group)
    kept = {key: group[key] for key in (*IDENTITY, *OWN)} | _choice(group, names, fitting)
    if "weight_decay" in group["own"]:  # the user asked for it, as for the multiplier
        kept["weight_decay"] = group["weight_decay"]
    return {**group, **options, **kept, "params": [own[name].number for name in names]}


def _choice(group: Group, names: Sequence[str], fitting: Mapping[str, _Entry]) -> dict[str, Any]:
    """What the situation chose for a group: its checkpoint's choice, if that had one for all.

    The model may have been loaded from the checkpoint, and nothing in it seems to be new then.
    """
    if "factor" not in group:
        return {}
    groups = [fitting[name].group for name in names if name in fitting]
    saved = {(one.get("factor", 1.0), one.get("smoothing")) for one in groups}
    own = group["factor"], group.get("smoothing")
    factor, smoothing = saved.pop() if len(saved) == 1 else own
    multiplier = group["multiplier"] / group["factor"] * factor
    return {"factor": factor, "smoothing": smoothing, "multiplier": multiplier}


def _damaged(fitting: Mapping[str, _Entry], states: State) -> dict[str, str]:
    """Descriptions of the states that are not what was saved, by parameter name."""
    texts = described({entry.number: states.get(entry.number, {}) for entry in fitting.values()})
    return {
        name: texts[entry.number]
        for name, entry in fitting.items()
        if entry.state_text and not _is_same(entry.state_text, texts[entry.number])
    }


def _first(groups: Iterable[Group], key: str) -> Any:
    """The first value under a key that is not empty."""
    return next((group[key] for group in groups if group.get(key)), None)


def _is_finite(value: Tensor | float) -> bool:
    return math.isfinite(float(value))


def described(state: State) -> dict[int, str]:
    """For every parameter, its state's keys, types, shapes and checksums.

    Shards (`DTensor`) have no checksum, since another number of ranks may read them.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    places: dict[tuple[int, str], tuple[torch.device, int]] = {}
    for number, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and not isinstance(value, DTensor) and not value.is_meta:
                of_device = sums.setdefault(value.device, [])
                places[number, key] = value.device, len(of_device)
                of_device.append(_checksum(value))
    known = {device: torch.stack(stacked).tolist() for device, stacked in sums.items()}  # one sync
    texts = {}
    for number, values in state.items():
        words = []
        for key, value in sorted(values.items()):
            is_tensor = isinstance(value, Tensor)
            kind = f"{value.dtype} {tuple(value.shape)}" if is_tensor else type(value).__name__
            words.append(f"{key}: {kind}".replace("torch.", ""))
            if (number, key) in places:
                device, i = places[number, key]
                words[-1] += f" #{known[device][i] % 2**64:x}"
        texts[number] = "; ".join(words) or "no state"
    return texts


def _checksum(value: Tensor) -> Tensor:
    """The sum over the bits of all entries, the i-th times 2 i + 1, modulo 2^64.

    A sum of integers is the same on every device and in every order of addition. It detects any
    swap of two entries and nearly every other change.
    """
    kept: Any = value
    if hasattr(kept, "block_size"):  # torchao's 8 bits
        return _checksum(kept.codes) + 3 * _checksum(kept.scale)
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    for i, chunk in enumerate(value.detach().reshape(-1).view(size).split(_CHUNK)):
        first = 2 * i * _CHUNK + 1
        end = first + 2 * len(chunk)
        weights = torch.arange(first, end, 2, dtype=torch.int64, device=value.device)
        total += weights.mul_(chunk).sum()
    return total


def _is_same(saved: str, loaded: str) -> bool:
    """Whether two descriptions agree; checksums count only where both have one."""
    pairs = list(zip(saved.split("; "), loaded.split("; "), strict=False))
    return saved.count("; ") == loaded.count("; ") and all(
        a == b or (a.partition(" #")[0] == b.partition(" #")[0] and ("#" not in a or "#" not in b))
        for a, b in pairs
    )


def _entries(groups: Sequence[Group], numbers: Sequence[int]) -> Iterator[tuple[str, _Entry]]:
    """The parameters of groups by name."""
    remaining = iter(numbers)
    for group in groups:
        texts = group.get("state_texts", {})
        described = (group[key] for key in ("param_names", "param_shapes", "layouts"))
        for name, shape, layout in zip(*described, strict=True):
            entry = _Entry(next(remaining), group, tuple(shape), layout, texts.get(name, ""))
            yield canonical_name(name), entry


def _differences(saved: Mapping[str, _Entry], own: Mapping[str, _Entry]) -> Iterator[str]:
    """Every reason why a parameter would get a state that is not its own."""
    if saved.keys() != own.keys():
        yield (
            f"its parameters are not this model's. Only in the checkpoint: "
            f"{some(saved.keys() - own.keys())}. Only in the model: "
            f"{some(own.keys() - saved.keys())}"
        )
    both = [name for name in own if name in saved]
    reshaped = [name for name in both if saved[name].shape != own[name].shape]
    if reshaped:
        name = reshaped[0]
        yield (
            f"{some(set(reshaped))} changed shape. {name} has the shape {saved[name].shape} in the "
            f"checkpoint and {own[name].shape} in the model"
        )
    ruled = [name for name in both if saved[name].rule != own[name].rule]
    if ruled:
        name = ruled[0]
        (before, role), (now, new_role) = saved[name].rule, own[name].rule
        yield (
            f"the rules of {some(set(ruled))} are others. {name} was trained under the rule "
            f"[{before}] ({role}) and would go on under [{now}] ({new_role})"
        )
    same_shape = [name for name in both if name not in reshaped]
    if read := [name for name in same_shape if saved[name].layout != own[name].layout]:
        name = read[0]
        yield (
            f"{some(set(read))} would be read as other operators. {name} was trained as "
            f"[{saved[name].layout}] and would go on as [{own[name].layout}]; the option heads "
            "divides attention heads"
        )


def some(names: Set[str]) -> str:
    """Up to five names, for an error message."""
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "none"
