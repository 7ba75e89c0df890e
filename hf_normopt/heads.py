"""Which matrices are heads: the last ones before a task's output."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .adapters import is_adapter
from .graph import place

MATRIX = (nn.Linear, Conv1D, nn.modules.conv._ConvNd)


def find_heads(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why a module is a head, by its place."""
    matrices = {
        place(name): module
        for name, module in modules.items()
        if isinstance(module, MATRIX) and not is_adapter(name)
    }
    inner: dict[str, PreTrainedModel] = {}  # the outermost models that transformers knows
    for name, module in modules.items():
        if isinstance(module, PreTrainedModel) and not _inside(place(name), set(inner)):
            inner[place(name)] = module
    heads: dict[str, str] = {}
    for name, model in inner.items():
        heads |= _task_heads(name, model, modules, matrices)

    root = modules[""]
    if not hasattr(root, "peft_config") and not type(root).__module__.startswith("transformers."):
        lists = {place(name) for name, m in modules.items() if isinstance(m, nn.ModuleList)}
        own = [name for name in matrices if not _inside(name, set(inner))]
        heads |= {
            name: "the last matrix of the model" for name in own[-1:] if not _inside(name, lists)
        }
    return heads


def _task_heads(
    root: str,
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    matrices: Mapping[str, nn.Module],
) -> dict[str, str]:
    """The output embeddings, and the last of the matrices that a task adds to its base model."""
    heads = {}
    output, base = model.get_output_embeddings(), model.base_model
    if output is not None:
        heads = {
            place(name): "get_output_embeddings()" for name, m in modules.items() if m is output
        }
    custom = not type(model).__module__.startswith("transformers.")
    if not custom and not re.search(r"For[A-Z]|Head", type(model).__name__):
        return heads

    added = [(name, matrix) for name, matrix in matrices.items() if _inside(name, {root})]
    if base is model:  # none of its modules is: only a matrix that is its child is surely added
        children = {f"{root}.{child}".lstrip(".") for child, _ in model.named_children()}
        added = [] if custom else [(name, matrix) for name, matrix in added if name in children]
    else:
        inside = {place(name) for name, module in modules.items() if module is base}
        added = [(name, matrix) for name, matrix in added if not _inside(name, inside)]
    for i, (name, matrix) in enumerate(added):
        if i + 1 == len(added) or _fans(matrix)[0] != _fans(added[i + 1][1])[1]:
            heads.setdefault(name, f"last matrix after the base model of {type(model).__name__}")
    return heads


def _inside(name: str, modules: set[str]) -> bool:
    return any(not m or name == m or name.startswith(f"{m}.") for m in modules)


def _fans(matrix: nn.Module) -> tuple[int, int]:
    """(fan_out, fan_in) in features or channels."""
    if isinstance(matrix, Conv1D):
        return matrix.nf, matrix.nx
    if isinstance(matrix, nn.Linear):
        return matrix.out_features, matrix.in_features
    assert isinstance(matrix, nn.modules.conv._ConvNd)
    return matrix.out_channels, matrix.in_channels
