"""The optimizer: rules, presets, groups, the step, its state and its schedules.

`presets.py` gives every role its rule (`rules.py`), `situation.py` another rate to what was made
anew; `optimizer.py` keeps groups and state; `moves.py` is the step of one tensor, `exchange.py`
shares it among ranks. Imports `norms` and `roles`. A new preset is an entry of `presets.PRESETS`.
"""
