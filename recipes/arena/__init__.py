"""The comparison of optimizers in recipes: what to run, how a run is made, what came out.

`plan.py` decides from known results what is missing (no state of its own, so a killed comparison
goes on); `runs.py` keeps results in one file and makes runs; `launch.py` is what a run executes;
`report.py` and `pictures.py` read the file.
"""
