"""Which module takes an argument, by the words that their names share."""

from __future__ import annotations

import re

from torch import nn

_PLAIN = frozenset(("id", "idx", "index", "input", "x", "seq", "feat", "feature", "to", "of"))
_TAKE = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.RNNBase)
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
