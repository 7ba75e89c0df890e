"""The state of a checkpoint, matched by name with the groups that are to go on with it.

torch matches by position and asks nothing: two layers that changed places would swap their momenta.
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

# What a group is, as opposed to its options (lr, weight_decay, ...), which checkpoints may change.
IDENTITY = ("param_names", "param_shapes", "role", "kind", "rule", "layouts")
ON_MISMATCH = ("error", "reset")
_OWN = ("schedule", "multiplier", "own", "label", "momentum_dtype", "rounding")

_CHUNK = 2**18  # entries whose bits are added up at a time

Group = Mapping[str, Any]
State = Mapping[int, Mapping[str, Any]]


class _Entry(NamedTuple):
    """A parameter of a checkpoint or of an optimizer."""

    number: int  # its key in the state
    group: Group
    shape: tuple[int, ...]
    layout: str
    state_text: str  # "" where it is not known

    def fits(self, other: _Entry) -> bool:
        return (self.shape, self.rule, self.layout) == (other.shape, other.rule, other.layout)

    @property
    def rule(self) -> tuple[str, str]:
        return self.group["rule"], self.group["role"]


def matched(
    state_dict: Mapping[str, Any], groups: Sequence[Group], on_mismatch: str, per_role: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """A state dict in the order of other groups, with their identity, and what does not fit.

    Args:
        state_dict: of a checkpoint.
        groups: of the optimizer that will load it.
        on_mismatch: "error", or "reset": what does not fit is left out, with a warning.
        per_role: whether each group has a step size of its own; else the first has that of all.

    Raises:
        ValueError: if it is another optimizer's, or not whole, or parameters are missing, added, of
            another shape or under another rule, unless `on_mismatch="reset"`.
    """
    absent = [key for key in ("state", "param_groups") if key not in state_dict]
    if absent:
        found = ", ".join(map(str, state_dict)) or "nothing"
        raise ValueError(
            f"This is no state of an optimizer: it has {found}, and not {' and '.join(absent)}."
        )
    states = state_dict["state"]
    own = dict(_entries(groups, range(sum(len(group["param_names"]) for group in groups))))
    foreign = [g for g in state_dict["param_groups"] if not all(key in g for key in IDENTITY)]
    if foreign:
        complaints = [
            f"it was not written by NormOpt. Its groups have {', '.join(sorted(foreign[0]))}; "
            f"expected {', '.join(IDENTITY)} among them"
        ]
        saved = {}
    else:
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        saved = dict(_entries(state_dict["param_groups"], numbers))
        complaints = list(_differences(saved, own))
    fitting = {name: saved[name] for name in own if name in saved and saved[name].fits(own[name])}
    broken = _broken(fitting, states)
    if broken:
        name = next(iter(broken))
        complaints.append(
            f"the state of {some(broken.keys())} is not what was saved. {name} has "
            f"[{broken[name]}]; it was saved with [{fitting[name].state_text}]"
        )
    memory: dict[str, Any] = _first(state_dict["param_groups"], "memory") or {}
    resets: list[Any] = _first(state_dict["param_groups"], "resets") or []
    is_kept = bool(fitting) and all(map(_is_finite, memory.values()))
    if memory and (complaints or not is_kept):
        values = ", ".join(f"{key} {float(value):.3g}" for key, value in memory.items())
        goes_on = "eta goes on, all else" if is_kept else "it"
        complaints.append(f"its step size was at {values}: {goes_on} starts anew")
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

    state = {
        own[name].number: states[before.number]
        for name, before in fitting.items()
        if before.number in states and name not in broken
    }
    made: list[dict[str, Any]] = []
    for group in groups:
        names = [canonical_name(name) for name in group["param_names"]]
        options = next((fitting[name].group for name in names if name in fitting), group)
        kept = {key: group[key] for key in (*IDENTITY, *_OWN)} | _factor(group, names, fitting)
        if "weight_decay" in group["own"]:  # as it was asked for, like the multiplier
            kept["weight_decay"] = group["weight_decay"]
        if not per_role:  # the group that has it may be another, or frozen
            kept["memory"] = memory if is_kept and not made else {}
        kept["resets"] = [] if made else resets
        made.append({**group, **options, **kept, "params": [own[name].number for name in names]})
    return {**state_dict, "state": state, "param_groups": made}, complaints


def _factor(group: Group, names: Sequence[str], fitting: Mapping[str, _Entry]) -> dict[str, float]:
    """The factor of the rate that a group goes on with: its checkpoint's, if that had one for all.

    The model may have been loaded from the checkpoint, and nothing in it seems to be new then.
    """
    if "factor" not in group:
        return {}
    saved = {fitting[name].group.get("factor", 1.0) for name in names if name in fitting}
    factor = saved.pop() if len(saved) == 1 else group["factor"]
    return {"factor": factor, "multiplier": group["multiplier"] / group["factor"] * factor}


def _broken(fitting: Mapping[str, _Entry], states: State) -> dict[str, str]:
    """The parameters whose state is not what was saved, and what it is."""
    texts = described({one.number: states.get(one.number, {}) for one in fitting.values()})
    return {
        name: texts[one.number]
        for name, one in fitting.items()
        if one.state_text and not _is_same(one.state_text, texts[one.number])
    }


def _first(groups: Iterable[Group], key: str) -> Any:
    """What the first group has that has any."""
    return next((group[key] for group in groups if group.get(key)), None)


def _is_finite(value: Tensor | float) -> bool:
    return math.isfinite(float(value))


def described(state: State) -> dict[int, str]:
    """Keys, types, shapes and checksums of every parameter's state.

    Shards (`DTensor`) have no checksum: other numbers of ranks may read them.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    places: dict[tuple[int, str], tuple[torch.device, int]] = {}
    for number, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and not isinstance(value, DTensor) and not value.is_meta:
                found = sums.setdefault(value.device, [])
                places[number, key] = value.device, len(found)
                found.append(_checksum(value))
    known = {device: torch.stack(found).tolist() for device, found in sums.items()}  # waits once
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
    """A sum over the bits of all entries, modulo 2^64, the i-th times 2 i + 1.

    Integers, so that it is the same on every device and in every order of addition. It finds any
    exchange of two entries, and nearly every other change.
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


def _is_same(saved: str, found: str) -> bool:
    """Whether two descriptions are of one state; a checksum counts where both have it."""
    pairs = list(zip(saved.split("; "), found.split("; "), strict=False))
    return saved.count("; ") == found.count("; ") and all(
        a == b or (a.partition(" #")[0] == b.partition(" #")[0] and ("#" not in a or "#" not in b))
        for a, b in pairs
    )


def _entries(groups: Sequence[Group], numbers: Sequence[int]) -> Iterator[tuple[str, _Entry]]:
    remaining = iter(numbers)
    for group in groups:
        texts = group.get("state_texts", {})
        described = (group[key] for key in ("param_names", "param_shapes", "layouts"))
        for name, shape, layout in zip(*described, strict=True):
            entry = _Entry(next(remaining), group, tuple(shape), layout, texts.get(name, ""))
            yield canonical_name(name), entry


def _differences(saved: Mapping[str, _Entry], own: Mapping[str, _Entry]) -> Iterator[str]:
    """Every way in which parameters would go on with a state that is not theirs."""
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
    read = [name for name in both if saved[name].layout != own[name].layout]
    if read := [name for name in read if name not in reshaped]:
        name = read[0]
        yield (
            f"{some(set(read))} would be read as other operators. {name} was trained as "
            f"[{saved[name].layout}] and would go on as [{own[name].layout}]; the option heads "
            "divides attention heads"
        )


def some(names: Set[str]) -> str:
    """A few names, for an error."""
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "none"
