"""The state of a checkpoint, matched by name with the groups that are to go on with it.

torch matches by position and asks nothing: two layers that changed places would swap their momenta.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from torch import Tensor

from .roles.graph import canonical_name

logger = logging.getLogger(__name__)

# What a group is, as opposed to its options (lr, weight_decay, ...), which checkpoints may change.
IDENTITY = ("param_names", "param_shapes", "role", "kind", "rule", "layouts")
ON_MISMATCH = ("error", "reset")
_OWN = ("schedule", "multiplier", "label", "momentum_dtype", "rounding")

Group = Mapping[str, Any]


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
    state_dict: Mapping[str, Any], groups: Sequence[Group], on_mismatch: str
) -> tuple[dict[str, Any], list[str]]:
    """A state dict in the order of other groups, with their identity, and what does not fit.

    Args:
        state_dict: of a checkpoint.
        groups: of the optimizer that will load it.
        on_mismatch: "error", or "reset": what does not fit is left out, with a warning.

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
    texts = {name: describe(state_dict["state"], fitting[name].number) for name in fitting}
    broken = [n for n in fitting if fitting[n].state_text and fitting[n].state_text != texts[n]]
    if broken:
        name = broken[0]
        complaints.append(
            f"the state of {some(set(broken))} is not what was saved. {name} has "
            f"[{texts[name]}]; it was saved with [{fitting[name].state_text}]"
        )
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
        own[name].number: state_dict["state"][before.number]
        for name, before in fitting.items()
        if before.number in state_dict["state"] and name not in broken
    }
    made: list[dict[str, Any]] = []
    for group in groups:
        names = [canonical_name(name) for name in group["param_names"]]
        options = next((fitting[name].group for name in names if name in fitting), group)
        kept = {key: group[key] for key in (*IDENTITY, *_OWN)}
        made.append({**group, **options, **kept, "params": [own[name].number for name in names]})
    return {**state_dict, "state": state, "param_groups": made}, complaints


def describe(state: Mapping[int, Mapping[str, Any]], number: int) -> str:
    """Keys, types and shapes of a parameter's state."""
    words = []
    for key, value in sorted(state.get(number, {}).items()):
        is_tensor = isinstance(value, Tensor)
        kind = f"{value.dtype} {tuple(value.shape)}" if is_tensor else type(value).__name__
        words.append(f"{key}: {kind}".replace("torch.", ""))
    return "; ".join(words) or "no state"


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
