"""Norms with their dual norms and linear minimization oracles (the paper's core), and layouts.

`operators.py` holds the norms, `orthogonalize.py` the polar factor, `layouts.py` how a stored
tensor is read as operators. Nothing here imports another room. A new norm is a class in
`operators.py`.
"""
