"""Which module takes an argument, by the words that their names share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = frozenset(("id", "idx", "index", "input", "x", "seq", "feat", "feature", "to", "of"))
_TAKE = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.RNNBase)
_STATE = re.compile(r"state|hidden|^h_?0$|^hx$|memory|carry")
_NUMBERS = re.compile(r"dense|cont|numer")
_POOLED = re.compile(r"vec|pool|global|style|noise|^z|latent")
_SIDE = 32  # of images
_SHORT = 3  # letters of a word that may stand for a longer one


def namesake(model: nn.Module, name: str) -> nn.Module | None:
    """The first module whose name shares most words with an argument's, such as `embed_state`.

    Args:
        model: whose argument it is.
        name: of the argument.
    """
    words = _words(name)
    best, most = None, 0.0
    for path, module in model.named_modules() if words - _PLAIN else ():
        if isinstance(module, _TAKE):
            shared = {word for word in words for other in _words(path) if _is_same(word, other)}
            score = len(shared - _PLAIN) and len(shared - _PLAIN) + len(shared) / 10
            if score > most:
                best, most = module, score
    return best


def _words(name: str) -> set[str]:
    """The words in a name, in the singular."""
    found = re.findall(r"[A-Z]?[a-z]+", name)
    return {word.lower().removesuffix("s") for word in found}


def _is_same(word: str, other: str) -> bool:
    """Whether two words are the same, or one is a beginning of the other."""
    short, long = sorted((word, other), key=len)
    return short == long or (len(short) >= _SHORT and long.startswith(short))


def taken(module: nn.Module | None, name: str, first: Tensor) -> Any:
    """What the module takes after which an argument is named, as long as the first argument.

    Args:
        module: that module, if there is one.
        name: of the argument.
        first: the first argument, which stands for one of which nothing is known.
    """
    rows = first.shape[0]
    long = first.shape[1:-1] if first.is_floating_point() and first.ndim < 4 else first.shape[1:2]
    if isinstance(module, nn.modules.conv._ConvNd):
        sides = [first.shape[-1] if first.ndim == module.weight.ndim else _SIDE]
        return _empty(first, rows, module.in_channels, *sides * len(module.kernel_size))
    if isinstance(module, nn.RNNBase) and _STATE.search(name):
        state = _empty(first, module.num_layers, rows, module.hidden_size)
        return (state, state) if isinstance(module, nn.LSTM) else state
    if isinstance(module, (nn.Linear, nn.RNNBase)):
        width = module.in_features if isinstance(module, nn.Linear) else module.input_size
        long = long if _POOLED.search(name) is None else first.shape[1:1]
        return _empty(first, rows, *long, width)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and first.is_floating_point():
        return torch.zeros((rows, *long), dtype=torch.int64)
    if _NUMBERS.search(name) and not first.is_floating_point():
        return torch.empty(first.shape, device="meta")
    return first


def named(rest: list[Any], first: Tensor) -> Iterator[list[Any]]:
    """The arguments after the first, those of a namesake's width as the first, or as vectors."""
    floats = [isinstance(v, Tensor) and v.is_floating_point() and v is not first for v in rest]
    if any(floats):
        yield [first if is_float else v for v, is_float in zip(rest, floats, strict=True)]
        yield [of_rows(v) if is_float else v for v, is_float in zip(rest, floats, strict=True)]


def of_rows(value: Any) -> Any:
    """Of sequences the first entries."""
    longest = 2 if isinstance(value, Tensor) and value.is_floating_point() else 1
    return value[:, 0] if isinstance(value, Tensor) and value.ndim > longest else value


def _empty(first: Tensor, *shape: int) -> Tensor:
    """The first argument if it has the shape, so that both change together."""
    return first if first.shape == shape else torch.empty(shape, device="meta")
