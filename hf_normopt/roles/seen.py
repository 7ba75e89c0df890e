"""What one pass saw: [`Seen`]."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..norms.layouts import Layout
from .parts import Matrix


@dataclass
class Seen:
    """What one pass saw.

    Attributes:
        uses: by parameter, what was done with it: "product", "kernel", "lookup", "gain", "sum",
            "offset" (to a product), "place", "return", "packed", "mixture" (a mean of several
            matrices, before it is used), "transposed" (a product along its other axis), "rate"
            (multiplied by positions before an exponential, or of a recurrence), "outer" (numbers
            times vectors), "spread" (times noise), "exponent", "sink" (beside the logits of a
            softmax), with the layout that this gives.
        matrices: by parameter, how what a matrix gives is divided.
        beside: by bias, the matrix to whose features it is added.
        divided: by matrix, the number of pieces that a view divided its stored axes into.
        head_sizes: by matrix after an attention, the size of the attention's heads.
        feeds: by matrix, those that made its inputs last.
        fields: by model (its name), for each field of its output the matrices that made it last.
        scored: the matrices that made distributions which were returned.
        shares: by matrix whose features became shares by a softmax, how many these are.
        alone: the matrices that alone made last something that was returned.
        where: by parameter, the class of the module that used it.
        partly: parameters of the module in which a pass ended.
        ran: the parameters that the model's own `forward` reached.
        alike: by parameter of a layer that was skipped, that of the equal layer that ran.
        operations: how many ran.
        failure: what ended the pass early, "" if nothing did.
        inputs: positional and keyword arguments of the pass.
    """

    uses: dict[str, dict[str, Layout | None]] = field(default_factory=dict)
    matrices: dict[str, Matrix] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    divided: dict[str, dict[int, int]] = field(default_factory=dict)
    head_sizes: dict[str, int] = field(default_factory=dict)
    feeds: dict[str, set[str]] = field(default_factory=dict)
    fields: dict[str, dict[str, frozenset[str]]] = field(default_factory=dict)
    scored: set[str] = field(default_factory=set)
    shares: dict[str, int] = field(default_factory=dict)
    alone: set[str] = field(default_factory=set)
    where: dict[str, str] = field(default_factory=dict)
    partly: set[str] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)
    alike: dict[str, str] = field(default_factory=dict)
    operations: int = 0
    failure: str = ""
    inputs: Any = None

    def update(self, other: Seen) -> None:
        """Add what was seen of modules that ran alone."""
        for name, table in self._tables():
            for key, value in getattr(other, name).items():
                if key in self.partly and not other.failure:
                    table[key] = value
                table.setdefault(key, value)
        if not other.failure:
            self.partly -= other.uses.keys()
        for key, makers in other.feeds.items():
            self.feeds.setdefault(key, set()).update(makers)
        for path, fields in other.fields.items():
            self.fields.setdefault(path, fields)

    def also_returned(self, other: Seen) -> None:
        """Add what another run returned."""
        for path, fields in other.fields.items():
            mine = self.fields.setdefault(path, {})
            for key, makers in fields.items():
                mine[key] = mine.get(key, frozenset()) | makers

    def copy_to_equals(self) -> None:
        """What was seen of a module holds for its equals that did not run."""
        for name, ran in self.alike.items():
            for _, table in self._tables():
                if ran in table:
                    table.setdefault(name, table[ran])

    def copy_to_siblings(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """What was seen of a parameter holds for those of other layers that nothing reached."""
        known = {(re.sub(r"\b\d+\b", "#", name), shapes.get(name)): name for name in self.uses}
        for name in shapes.keys() - self.uses.keys():
            like = known.get((re.sub(r"\b\d+\b", "#", name), shapes[name]))
            for _, table in self._tables() if like is not None else ():
                if like in table:
                    table[name] = table[like]

    def _tables(self) -> list[tuple[str, dict[str, Any]]]:
        names = ("uses", "matrices", "beside", "divided", "head_sizes", "where", "shares")
        return [(name, getattr(self, name)) for name in names]
