"""A tour of "Old Optimizer, New Norm: An Anthology": three optimizers, one idea.

    python recipes/anthology.py

trains a small classifier of the Snips intents (recipes/data/snips) and shows, in under two minutes,

1. that Adam, Shampoo and Prodigy with their moving averages off are steepest descent under a norm:
   each against its own implementation, with the difference that was measured;
2. what the moving averages add: every preset on the same problem, step by step;
3. two pictures: how the norm turns a step (the idea of the paper's Figure 1), and how the escape
   velocity finds the step size under several norms.
"""

import argparse
import copy
import gzip
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from prodigyopt import Prodigy
from torch import nn

from hf_normopt import PRESETS, EscapeVelocity, create_normopt_optimizer, operator_norm

SNIPS = Path(__file__).parent / "data" / "snips"
BUCKETS = 2000


def load(split):
    """Sentences as bags of hashed words, and their intents."""
    with gzip.open(SNIPS / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    bags = [
        [sum(map(ord, word)) * 31 % BUCKETS for word in row["text"].lower().split()] for row in rows
    ]
    width = max(map(len, bags))
    ids = torch.tensor([bag + [BUCKETS] * (width - len(bag)) for bag in bags])
    return ids, torch.tensor([row["label"] for row in rows])


class Classifier(nn.Module):
    """An embedding, a linear layer and a head: three roles, three norms."""

    def __init__(self, width=32):
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS + 1, width, padding_idx=BUCKETS)
        self.layers = nn.ModuleList([nn.Linear(width, width)])
        self.head = nn.Linear(width, 7)

    def forward(self, ids):
        return self.head(torch.relu(self.layers[0](self.table(ids))))


def train(model, optimizer, data, steps, batch=256, each=None):
    """The losses of some steps."""
    ids, labels = data
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(ids), (batch,), generator=generator)
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(ids[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if each is not None:
            each()
    return losses


def distance(a, b):
    """The largest difference of two models' weights."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


class AdamWithoutAverages(torch.optim.Adam):
    """torch's Adam with betas and eps 0; entries without a gradient, 0 / 0 there, stay."""

    def step(self, closure=None):
        kept = [
            (p, p.grad == 0, p.detach().clone()) for g in self.param_groups for p in g["params"]
        ]
        super().step()
        for p, still, before in kept:
            p.data = torch.where(still, before, p.data)
        self.state.clear()


class ShampooWithoutAccumulation(torch.optim.Optimizer):
    """Equation 14: (G Gᵀ)^(-1/4) G (Gᵀ G)^(-1/4), and the sign for vectors."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            g = p.grad
            step = g.sign()
            if g.ndim == 2:
                seen = g.any(1)  # most words are not in the batch: rows of zeros, in the step too
                g = g[seen]
                step[seen] = root(g @ g.T) @ g @ root(g.T @ g)
            p -= self.param_groups[0]["lr"] * step


def root(gram):
    values, q = torch.linalg.eigh(gram)
    kept = values > 1e-13 * values[-1]
    return q * torch.where(kept, values.clamp_min(1e-300) ** -0.25, 0) @ q.T


def equivalences(data):
    """Each story with its moving averages off, against its own implementation, in float64."""
    print("\nMoving averages off, 20 steps, largest difference of the weights:\n")
    start = Classifier().double()
    stories = {
        "Adam, betas 0      = sign descent": (
            "sign",
            1e-3,
            {},
            AdamWithoutAverages,
            {"betas": (0.0, 0.0), "eps": 0.0},
        ),
        "Shampoo, no sums   = spectral descent": (
            "spectral",
            1e-2,
            {},
            ShampooWithoutAccumulation,
            {},
        ),
        "Prodigy, betas 0   = escape velocity": (
            "escape",
            1.0,
            # prodigyopt moves by the new step size, where the paper prints the old one
            {"step_size": EscapeVelocity(variant="undelayed")},
            Prodigy,
            {"betas": (0.0, 0.0), "eps": 1e-300},
        ),
    }
    for story, (preset, lr, changes, reference, options) in stories.items():
        ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
        optimizer = create_normopt_optimizer(ours, lr=lr, preset=preset, **changes)
        train(ours, optimizer, data, 20)
        train(theirs, reference(theirs.parameters(), lr=lr, **options), data, 20)
        print(f"  {story:40s} {distance(ours, theirs):.1e}  (moved by {distance(ours, start):.1e})")
    print("\nMoving averages on, 100 steps:\n")
    for story, preset, lr, reference in (
        (
            "torch.optim.AdamW",
            "adam",
            1e-3,
            lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0),
        ),
        ("prodigyopt.Prodigy", "prodigy", 1.0, lambda p: Prodigy(p, lr=1.0)),
    ):
        ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
        train(ours, create_normopt_optimizer(ours, lr=lr, preset=preset), data, 100)
        train(theirs, reference(theirs.parameters()), data, 100)
        print(f"  {story:18s} = preset {preset:12s} {distance(ours, theirs):.1e}")


def comparison(data, valid, steps):
    """Every preset at the middle of its recommended learning rates."""
    print(f"\nEvery preset, {steps} steps, at the middle of its recommended learning rates:\n")
    for name, preset in PRESETS.items():
        torch.manual_seed(0)
        model = Classifier()
        lr = math.sqrt(math.prod(preset.learning_rate))
        losses = train(model, create_normopt_optimizer(model, lr=lr, preset=name), data, steps)
        with torch.no_grad():
            accuracy = (model(valid[0]).argmax(-1) == valid[1]).float().mean().item()
        print(
            f"  {name:15s} lr {lr:<8.2g} loss {losses[-1]:.3f}  validation accuracy {accuracy:.3f}"
        )


def draw_norms(path):
    """One gradient, the unit balls of l1 -> lp, and the step that each of them takes."""
    g = torch.tensor([[1.0], [0.45]])
    figure, axes = plt.subplots(1, 5, figsize=(12, 2.9))
    angles = torch.linspace(0, 2 * math.pi, 721)
    circle = torch.stack([angles.cos(), angles.sin()])[..., None].movedim(1, 0)
    for axis, p in zip(axes, ("l1", 1.5, "l2", 4, "linf"), strict=True):
        norm = operator_norm("l1", p)
        ball = circle / norm.norm(circle)[:, None, None]
        axis.fill(*ball[..., 0].T, color="#dce6f2")
        axis.plot(*ball[..., 0].T, color="#4a6fa5", lw=1)
        for arrow, color in ((-g / g.norm(), "#999999"), (-norm.lmo(g), "#c0392b")):
            axis.annotate(
                "",
                arrow[:, 0].tolist(),
                (0, 0),
                arrowprops={"color": color, "width": 1.5, "headwidth": 7},
            )
        axis.set(
            title=str(norm),
            xlim=(-1.3, 1.3),
            ylim=(-1.3, 1.3),
            aspect="equal",
            xticks=[],
            yticks=[],
        )
    figure.suptitle(
        "One gradient (grey: downhill), five norms: each takes the farthest step of its unit ball"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_escape(path, data, steps):
    """The step size that escape velocity finds, and the losses, under several norms."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for label, preset, size in (
        ("sign, as printed", "sign", EscapeVelocity()),
        ("sign, undelayed", "sign", EscapeVelocity(variant="undelayed")),
        ("sign, cosine rule", "sign", EscapeVelocity(rule="cosine")),
        ("spectral", "spectral", EscapeVelocity()),
        ("a norm for each role", "modular", EscapeVelocity()),
    ):
        torch.manual_seed(0)
        model, etas = Classifier(), []
        optimizer = create_normopt_optimizer(model, lr=1.0, preset=preset, step_size=size)

        def remember(optimizer=optimizer, etas=etas):
            etas.append(optimizer.param_groups[0]["memory"]["eta"].item())

        losses = train(model, optimizer, data, steps, each=remember)
        left.semilogy(etas, label=label)
        right.plot(losses, label=label)
        print(f"  escape velocity, {label:22s} step size {etas[-1]:.2e}  loss {losses[-1]:.3f}")
    left.set(title="step size η, from 1e-6", xlabel="step")
    right.set(title="training loss", xlabel="step", ylim=(0, 2.5))
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="outputs/anthology")
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data, valid = load("train"), load("validation")
    equivalences(data)
    comparison(data, valid, args.steps)
    print()
    draw_norms(output / "norms.png")
    draw_escape(output / "escape_velocity.png", data, args.steps)
    print(f"\nPictures: {output / 'norms.png'}, {output / 'escape_velocity.png'}")


if __name__ == "__main__":
    main()
