"""What a model was before training: fresh or pretrained, parameter by parameter; and what follows.

`from_pretrained` marks each parameter that it found in the checkpoint (transformers 5: the
attribute `_is_hf_initialized`). What has no mark in a model where others have one was made anew: a
head for the new task, a matrix of another shape. Where nothing is marked, the gains tell: those of
a model that was never trained are all at the value that they were made with.

What follows is data, [`CHOICES`], and as data it goes into groups, normopt.json and the card.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, starmap
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from ..norms.layouts import Layout
from ..roles.graph import canonical_name
from .checkpoints import some
from .rules import Policy, rule_in, smoothed


class Choice(NamedTuple):
    """How a role's rule is changed for the situation.

    Args:
        factor: of the learning rate.
        smoothing: the beta of an [`EMA`](hf_normopt.EMA) of the norm's statistic, where the rule
            has none; None: as it is.
        unsmoothed: the factor in place of the first where the rule cannot be smoothed.
    """

    factor: float = 1.0
    smoothing: float | None = None
    unsmoothed: float = 1.0


# By what a parameter was before, and its role; where nothing stands here, nothing was measured.
# Validation loss at the best rate of each, the same without the choice in parentheses; most runs
# are short, and the measurement is in docs/results.md.
CHOICES: dict[tuple[str, str], Choice] = {
    ("new", "head"): Choice(10.0),  # MiniLM, 77 intents, 60 steps: 1.33 (2.23)
    ("beside adapters", "head"): Choice(5.0),  # the same with LoRA, 80 steps: 1.01 (1.60)
    # A small Llama, 1,600 steps: 3.15; unsmoothed at 16 and 1 times the rate 3.21
    ("scratch", "embedding"): Choice(64.0, smoothing=0.99, unsmoothed=16.0),
    ("scratch", "head"): Choice(4.0, smoothing=0.99),
}

SITUATIONS = ("auto", "scratch", "pretrained", "neutral")

_MARK = "_is_hf_initialized"
_SOME_GAINS = 8  # that are looked at
_BODY = 0.8  # of the tensors: where less was loaded, a head is one of many new parts


class _Evidence(NamedTuple):
    """What can be seen of a model.

    Args:
        marks: whether from_pretrained loaded it, by parameter.
        gains: whether they have left the value that they were made with; None: there are none.
    """

    marks: dict[str, bool]
    gains: bool | None


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Evidence] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Situation:
    """What the parameters of a model were before training.

    Args:
        name: of the whole: "scratch", "pretrained" or "unknown".
        why: one clause, for the log.
        states: by parameter: "scratch", "loaded", "new" (on a body that was loaded), "new part" (of
            a model that was loaded in part), "resized", "adapter", "beside adapters" or "unknown".
        no_tables: parameters that are no table of the input alone: tied to a head, or embedding
            something else, such as positions. Nothing was measured for them, and they get no
            multiplier as embeddings.
    """

    name: str
    why: str
    states: Mapping[str, str] = field(default_factory=dict)
    no_tables: Collection[str] = ()

    def state(self, name: str) -> str:
        """What one parameter was; its name may have wrappers."""
        return self.states.get(canonical_name(name), "unknown")


def remember(model: nn.Module) -> None:
    """Note what can be seen of a model, for [`find_situation`].

    A wrapper may replace its parameters afterwards, or a checkpoint its weights; what counts is
    what the run began with.

    Args:
        model: any module; what was noted of it first stays.
    """
    _KNOWN.setdefault(model, _evidence(model))


def find_situation(model: nn.Module, asked: str = "auto") -> Situation:
    """Find out what the parameters of a model were.

    Args:
        model: any module, wrapped or not.
        asked: "auto"; or, from someone who knows, "scratch", "pretrained" (nothing is new but what
            can be seen to be), or "neutral".

    Raises:
        ValueError: for another word.
    """
    if asked not in SITUATIONS:
        raise ValueError(f"situation must be one of {', '.join(SITUATIONS)}, found {asked!r}.")
    named = model.named_children()
    inner = (child for name, child in named if canonical_name(f"{name}.p") == "p")
    known = next((part for part in (model, *inner) if part in _KNOWN), model)
    remember(known)
    marks, moved = _KNOWN[known]
    adapters, others = set(_adapter_names(model)), _tied_names(model) | _no_tables(model)
    all_new = dict.fromkeys(marks, "scratch")
    if asked in ("scratch", "neutral"):
        return Situation(asked, "as was said", all_new if asked == "scratch" else {}, others)
    if any(marks.values()):
        return _partly_loaded(model, _of_rank_zero(marks), adapters, others)
    if asked == "pretrained":
        return Situation(asked, "as was said")
    if moved is False and not adapters:
        why = "from_pretrained loaded nothing, and the gains are as they were made"
        return Situation("scratch", why, all_new, others)
    if moved:
        return Situation("unknown", "trained before, but not loaded by from_pretrained")
    return Situation("unknown", "from_pretrained loaded nothing")


def with_choices(
    groups: Sequence[dict[str, Any]],
    situation: Situation,
    choices: Mapping[tuple[str, str], Choice],
    policy: Policy,
    said: Collection[str] = (),
    can_smooth: bool = True,
) -> list[dict[str, Any]]:
    """Groups with the choice that the situation makes for all of their parameters.

    A group whose parameters would get different ones has none: groups stay what they are, so that
    schedules and checkpoints of a run fit whatever the situation seems to be. A choice is no part
    of the rule for the same reason: a checkpoint's goes on.

    Args:
        groups: as [`NormOpt`](hf_normopt.NormOpt) takes them.
        situation: of the model.
        choices: by state and role, see [`CHOICES`].
        policy: the rules. None is smoothed whose statistic is not one number for each row, which
            can be kept however parameters are divided.
        said: roles and kinds about which an option has spoken. Their groups get no choice, nor do
            those with a rate of their own.
        can_smooth: whether the step size goes without dual norms. With them smoothing was not
            measured.
    """
    made = []
    for group in groups:
        if {group["role"], group["kind"]} & set(said) or "lr" in group:
            made.append(group)
            continue
        found = {
            Choice()
            if group["role"] == "embedding" and canonical_name(name) in situation.no_tables
            else choices.get((situation.state(name), group["role"]), Choice())
            for name, _ in group["params"]
        }
        choice = found.pop() if len(found) == 1 else Choice()
        beta = choice.smoothing
        if beta is not None and not (can_smooth and _can_smooth(group, policy, beta)):
            choice = Choice(choice.unsmoothed)
        made.append({**group, "factor": choice.factor, "smoothing": choice.smoothing})
    return made


def _can_smooth(group: Mapping[str, Any], policy: Policy, beta: float) -> bool:
    """Whether a rule without a statistic could have one, of rows."""
    rule = rule_in(policy, group)
    if rule.statistic is not None:
        return False
    try:
        rule = smoothed(rule, beta)
    except ValueError:  # the norm has no statistic
        return False
    shapes = [tuple(p.shape) for _, p in group["params"]]
    layouts = map(Layout, group["layouts"])
    return all(starmap(rule.smooths_rows, zip(layouts, shapes, strict=True)))


def summary(situation: Situation, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was found and chosen, for the log, normopt.json and the card.

    Args:
        situation: of the model.
        groups: from [`with_choices`].
    """
    chosen, words = {}, []
    for group in groups:
        names, options = [name for name, _ in group["params"]], []
        for key, name in (("smoothing", "statistic"), ("factor", "lr")):
            value, option = group.get(key) or 1.0, f"{name}_{group['role']}"
            if value != 1:
                chosen[option] = {key: value, "parameters": names}
                options.append(f"{option}={value:g}")
        if options:
            words.append(f"{','.join(options)} for {some(set(names))}")
    news = {name for name, state in situation.states.items() if state.startswith("new")}
    what = f", new: {some(news)}" if news else ""
    text = "; ".join([f"{situation.name} ({situation.why}{what})", *(words or ["no multiplier"])])
    return {"name": situation.name, "text": text, "chosen": chosen}


def _evidence(model: nn.Module) -> _Evidence:
    marks = {
        canonical_name(name): getattr(p, _MARK, False) is True
        for name, p in model.named_parameters()
    }
    gains = list(islice(_gains(model), _SOME_GAINS))
    return _Evidence(marks, not all(map(_is_constant, gains)) if gains else None)


def _gains(model: nn.Module) -> Iterator[Tensor]:
    """Gains of normalizations whose values are here."""
    for module in model.modules():
        gain = module._parameters.get("weight")
        if gain is None or "norm" not in type(module).__name__.lower():
            continue
        is_elsewhere = gain.is_meta or isinstance(gain, (DTensor, UninitializedParameter))
        if not is_elsewhere and gain.ndim == 1 and len(gain) > 1:
            yield gain


def _partly_loaded(
    model: nn.Module, marks: dict[str, bool], adapters: set[str], no_tables: Collection[str]
) -> Situation:
    """The situation of a model of which parts were loaded."""
    resized = _resized_head(model, marks)
    states = {}
    for name, is_marked in marks.items():
        if name in adapters:
            states[name] = "adapter"
        elif is_marked or marks.get(_original(name), False):
            states[name] = "loaded"
        elif name in resized:
            states[name] = "resized"
        else:
            states[name] = "beside adapters" if adapters else "new"
    own = [state for state in states.values() if state != "adapter"]
    loaded = sum(state in ("loaded", "resized") for state in own)
    if loaded < _BODY * len(own):
        states = {name: "new part" if s == "new" else s for name, s in states.items()}
    why = f"from_pretrained loaded {loaded} of {len(own)} tensors"
    return Situation("pretrained", why + (", with adapters" if adapters else ""), states, no_tables)


def _original(name: str) -> str:
    """Where PEFT keeps what a trained copy of a module was made from."""
    head, found, tail = name.partition(".modules_to_save.")
    return f"{head}.original_module.{tail.partition('.')[2]}" if found else name


def _resized_head(model: nn.Module, marks: Mapping[str, bool]) -> set[str]:
    """The output embedding's names where it has no mark and the input embedding has.

    `resize_token_embeddings` puts a new module in its place, which has most of the old rows.
    """
    for part in (model, *model.modules()):
        first, last = (_ids_of(part, f"get_{end}_embeddings") for end in ("input", "output"))
        names = {canonical_name(n): id(p) for n, p in model.named_parameters()} if last else {}
        if any(marks.get(name) and i in first for name, i in names.items()):
            return {name for name, i in names.items() if i in last and not marks.get(name)}
    return set()


def _ids_of(module: nn.Module, getter: str) -> set[int]:
    """The parameters of the part that a getter of transformers gives, if there is one."""
    with contextlib.suppress(AttributeError, NotImplementedError, TypeError):
        return {id(p) for p in getattr(module, getter)().parameters()}
    return set()


def _adapter_names(model: nn.Module) -> Iterator[str]:
    """Parameters that PEFT's layers added to the model's own."""
    for path, module in model.named_modules():
        for attribute in {*getattr(module, "adapter_layer_names", ())} - {"modules_to_save"}:
            added = getattr(module, attribute, None)
            if isinstance(added, nn.Module):
                for name, _ in added.named_parameters():
                    yield canonical_name(f"{path}.{attribute}.{name}")
            elif isinstance(added, nn.Parameter):
                yield canonical_name(f"{path}.{attribute}")


def _tied_names(model: nn.Module) -> set[str]:
    places: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(p), []).append(canonical_name(name))
    return {name for names in places.values() if len(names) > 1 for name in names}


def _no_tables(model: nn.Module) -> set[str]:
    """Parameters of a transformers model that do not embed its input; none of any other model."""
    if not any(hasattr(module, "get_input_embeddings") for module in model.modules()):
        return set()
    tables = {i for module in model.modules() for i in _ids_of(module, "get_input_embeddings")}
    return {canonical_name(name) for name, p in model.named_parameters() if id(p) not in tables}


def _is_constant(gain: Tensor) -> bool:
    values = gain.detach()
    return bool((values == values[0]).all())


def _of_rank_zero(marks: dict[str, bool]) -> dict[str, bool]:
    """The marks of rank 0, where transformers loads on that rank only and marks all on others."""
    word = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower()
    is_alone = not (dist.is_available() and dist.is_initialized())
    if is_alone or word not in ("1", "true", "yes", "y", "on", "t"):
        return marks
    shared: list[Any] = [marks]
    dist.broadcast_object_list(shared)
    return dict(shared[0])
