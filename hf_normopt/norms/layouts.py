"""How to read a stored tensor as operators of shape `(..., fan_out, fan_in)`.

A norm is defined on operators, but a model stores tensors: `nn.Embedding` and `Conv1D` store the
transpose, a fused projection stores three maps in one tensor, a mixture of experts stores all
experts in one. A [`Layout`] names the stored axes in a line of text, which fits in a table and in a
checkpoint:

| pattern                   | tensor                                                            |
| ------------------------- | ----------------------------------------------------------------- |
| `out in`                  | `nn.Linear.weight`                                                |
| `in out`                  | `Conv1D.weight` (GPT-2), `nn.Embedding.weight` (in = the tokens)  |
| `in (part=3 out)`         | GPT-2's `c_attn`: three maps side by side                         |
| `(out=512+64+64) in`      | three maps of unequal size, one below the other                   |
| `(out0=12 part=3 out1) in` | three maps interleaved per head, each an operator over all heads |
| `(out0=8 out1=256+64+64) in` | the same of unequal size, per group of heads                   |
| `(head=32+8+8 out=128) in` | heads of queries, keys and values, each head an operator         |
| `expert (part=2 out) in`  | stacked experts with gate and up projections fused                |
| `(group=4 out) in tap=3 tap=3` | a grouped 3 x 3 convolution                                  |
| `out`                     | a vector: one column, acting on the constant 1                    |

Axes whose names start with `out` make up `fan_out`, and those that start with `in` make up
`fan_in`, in the order of the pattern. All other axes count independent operators. `tap` axes count
the taps of a convolution, whose number enters the norm (`Norm.weight`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_AXIS = re.compile(r"(?P<name>[a-z]+\d*)(?:=(?P<sizes>\d+(?:\+\d+)*))?$")


@dataclass(frozen=True)
class _Axis:
    name: str
    sizes: tuple[int, ...]  # () unknown, (n,) given, (n, m, ...) split into consecutive pieces

    @property
    def kind(self) -> str:
        return next((kind for kind in ("out", "in") if self.name.startswith(kind)), "batch")


@dataclass(frozen=True)
class Layout:
    """A pair of inverse views between a stored tensor and its operators.

    Args:
        pattern: one word for each stored axis, see the table in this module's docstring.
            Parentheses divide a stored axis into several. `name=size` gives a size; in parentheses
            all names but one need it. `name=a+b` splits an axis into consecutive operators of
            different sizes.

    Raises:
        ValueError: if the pattern cannot be read.
    """

    pattern: str

    def __post_init__(self) -> None:
        _parse(self.pattern)

    def __str__(self) -> str:
        return self.pattern

    @property
    def taps(self) -> int:
        """The number of taps of a convolution kernel, for `Norm.weight`; 1 for all else."""
        axes = (axis for axes in _parse(self.pattern) for axis in axes)
        return math.prod(axis.sizes[0] for axis in axes if axis.name == "tap")

    def axis(self, i: int) -> str:
        """The kind of the i-th stored axis: "out", "in", "batch", or "" if divided or absent."""
        stored = _parse(self.pattern)
        axes = stored[i] if i < len(stored) else ()
        return axes[0].kind if len(axes) == 1 and not axes[0].sizes else ""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the layout can read a tensor of this shape."""
        try:
            _plan(self.pattern, tuple(shape))
        except ValueError:
            return False
        return True

    def to_operators(self, stored: Tensor) -> tuple[Tensor, ...]:
        """Read a stored tensor as operators, as a view where the strides allow it.

        Args:
            stored: a tensor of the stored shape.

        Returns:
            One tensor `(..., fan_out, fan_in)`, or one for each piece of a split axis.

        Raises:
            ValueError: if the shape does not fit the pattern.
        """
        plan = _plan(self.pattern, tuple(stored.shape))
        unfolded = stored.reshape(plan.unfolded)
        pieces = (
            unfolded.split(plan.split_sizes, plan.split_axis) if plan.split_sizes else [unfolded]
        )
        return tuple(
            piece.permute(plan.order).reshape(plan.operator_shape(piece)) for piece in pieces
        )

    def from_operators(self, operators: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
        """The inverse of [`to_operators`], bit for bit.

        Args:
            operators: tensors of the shapes that `to_operators` returns.
            shape: the stored shape.

        Returns:
            A tensor of the stored shape.
        """
        plan = _plan(self.pattern, tuple(shape))
        pieces = []
        for i, operator in enumerate(operators):
            unfolded = list(plan.unfolded)
            if plan.split_sizes:
                unfolded[plan.split_axis] = plan.split_sizes[i]
            permuted = operator.reshape([unfolded[axis] for axis in plan.order])
            pieces.append(permuted.permute(plan.inverse_order))
        stored = pieces[0] if len(pieces) == 1 else torch.cat(pieces, plan.split_axis)
        return stored.reshape(shape)


@dataclass(frozen=True)
class _Plan:
    unfolded: tuple[int, ...]  # the stored shape with every parenthesis opened
    split_axis: int
    split_sizes: tuple[int, ...]
    order: tuple[int, ...]  # batch axes, out axes, in axes
    inverse_order: tuple[int, ...]
    batch: int
    outs: int

    def operator_shape(self, piece: Tensor) -> tuple[int, ...]:
        sizes = [piece.shape[axis] for axis in self.order]
        fans = sizes[self.batch :]
        return (*sizes[: self.batch], math.prod(fans[: self.outs]), math.prod(fans[self.outs :]))


@cache
def _parse(pattern: str) -> tuple[tuple[_Axis, ...], ...]:
    """One tuple of axes for each stored axis."""
    words = re.findall(r"\([^()]*\)|[^\s()]+", pattern)
    if " ".join(words) != " ".join(pattern.split()):
        raise ValueError(
            f"Layout {pattern!r}: expected words apart from each other, and ( ) in pairs."
        )
    stored = []
    for word in words:
        axes = [_parse_axis(pattern, part) for part in word.strip("()").split()]
        if sum(not axis.sizes for axis in axes) > 1:
            raise ValueError(f"Layout {pattern!r}: {word} may leave one size open at the most.")
        stored.append(tuple(axes))
    if sum(len(axis.sizes) > 1 for axes in stored for axis in axes) > 1:
        raise ValueError(f"Layout {pattern!r}: one axis at the most can be split into pieces.")
    return tuple(stored)


def _parse_axis(pattern: str, part: str) -> _Axis:
    match = _AXIS.match(part)
    if match is None:
        raise ValueError(
            f"Layout {pattern!r}: cannot read {part!r}; expected a name such as out, in, expert "
            "or tap, with a size (part=3) or a split (out=512+64+64) if need be."
        )
    if match["name"] == "tap" and match["sizes"] is None:
        raise ValueError(f"Layout {pattern!r}: a tap axis needs its size, as in tap=3.")
    sizes = tuple(int(size) for size in (match["sizes"] or "").split("+") if size)
    return _Axis(match["name"], sizes)


@cache
def _plan(pattern: str, shape: tuple[int, ...]) -> _Plan:
    stored = _parse(pattern)
    if len(stored) != len(shape):
        raise ValueError(
            f"Layout {pattern!r} describes {len(stored)} stored axes, the tensor has shape {shape}."
        )
    axes: list[_Axis] = []
    unfolded: list[int] = []
    for group, size in zip(stored, shape, strict=True):
        known = math.prod(sum(axis.sizes) for axis in group if axis.sizes)
        for axis in group:
            axes.append(axis)
            unfolded.append(sum(axis.sizes) if axis.sizes else size // known)
        if math.prod(unfolded[len(unfolded) - len(group) :]) != size:
            raise ValueError(f"Layout {pattern!r} does not divide the tensor's shape {shape}.")
    kinds = [axis.kind for axis in axes]
    order = tuple(i for kind in ("batch", "out", "in") for i, k in enumerate(kinds) if k == kind)
    split = next((i for i, axis in enumerate(axes) if len(axis.sizes) > 1), None)
    return _Plan(
        unfolded=tuple(unfolded),
        split_axis=split if split is not None else 0,
        split_sizes=axes[split].sizes if split is not None else (),
        order=order,
        inverse_order=tuple(order.index(i) for i in range(len(order))),
        batch=kinds.count("batch"),
        outs=kinds.count("out"),
    )


def usual_layout(role: str, shape: tuple[int, ...]) -> Layout:
    """The usual layout of a tensor with a role.

    Args:
        role: see `hf_normopt.roles.ROLES`.
        shape: the stored shape.

    Returns:
        (..., out, in) for `linear` and `head`; (out, in, taps ...) for `conv`; (tokens ..., width)
        for `embedding`; one column of entries for all others.
    """
    axes = len(shape)
    if axes >= 2 and role in ("linear", "head"):
        return Layout(" ".join([*_numbered("stack", axes - 2), "out", "in"]))
    if axes >= 2 and role == "conv":
        return Layout(" ".join(["out", "in", *(f"tap={size}" for size in shape[2:])]))
    if axes >= 2 and role == "embedding":
        return Layout(" ".join([*_numbered("in", axes - 1), "out"]))
    return Layout(" ".join(_numbered("out", axes)))


def _numbered(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}{i}" for i in range(count)]
