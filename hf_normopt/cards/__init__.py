"""What a run leaves beside a checkpoint: reports, a picture and a model card.

* `report.py`: `normopt.json`, what NormOpt did; every trainer writes it.
* `run_record.py`: `normopt_run.json`, what a script tells of its run; only `finish_run` writes it.
* `model_card.py` writes the section on NormOpt into any card, `run_card.py` a whole card.
* `plot.py`: `normopt_norms.png`.

All of them write through `files.py` and leave other people's files alone. Imports `optim`.
"""
