"""The core of the paper: norms with their dual norms and linear minimization oracles.

`operators.py` has the norms, `orthogonalize.py` computes polar factors (`kernels.py` on new GPUs),
`layouts.py` reads a stored tensor as operators. Imports no other room. A new norm is a class in
`operators.py`.
"""
