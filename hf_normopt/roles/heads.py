"""Which matrices are heads: the last ones before a task's output.

A transformers model says itself what its outputs are: `forward` returns a `ModelOutput` whose
fields are named. [`find_heads`] takes those of [`OUTPUTS`] and the matrices that were seen to make
them last; of other models all that they return. A base model's hidden states are no task's output.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel

from .adapters import is_adapter
from .architectures import HEADS
from .graph import is_matrix, place
from .seen import Seen

# Fields of transformers' outputs that are a task's output; `router_logits` choose experts.
OUTPUTS = re.compile(
    r"(?<!router_)logits|^params$|pred(?!ictor)|score|box|coord|corners|outputs_class|normals|_seg$"
    r"|heatmap|regression|reconstruction|spectrogram|waveform|^audio$|audio_values|log_probs"
    r"|(duration|pitch|energy)_outputs|lddt"
)
# Fields of other models' outputs that are none.
_INSIDE = re.compile(r"hidden|attention|attn|past_key|cache|loss|feature|(^|_)state")
# Models whose whole output is a task's.
_TASK = re.compile(r"For[A-Z]|Head|GAN|Gan$|Code2Wav$")


def find_heads(modules: Mapping[str, nn.Module], seen: Seen) -> dict[str, str]:
    """Why a matrix is a head, by the place of its module, or of the parameter if it is a raw one.

    Args:
        modules: all modules of a model, by name.
        seen: what was seen of `forward`.
    """
    sight = _Sight(modules, seen)
    heads: dict[str, str] = {}
    inner = list(_outermost(modules))
    for name, model in modules.items():
        if isinstance(model, PreTrainedModel):
            read = name in inner or _TASK.search(_name(model)) is not None or seen.failure != ""
            found = sight.task_heads(name, model) if read else {}
            heads |= found or sight.output_embeddings(model) or sight.last_outside(name, model)
    root = _unwrapped(modules[""])
    if not isinstance(root, PreTrainedModel):
        heads |= sight.own_heads(root, [place(name) for name in inner])
    heads |= sight.beside(heads)
    places = {place(name) for name in modules} | {sight.stands(name) for name in seen.uses}
    heads |= _listed(places, modules, is_head=True)
    for name in _listed(heads, modules, is_head=False):
        del heads[name]
    return heads


class _Sight:
    """What was seen, by the places of modules."""

    def __init__(self, modules: Mapping[str, nn.Module], seen: Seen) -> None:
        self.modules, self.seen = modules, seen
        self.skipped: dict[str, list[str]] = {}
        for name, ran in seen.alike.items():
            self.skipped.setdefault(ran, []).append(name)

    def stands(self, name: str) -> str:
        """The place of a parameter, or of its module where that is a matrix."""
        path, _, _ = name.rpartition(".")
        return place(path if is_matrix(self.modules.get(path, nn.Identity())) else name)

    def made(
        self, path: str, wanted: Callable[[str], bool], is_plain: bool
    ) -> dict[str, set[str]] | None:
        """What made the wanted fields of a model's output last; None if it was not seen."""
        fields = self.seen.fields.get(path)
        if fields is None:
            return None
        made = {key: set(names) for key, names in fields.items() if wanted(key) or key == _WHOLE}
        if is_plain:  # what else is returned on the way to an output is none itself
            names = set().union(*made.values())
            above = self.upstream(names) - self.seen.scored
            above -= self.alike(above & self.seen.alone, names - above)
            made = {key: names - above for key, names in made.items()}
        found = {}
        for key, names in made.items():
            own = [n for n in names if not is_adapter(n.rpartition(".")[0], self.modules)]
            alike = [other for n in own for other in self.skipped.get(n, ())]
            found[key] = {self.stands(n) for n in (*own, *alike)}
        return found

    def upstream(self, names: set[str]) -> set[str]:
        """Those of some matrices whose output reaches another of them."""
        found: set[str] = set()
        for name in names:
            above, todo = {name}, [name]
            while todo:
                new = self.seen.feeds.get(todo.pop(), set()) - above
                above |= new
                todo += new
            found |= (above - {name}) & names
        return found

    def alike(self, names: set[str], heads: set[str]) -> set[str]:
        """Those of some matrices that are numbered in one list with heads of the same shape."""

        def kind(name: str) -> tuple[str, tuple[int, ...]]:
            path, _, leaf = name.rpartition(".")
            return re.sub(r"\d+", "#", name), tuple(getattr(self.modules[path], leaf).shape)

        return {n for n in names if kind(n) in set(map(kind, heads))}

    def task_heads(self, path: str, model: PreTrainedModel) -> dict[str, str]:
        """What made the outputs of a model last."""
        custom = not type(model).__module__.startswith("transformers.")
        task = custom or _TASK.search(_name(model)) is not None

        def wanted(key: str) -> bool:
            return not _INSIDE.search(key) if custom else OUTPUTS.search(key) is not None

        fields = self.made(path, wanted, is_plain=False) or {}
        if custom and not any(fields.values()):
            fields = self.made(path, lambda key: "loss" in key, is_plain=False) or {}
        if not any(fields.values()) and task and not model.get_output_embeddings():
            fields = self.made(path, lambda key: key == "last_hidden_state", is_plain=False) or {}
        return {
            name: f"made the {key} of {_name(model)} last"
            for key, made in reversed(fields.items())
            for name in made
            if task or key != _WHOLE
        }

    def own_heads(self, root: nn.Module, inner: list[str]) -> dict[str, str]:
        """The heads of a module that is none of transformers' models, outside those inside it."""

        def own(name: str) -> bool:
            return not any(name == model or name.startswith(f"{model}.") for model in inner)

        modules = self.modules
        if is_matrix(root):
            name = next(n for n, m in modules.items() if m is root)
            return {place(name): "the model's only matrix"}
        parts = list(root.named_children()) if _is_collection(root) else [("", root)]
        heads: dict[str, str] = {}
        for path, part in parts:
            found = self.made_last(path)
            reason = f"made last what {_name(part)} returns"
            if not found and not (self.seen.ran and path in self.seen.fields):
                reason = f"the last matrix of {_name(part)}, whose forward was not seen to its end"
                found = self.last_defined(path, own)
            heads |= dict.fromkeys(filter(own, found), reason)
        return heads

    def made_last(self, path: str) -> set[str]:
        """What made the outputs of a plain module last; its loss, if it returns nothing else."""
        for wanted in (lambda key: not _INSIDE.search(key), lambda key: "loss" in key):
            fields = self.made(path, wanted, is_plain=True) or {}
            if any(fields.values()):
                return set().union(*fields.values())
        return set()

    def matrices(self, path: str) -> list[str]:
        """The matrices below a module, without those of adapters, in the order of definition."""
        below = f"{path}.".lstrip(".")
        return [
            name
            for name, module in self.modules.items()
            if name.startswith(below) and is_matrix(module) and not is_adapter(name, self.modules)
        ]

    def last_defined(self, path: str, own: Callable[[str], bool]) -> set[str]:
        """The last matrix in the order of definition, of those that were not reached if any."""
        below = f"{path}.".lstrip(".")
        lists = [f"{name}." for name, m in self.modules.items() if isinstance(m, nn.ModuleList)]
        lists = [name for name in lists if name.removeprefix(below) not in ("", ".")]
        matrices = [
            name
            for name in self.matrices(path)
            if own(place(name)) and not name.startswith(tuple(lists))
        ]
        later = [name for name in matrices if f"{name}.weight" not in self.seen.uses]
        before = {name for fed, names in self.seen.feeds.items() for name in names - {fed}}
        last = [name for name in matrices if f"{name}.weight" not in before]
        return {place(name) for name in (later or last)[-1:]}

    def last_outside(self, path: str, model: PreTrainedModel) -> dict[str, str]:
        """The last matrix outside the base model, where a task's output was not seen."""
        base = getattr(model, model.base_model_prefix, None)
        failed = self.seen.fields.get(path) is None
        if not failed or not _TASK.search(_name(model)) or not isinstance(base, nn.Module):
            return {}
        inside = {id(module) for module in base.modules()}
        matrices = [n for n in self.matrices(path) if id(self.modules[n]) not in inside]
        reason = f"the last matrix of {_name(model)}, whose output was not seen"
        return {place(name): reason for name in matrices[-1:]}

    def output_embeddings(self, model: PreTrainedModel) -> dict[str, str]:
        """What the model itself says."""
        output = model.get_output_embeddings()
        name = next((n for n, m in self.modules.items() if m is output), None)
        return {} if name is None or output is None else {place(name): "get_output_embeddings()"}

    def beside(self, heads: Iterable[str]) -> dict[str, str]:
        """Matrices that did not run, in the same dictionary or list as a head that did."""
        found = {}
        ran = {self.stands(name) for name in self.seen.ran}
        for group, is_named in self.groups():
            # layers in a list may follow one another
            known = [head for head in heads if is_named or head in ran]
            for name in group:
                rest = next((h[len(name) :] for h in known if f"{h}.".startswith(f"{name}.")), None)
                for other in group if rest is not None else ():
                    stands = f"{other}{rest}"
                    if stands not in ran and is_matrix(self.modules.get(stands, nn.Identity())):
                        found[stands] = f"did not run, beside the head {name}{rest}"
        return found

    def groups(self) -> Iterator[tuple[list[str], bool]]:
        """The places of modules that a dictionary or list holds, and whether they have names."""
        places = {id(module): place(name) for name, module in self.modules.items()}
        for module in self.modules.values():
            holds = isinstance(module, (nn.ModuleDict, nn.ModuleList))
            for name, group in vars(module).items():
                if not isinstance(group, (dict, list, tuple)) or (name == "_modules" and not holds):
                    continue
                values = group.values() if isinstance(group, dict) else group
                if all(isinstance(value, nn.Module) for value in values):
                    is_named = isinstance(group, dict) and not isinstance(module, nn.ModuleList)
                    yield [places[id(v)] for v in values if id(v) in places], is_named


def _is_collection(module: nn.Module) -> bool:
    """Whether modules stand side by side: also in an nn.Sequential that cannot be called.

    sentence-transformers keeps a dict of losses, which take labels too, in one.
    """
    if not isinstance(module, nn.Sequential):
        return isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return any(_needs_several(part) for part in module)


def _needs_several(module: nn.Module) -> bool:
    """Whether a module is called with more than one argument."""
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
    except (AttributeError, TypeError, ValueError):  # TorchScript
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in _POSITIONAL]
    return len(needed) > 2  # the module itself is one


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_WHOLE = "output"


def _outermost(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of the models of transformers that are in no other one."""
    found: list[str] = []
    for name, module in modules.items():
        inside = any(not m or name.startswith(f"{m}.") for m in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append(name)
            yield name


def _listed(
    places: Iterable[str], modules: Mapping[str, nn.Module], is_head: bool
) -> dict[str, str]:
    """What `architectures.py` says of matrices that reading misjudges."""
    rows = [row for row in HEADS if row.is_head == is_head]
    return {
        name: row.reason
        for owner, module in modules.items()
        for row in rows
        if re.fullmatch(row.owner, _name(module))
        for name in places
        if re.fullmatch(rf"{re.escape(place(owner))}\.?({row.path})", name)
    }


# Where DDP, torch.compile, FSDP and PEFT keep the module whose output theirs is.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "module", "base_layer", "original_module")


def _unwrapped(module: nn.Module) -> nn.Module:
    if type(module).__module__.partition(".")[0] not in ("torch", "peft"):
        return module
    base = getattr(module, "get_base_model", None)  # of a PeftModel
    if callable(base):
        return _unwrapped(base())
    children = dict(module.named_children())
    found = next((children[n] for n in (*_WRAPPED, "token_adapter") if n in children), None)
    return module if found is None else _unwrapped(found)


def _name(module: nn.Module) -> str:
    return type(module).__name__
