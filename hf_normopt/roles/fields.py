"""Arguments with fields, such as a batch: what each holds is made when `forward` asks for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch.utils._pytree import register_pytree_node

_ASKED = re.compile(r"has no attribute|a mapping")


class Fields(dict[str, Any]):
    """Fields by key or as attributes; one that is not known yet is made from its name.

    Args:
        make: what a field of some name holds.
    """

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self.__dict__["make"] = make

    def __missing__(self, name: str) -> Any:
        value = self[name] = self.__dict__["make"](name)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]


def _leaves(fields: Fields) -> tuple[list[Any], Any]:
    return list(fields.values()), (list(fields), fields.__dict__["make"])


def _filled(values: Any, context: Any) -> Fields:
    names, make = context
    fields = Fields(make)
    fields.update(zip(names, values, strict=True))
    return fields


register_pytree_node(Fields, _leaves, _filled)


def are_asked(said: str) -> bool:
    """Whether an error says that an argument was asked for a field that tensors do not have."""
    return _ASKED.search(said) is not None
