"""What a run writes beside a checkpoint: report, record of a script, model card, picture.

Imports `optim`. All files are written by `files.py`, which leaves those of others alone.
"""
