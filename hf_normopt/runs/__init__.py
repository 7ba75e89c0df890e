"""What the recipes share: the record of a run, and its end (`finish_run`).

Scaffolding of scripts rather than of the library; imports `cards` and `trainer`.
"""
