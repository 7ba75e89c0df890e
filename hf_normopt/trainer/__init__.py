"""The doors to `transformers.Trainer`: arguments, callback, telemetry, registration.

`arguments.py` reads options, `door.py` is the class that transformers gets, `trainer.py` registers
it; `publish.py` is the end of a script: weights, metrics, card; `trial.py` is a run of `find-rate`.
Imports `optim` and `cards`. A new option is a field of `NormOptArguments`.
"""

from .trainer import _known_name as _known_name  # pickles of earlier versions name it here
