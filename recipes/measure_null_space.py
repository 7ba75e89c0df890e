"""What noise in the null space of spectral steps does to training.

    python recipes/measure_null_space.py

trains a small Llama on Shakespeare, with the same seeds, and with a spectral oracle that is

* exact: singular values below 1e-3 of the largest move nothing;
* the same plus noise: a random matrix on what is left, with singular values of 0.25 throughout,
  the most that `float16` may leave there;
* or `float16` itself with emulated products, see `measure_16_bits.py`.

With the usual momentum, and without one, where a gradient of few tokens leaves most of a matrix
without a gradient. The loss is that on validation text after the last step. Some ten minutes on an
idle core.
"""

import argparse
import gzip
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_normopt import Spectral, create_normopt_optimizer, orthogonalize
from hf_normopt.tables import format_table
from recipes.measure_16_bits import Rounded, polar

DATA = Path(__file__).parent / "data" / "tinyshakespeare"
LENGTH = 64
ranks = []


def split(g):
    """The polar factor where singular values count, and bases of the rest; for wide g."""
    g = g.double()
    squares, u = torch.linalg.eigh(g @ g.mT)
    kept = squares > 1e-6 * squares[-1]
    u = u[:, kept]
    vh = (u / squares[kept].sqrt()).mT @ g
    ranks.append(kept.double().mean().item())
    return u @ vh, u, vh


def exact(g):
    return split(g)[0].float()


def noisy(g):
    o, u, vh = split(g)
    z = torch.randn_like(o)
    z = z - u @ (u.mT @ z)
    z = (z - (z @ vh.mT) @ vh).float()
    return o.float() + 0.25 * orthogonalize(z, "polar_express")


def in_16_bits(g):
    return polar(g, Rounded())


def of_each(oracle, g):
    if g.shape[-2] > g.shape[-1]:
        return of_each(oracle, g.mT).mT
    return torch.stack([oracle(one) for one in g.reshape(-1, *g.shape[-2:])]).reshape(g.shape)


ORACLES = {"exact": exact, "0.25 in the null space": noisy, "float16": in_16_bits}


def text(name):
    return torch.tensor(list(gzip.decompress((DATA / f"{name}.txt.gz").read_bytes())))


def trained(oracle, seed, args, momentum):
    """The loss on validation text."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))
    changes = {} if momentum is None else {"momentum": momentum}
    optimizer = create_normopt_optimizer(model, lr=args.lr, **changes)
    data, held_out = text("train"), text("validation")
    draws = torch.Generator().manual_seed(seed)
    for step in range(args.steps):
        starts = torch.randint(len(data) - LENGTH, (args.batch,), generator=draws)
        ids = torch.stack([data[start : start + LENGTH] for start in starts])
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        with patch.object(Spectral, "_lmo", lambda self, g: of_each(ORACLES[oracle], g)):
            optimizer.step()
    ids = held_out[: 64 * LENGTH].reshape(-1, LENGTH)
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=1, help=f"sequences of {LENGTH} tokens")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for momentum in (None, 0.0):
        losses = {}
        for oracle in ORACLES:
            ranks.clear()
            losses[oracle] = torch.tensor(
                [trained(oracle, seed, args, momentum) for seed in range(args.seeds)]
            )
            change = losses[oracle] - losses["exact"]
            shown = " ".join(f"{value:+.4f}" for value in change.tolist())
            share = f"{sum(ranks) / len(ranks):.2f}" if ranks else ""
            name = "usual" if momentum is None else "none"
            rows.append((name, oracle, f"{losses[oracle].mean():.4f}", shown, share))
            print(*rows[-1], sep="  ", flush=True)
    header = ("momentum", "oracle", "loss", "against exact, by seed", "share of rank")
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
