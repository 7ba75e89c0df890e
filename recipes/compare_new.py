import argparse, sys
from arena.plan import Plan
from arena.runs import Results, Task, compare

p = argparse.ArgumentParser()
p.add_argument("recipe")
p.add_argument("--name")
p.add_argument("--contenders", nargs="+")
p.add_argument("--tune", type=int, nargs="+", default=[0, 1])
p.add_argument("--fresh", type=int, nargs="*", default=[10, 11, 12])
p.add_argument("--shares", type=float, nargs="*", default=[])
p.add_argument("--coarse", action="store_true")
p.add_argument("--most", type=int, default=12)
p.add_argument("--horizon", type=float, default=1)
p.add_argument("--quantity", default="loss")
p.add_argument("--file", default="outputs/arena/runs.jsonl")
p.add_argument("--argv", default="")
a = p.parse_args()
cont = {}
for c in a.contenders:
    c, _, r = c.partition("@")
    cont[c] = float(r)
task = Task(a.name or a.recipe, a.recipe, tuple(a.argv.split()), a.horizon)
plan = Plan(task.name, cont, tuple(a.tune), tuple(a.fresh), tuple(a.shares), not a.coarse, a.most)
compare(plan, task, Results(a.file), a.quantity)
