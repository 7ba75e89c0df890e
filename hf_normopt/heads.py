"""Which matrices are heads: the last ones before a task's output.

A transformers model says itself what its outputs are: `forward` returns a `ModelOutput` whose
fields are named. [`find_heads`] follows those of [`OUTPUTS`] back to the matrices that made them
(`flow.py`); other models are followed from all that they return. A base model's hidden states are
no task's output.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType

from torch import nn
from transformers import PreTrainedModel

from .adapters import is_adapter
from .architectures import HEADS
from .flow import Reader
from .graph import is_matrix, place
from .interpreter import parsed
from .values import INPUT, Known, Later, Made, Makers, Record, Value, makers, now

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


def find_heads(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why a matrix is a head, by the place of its module, or of the parameter if it is a raw one.

    Args:
        modules: all modules of a model, by name.
    """
    places = _places(modules)
    heads: dict[str, str] = {}
    inner = list(_outermost(modules))
    for name, model in modules.items():
        if isinstance(model, PreTrainedModel):
            read = name in inner or _TASK.search(_name(model)) is not None
            heads |= (_task_heads(model, places) if read else {}) or _output_embeddings(
                model, places
            )
    root = _unwrapped(modules[""])
    if not isinstance(root, PreTrainedModel):
        heads |= _own_heads(root, modules, places, [place(name) for name in inner])
    heads |= _listed(set(places.values()), modules, is_head=True)
    for name in _listed(heads, modules, is_head=False):
        del heads[name]
    return heads


def _own_heads(
    root: nn.Module, modules: Mapping[str, nn.Module], places: Mapping[int, str], inner: list[str]
) -> dict[str, str]:
    """The heads of a module that is none of transformers' models, outside those inside it."""

    def own(name: str) -> bool:
        return not any(name == model or name.startswith(f"{model}.") for model in inner)

    if is_matrix(root):
        return {place(next(n for n, m in modules.items() if m is root)): "the model's only matrix"}
    parts = list(root.children()) if _is_collection(root) else [root]
    fields = [_made(part, places, lambda key: not _INSIDE.search(key)) for part in parts]
    if any(made is not None for made in fields):
        names = (name for made in fields if made for each in made.values() for name in each)
        return {name: f"made last what {_name(root)} returns" for name in filter(own, names)}
    lists = [f"{name}." for name, m in modules.items() if isinstance(m, nn.ModuleList)]
    matrices = [
        place(name)
        for name, module in modules.items()
        if is_matrix(module) and not is_adapter(name, modules) and not name.startswith(tuple(lists))
    ]
    return {name: f"the last matrix of {_name(root)}" for name in list(filter(own, matrices))[-1:]}


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
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # of a scripted module
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in _POSITIONAL]
    return len(needed) > 1


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _output_embeddings(model: PreTrainedModel, places: Mapping[int, str]) -> dict[str, str]:
    output = model.get_output_embeddings()
    return {places[id(output)]: "get_output_embeddings()"} if id(output) in places else {}


def _task_heads(model: PreTrainedModel, places: Mapping[int, str]) -> dict[str, str]:
    """What made the outputs of a model last."""
    custom = not type(model).__module__.startswith("transformers.")
    task = custom or _TASK.search(_name(model)) is not None

    def wanted(key: str) -> bool:
        return not _INSIDE.search(key) if custom else OUTPUTS.search(key) is not None

    fields = _made(model, places, wanted) or {}
    if not any(fields.values()) and task and not model.get_output_embeddings():
        fields = _made(model, places, lambda key: key == "last_hidden_state") or {}
    return {
        name: f"made the {key} of {_name(model)} last"
        for key, made in reversed(fields.items())
        for name in made
        if task or key != _WHOLE
    }


_WHOLE = "output"


def _made(
    model: nn.Module, places: Mapping[int, str], wanted: Callable[[str], bool]
) -> dict[str, Makers] | None:
    """What made the wanted fields of a model's output last; one without fields is [`_WHOLE`].

    None where the source of `forward` cannot be read.
    """

    def last(module: nn.Module) -> Makers | None:
        if isinstance(module, nn.MultiheadAttention):
            module = module.out_proj
        if is_matrix(module):
            return frozenset({places.get(id(module), "")})
        # what is looked up, normalised or remembered is no output yet
        tables = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase)
        normalises = "norm" in _name(module).lower() and not list(module.children())
        return INPUT if isinstance(module, tables) or normalises else None

    plain = not isinstance(model, PreTrainedModel)
    reader = Reader(places, last, _unwrapped, plain)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(
        max(limit, 4_000)
    )  # values wait for each other, within `values.py`'s bound
    try:
        outputs = _outputs(model, reader)
        fields = {
            str(key): makers(later.value) - INPUT
            for output in outputs
            for key, later in _fields(output).items()
            if wanted(str(key)) or key == _WHOLE
        }
        if plain:  # what else is returned on the way to an output is none itself
            upstream = _upstream(reader, frozenset().union(*fields.values()))
            fields = {key: made - upstream for key, made in fields.items()}
        return fields if outputs else None
    except Exception:  # code that means something else than was read into it
        return None
    finally:
        sys.setrecursionlimit(limit)


def _outputs(model: nn.Module, reader: Reader) -> list[Value]:
    """What `forward` returns; without one, what the class's own public methods do."""
    forward, given = type(model).forward, [now(Known(model))]
    if isinstance(model, nn.Sequential):
        return [reader.call(model, [now(Made(INPUT))], {})]
    if not isinstance(forward, FunctionType):  # of a scripted module
        return []
    if forward is not nn.Module.forward:
        read = parsed(inspect.unwrap(forward)) is not None
        return [reader.function(forward, given, {})] if read else []
    known = {*dir(nn.Module), *dir(PreTrainedModel)}
    methods = [
        method
        for name, method in inspect.getmembers(type(model), inspect.isfunction)
        if name not in known and not name.startswith(("_", "configure", "init"))
    ]
    outputs = [reader.function(method, given, {}) for method in methods]
    return [output for output in outputs if makers(output) - INPUT]


def _fields(output: Value) -> Mapping[str | int, Later]:
    if isinstance(output, Record) and any(isinstance(key, str) for key in output.fields):
        return output.fields
    return {_WHOLE: now(output)}


def _upstream(reader: Reader, names: Makers) -> Makers:
    """Those of some matrices whose output reaches another of them."""
    if len(names) < 2:
        return frozenset()
    found: set[str] = set()
    for name in names:
        seen, todo = {name}, [name]
        while todo:
            given = reader.inputs.get(todo.pop(), ())
            above = {maker for later in given for maker in makers(later.value)} - {""} - seen
            seen |= above
            todo += above
        found |= seen & names - {name}
    return frozenset(found)


def _places(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """The places of modules and parameters; a matrix module's weight stands for the module."""
    places: dict[int, str] = {}
    for name, module in modules.items():
        if is_adapter(name, modules):
            continue
        places.setdefault(id(module), place(name))
        for leaf, parameter in module.named_parameters(recurse=False):
            own = place(name) if is_matrix(module) else place(f"{name}.{leaf}".lstrip("."))
            places.setdefault(id(parameter), own)
    return places


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
