"""What every parameter does to its input: `classify`, and the pass that sees it.

`table.py` is the entry. `observe.py` runs a twin of the model (`twin.py`, `quiet.py`) on inputs
(`inputs.py`, `makers.py`; `namesakes.py` finds the module that takes an argument, `fields.py` has
arguments with fields, and `repairs.py` changes those that the model refuses) under a dispatch mode
(`watch.py`, whose operations are in `pointwise.py`, `products.py` and `mixing.py`); notes on
tensors are in `notes.py` and `views.py`, what was seen in `seen.py`. `matchers.py` and `heads.py`
say what that makes of a parameter, `parts.py` how its features are divided. What no pass can see
has a row in `architectures.py`, what PEFT adds one in `adapters.py`; `factors.py` says which two
are one operator. Imports `norms` (layouts) and no other room.
"""

from .table import KINDS, ROLES, ParamSpec, classify

__all__ = ["KINDS", "ROLES", "ParamSpec", "classify"]
