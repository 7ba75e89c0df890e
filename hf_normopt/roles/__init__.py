"""What every parameter does to its input.

`table.py` holds the vocabulary and `classify`, the one entry. Nothing here imports another part of
the package but `layouts.py`.
"""

from .table import KINDS, ROLES, ParamSpec, classify

__all__ = ["KINDS", "ROLES", "ParamSpec", "classify"]
