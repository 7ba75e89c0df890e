"""Where the best learning rate is when a model becomes wider or deeper.

    python recipes/width_sweep.py --output width_sweep.jsonl

A small Llama is trained from scratch on the bytes of a text, at several widths and depths, with
five rates and two seeds for each optimizer. Every run adds a line to the output, and one that is
there is not run again, so the sweep may be stopped and continued; `--steps 0` prints the tables of
what is there. The best rate is the vertex of the parabola through the least loss and its neighbours
over log rate; a `*` marks one at the edge of its rates.
"""

import argparse
import gzip
import itertools
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_normopt import create_normopt_optimizer, init_by_fan_in_inplace

TEXT = Path(__file__).parent / "data" / "tinyshakespeare"
HEAD = 32
FIELDS = ("optimizer", "init", "tied", "steps", "batch", "width", "depth", "rate", "seed")

MAKERS = {
    "modular": lambda model, lr: create_normopt_optimizer(model, lr=lr, preset="modular"),
    "modular_tied_embedding": lambda model, lr: create_normopt_optimizer(
        model, lr=lr, preset="modular", overrides={"embed_tokens": "embedding"}
    ),
    "normopt": lambda model, lr: create_normopt_optimizer(model, lr=lr),
    "adamw": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0),
}
DEFAULTS = ["modular", "normopt", "adamw"]  # the other one is for --tied
RATES = {
    "modular": [0.01, 0.025, 0.06, 0.15, 0.4],
    "modular_tied_embedding": [0.01, 0.025, 0.06, 0.15, 0.4],
    "normopt": [0.0004, 0.001, 0.0025, 0.006, 0.015],
    "adamw": [0.001, 0.0025, 0.006, 0.015, 0.04],
}


def build(width, depth, tied, init, seed):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // HEAD,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    if init == "fan_in":
        init_by_fan_in_inplace(model)
    return model


def rows(text, starts, length):
    ids = torch.stack([text[s : s + length] for s in starts])
    return {"input_ids": ids, "labels": ids}


def train(case, texts, args):
    """The validation loss at the end of a run with warm-up and linear decay."""
    model = build(case["width"], case["depth"], case["tied"], case["init"], case["seed"])
    optimizer = MAKERS[case["optimizer"]](model, case["rate"])
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / args.steps)
    )
    order = random.Random(case["seed"])
    for _ in range(args.steps):
        starts = [order.randrange(len(texts["train"]) - args.length) for _ in range(args.batch)]
        loss = model(**rows(texts["train"], starts, args.length)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    valid = texts["validation"]
    with torch.no_grad():
        batch = rows(valid, range(0, 64 * args.length, args.length), args.length)
        return model.eval()(**batch).loss.item()


def cases(args):
    """Narrow models first, all widths at the first depth, then all depths at the first width."""
    shapes = [(w, args.depths[0]) for w in args.widths] + [
        (args.widths[0], d) for d in args.depths[1:]
    ]
    for (width, depth), seed, name in itertools.product(shapes, args.seeds, args.optimizers):
        for rate in args.rates or RATES[name]:
            values = (name, args.init, args.tied, args.steps, args.batch, width, depth, rate, seed)
            yield dict(zip(FIELDS, values, strict=True))


def best(losses):
    """The best of rates, between them by a parabola, and whether it is at their edge."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if at in (0, len(rates) - 1):
        return rates[at], True
    x = [math.log(rate) for rate in rates[at - 1 : at + 2]]
    y = [losses[rate] for rate in rates[at - 1 : at + 2]]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    middle = (x[0] + x[1]) / 2 - left / (2 * curvature) if curvature > 0 else x[1]
    return math.exp(middle), False


def table(found):
    """One row for each shape: the mean loss at each rate, and the best rate."""
    lines = []
    groups = {}
    for row in found:
        key = (row["optimizer"], row["init"], row["tied"], row["steps"])
        shape = groups.setdefault(key, {}).setdefault((row["depth"], row["width"]), {})
        shape.setdefault(row["rate"], []).append(row["loss"])
    for (name, init, tied, steps), shapes in groups.items():
        rates = sorted({rate for losses in shapes.values() for rate in losses})
        what = f"{name}, initialisation {init}{', tied' if tied else ''}, {steps} steps"
        lines += [
            f"\n**{what}**\n",
            f"| width | depth | {' | '.join(f'{rate:g}' for rate in rates)} | best rate |",
            "| --- " * (len(rates) + 3) + "|",
        ]
        for (depth, width), by_rate in sorted(shapes.items()):
            means = {rate: sum(ls) / len(ls) for rate, ls in by_rate.items()}
            finite = {rate: loss for rate, loss in means.items() if math.isfinite(loss)}
            rate, edge = best(finite) if finite else (math.nan, False)
            cells = [f"{means[r]:.3f}" if r in means else "" for r in rates]
            star = "*" if edge else ""
            lines.append(f"| {width} | {depth} | {' | '.join(cells)} | {rate:.2g}{star} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("width_sweep.jsonl"))
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--optimizers", nargs="+", choices=list(MAKERS), default=DEFAULTS)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rates", type=float, nargs="+", help="instead of each optimizer's five")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--init", choices=("own", "fan_in"), default="fan_in")
    parser.add_argument("--tied", action="store_true", help="one table for embedding and head")
    args = parser.parse_args()
    found = []
    if args.output.exists():
        found = [json.loads(line) for line in args.output.read_text().splitlines()]
    done = {tuple(row[field] for field in FIELDS) for row in found}
    texts = {
        split: torch.tensor(list(gzip.open(args.text / f"{split}.txt.gz").read()))
        for split in ("train", "validation")
    }
    for case in cases(args) if args.steps else ():
        if tuple(case.values()) in done:
            continue
        start = time.time()
        row = {**case, "loss": train(case, texts, args), "seconds": round(time.time() - start, 1)}
        found.append(row)
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print(table(found))


if __name__ == "__main__":
    sys.exit(main())
