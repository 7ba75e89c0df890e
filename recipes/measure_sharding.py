"""How evenly several ranks share the oracle's work, and what they send: a simulation.

    python recipes/measure_sharding.py

takes the shapes of a Llama of 32 layers, 4096 wide (8 billion parameters), for 1 to 1024 ranks, and
prints for DDP and FSDP2 the largest rank's share of the spectral work, in units of an even one, and
the bytes that it sends in a step, in float32. It draws both into outputs/sharding.png. Seconds.
"""

from pathlib import Path

from hf_normopt.norms.orthogonalize import plan
from hf_normopt.optim.exchange import assign
from hf_normopt.tables import format_table

LAYER = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 3
SHAPES = LAYER * 32
WORLDS = [2**i for i in range(11)]
BYTES = 4


def loads(costs, owners, world):
    found = [0.0] * world
    for cost, owner in zip(costs, owners, strict=True):
        found[owner] += cost
    return found


def main():
    costs = tuple(plan(shape, device="cuda").work for shape in SHAPES)
    sizes = [BYTES * m * n for m, n in SHAPES]
    rows, balance, sent = [], [], []
    for world in WORLDS:
        owners = assign(costs, world)
        even = sum(costs) / world
        worst = max(loads(costs, owners, world)) / even
        owned = loads(sizes, owners, world)
        broadcast = max(owned) if world > 1 else 0  # each rank sends what it owns, by a tree
        shard = sum(sizes) / world
        # out: the rank's shards of what others own; back: the others' shards of what it owns
        exchange = max(shard - own / world + own * (1 - 1 / world) for own in owned)
        balance.append(worst)
        sent.append((broadcast, exchange if world > 1 else 0))
        least = max(costs) / even
        columns = [f"{worst:.2f}", f"{max(1.0, least):.2f}"]
        columns += [f"{value / 2**20:,.0f}" for value in sent[-1]]
        rows.append((str(world), *columns))
    header = ("ranks", "largest share", "at the least", "DDP sends, MiB", "FSDP2 sends, MiB")
    print(f"{len(SHAPES)} matrices, {sum(sizes) / 2**20:,.0f} MiB; at the least: one operator")
    print(format_table(header, rows))
    draw(balance, sent)


def draw(balance, sent):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(WORLDS, balance, marker="o")
    left.set_ylabel("largest rank's work, times an even share")
    right.plot(WORLDS, [value[0] / 2**20 for value in sent], marker="o", label="DDP")
    right.plot(WORLDS, [value[1] / 2**20 for value in sent], marker="o", label="FSDP2")
    right.set_ylabel("MiB that a rank sends in a step")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
    path = Path("outputs/sharding.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
