"""The optimizer: rules, presets, groups, the step, its state and its schedules.

`presets.py` gives every role its rule (`rules.py`), and `situation.py` its rate by what the model
was before; `groups.py` makes groups of a model, `optimizer.py` keeps them and their state. A step:
`ranks.py` makes sure that all ranks will do the same, `batches.py` says what moves together,
`moves.py` is the step of one tensor, `products.py` of two factors, `exchange.py` and
`zero_moves.py` share it among ranks, `step_sizes.py` says how far it goes, `guard.py` whether it is
made. Imports `norms` and `roles`. A new preset is an entry of `presets.PRESETS`.
"""
