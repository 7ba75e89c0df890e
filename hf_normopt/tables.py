"""Text tables, for people and for Markdown, and names folded over repeated layers."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from itertools import product
from math import prod


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False
) -> str:
    """A text table; columns whose cells are all numbers are aligned to the right."""
    if markdown:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell[:1].isdigit() for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = "|".join(
        "-" * (width + 1) + (":" if right else "-")
        for width, right in zip(widths, numeric, strict=True)
    )
    rule = f"|{rule}|" if markdown else "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def index_of(word: str) -> int | None:
    """The number of a layer or an expert in a part of a dotted name."""
    match = re.fullmatch(r"(?:expert_)?(\d+)", word)  # NLLB-MoE names its experts so
    return int(match[1]) if match else None


def fold_names(
    names: Sequence[str], keys: Sequence[Hashable] | None = None
) -> list[tuple[str, list[int]]]:
    """Names that differ in layer numbers only, as one label.

    A label is also a regular expression that finds its names. `layers.*.mlp (x3: 0-2)` are three of
    several layers, `layers.*.mlp (x5: 1..9)` are five that do not follow each other.

    Args:
        names: dotted names, all different.
        keys: names are folded only if their keys are equal; None: all are.

    Returns:
        Labels, each with the positions of its names, in the order of the first of them.
    """
    words = [name.split(".") for name in names]
    siblings: dict[tuple[str, ...], set[str]] = {}
    groups: dict[Hashable, dict[tuple[str, ...], int]] = {}
    for position, parts in enumerate(words):
        numbers = [i for i, word in enumerate(parts) if index_of(word) is not None]
        for i in numbers:
            siblings.setdefault(tuple(parts[:i]), set()).add(parts[i])
        pattern = tuple("*" if i in numbers else word for i, word in enumerate(parts))
        members = groups.setdefault((pattern, keys[position] if keys else None), {})
        members[tuple(parts[i] for i in numbers)] = position
    folded = []
    for members in groups.values():
        for indices in _products(list(members)):
            positions = [members[numbers] for numbers in product(*indices)]
            folded.append((_label(words[positions[0]], indices, siblings), positions))
    return sorted(folded, key=lambda row: row[1][0])


def _products(tuples: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    """Tuples of equal length as few products of sets."""
    if not tuples[0]:
        return [()]
    tails: dict[str, list[tuple[str, ...]]] = {}
    for first, *rest in tuples:
        tails.setdefault(first, []).append(tuple(rest))
    firsts: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for first, rests in tails.items():
        firsts.setdefault(tuple(rests), []).append(first)
    return [
        (tuple(equal), *others) for rests, equal in firsts.items() for others in _products(rests)
    ]


def _label(
    parts: Sequence[str],
    indices: Sequence[tuple[str, ...]],
    siblings: dict[tuple[str, ...], set[str]],
) -> str:
    parts, notes = list(parts), []
    prefixes: list[tuple[str, ...]] = [()]
    remaining = iter(indices)
    for i, word in enumerate(parts):
        here = (word,) if index_of(word) is None else next(remaining)
        if len(here) > 1:
            parts[i] = "*"
            if any(len(siblings[prefix]) > len(here) for prefix in prefixes):
                notes.append(format_indices(here))
        prefixes = [(*prefix, number) for prefix in prefixes for number in here]
    count = prod(map(len, indices))
    note = f": {' / '.join(notes)}" if notes else ""
    return ".".join(parts) + (f" (x{count}{note})" if count > 1 else "")


def format_indices(words: Sequence[str]) -> str:
    """Ascending indices in brief: `0-3` all of them, `0,2,5` these, `0..9` some from 0 to 9."""
    numbers = [index_of(word) or 0 for word in words]
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and last - first + 1 == len(numbers):
        return f"{first}-{last}"
    return ",".join(map(str, numbers)) if len(numbers) < 4 else f"{first}..{last}"
