"""What 16 bits do to polar factors: efficiency, largest singular value, and null space.

    python recipes/measure_16_bits.py --shapes 256x256,512x2048

runs the iteration that GPUs run (`hf_normopt/norms/half.py`), the same code, with its products
emulated: factors of 16 bits, multiplied in float32, and the result rounded once. That is what
tensor cores do, up to the order of sums. `split` rounds four partial sums as well, as libraries may
(`torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction`). TF32 rounds factors only.

Each row has the worst of all spectra below, and says which: the least efficiency, the greatest
singular value, and the greatest one in a null space. A minute for the default shapes on a CPU core.
"""

import argparse

import torch

from hf_normopt.norms import half
from hf_normopt.norms.orthogonalize import POLYNOMIALS
from hf_normopt.tables import format_table


class Rounded(half.Products):
    """Products in float32 of factors that are rounded to a dtype, and are then rounded too."""

    def __init__(self, dtype=torch.float16, parts=1, rounds_results=True):
        self.dtype, self.parts, self.rounds_results = dtype, parts, rounds_results

    def rounded(self, x, scale=1.0):
        x = x * scale
        if self.dtype != "tf32":
            return x.to(self.dtype).float()
        bits = x.contiguous().view(torch.int32)  # 13 fewer
        return ((bits + (1 << 12)) & -(1 << 13)).view(torch.float32)

    def product(self, a, b, symmetric=False):
        return self.added(torch.zeros(()), a, b, 0.0, 1.0)

    def added(self, c, a, b, beta, alpha, symmetric=False):
        if self.dtype == "tf32":
            a, b = self.rounded(a), self.rounded(b)
        lengths = -(-a.shape[-1] // self.parts)
        parts = [
            torch.bmm(left, right)
            for left, right in zip(a.split(lengths, -1), b.split(lengths, -2), strict=True)
        ]
        if self.parts > 1:
            parts = [self.rounded(part) for part in parts]
        result = beta * c + alpha * sum(parts[1:], parts[0])
        return self.rounded(result) if self.rounds_results else result


ARITHMETICS = {
    "float16": Rounded(),
    "float16, split sums": Rounded(parts=4),
    "TF32": Rounded("tf32", rounds_results=False),
    "bfloat16": Rounded(torch.bfloat16),
}


def spectra(r):
    """Singular values, 0 or at least 1e-3 of the largest."""
    found = {
        "flat": torch.ones(r),
        "geometric": torch.logspace(0, -3, r),
        "three clusters": torch.tensor([1.0, 0.03, 1e-3]).repeat_interleave(-(-r // 3))[:r],
        "Gaussian": torch.linalg.svdvals(torch.randn(r, r)).clamp_min(1e-3 * 2 * r**0.5),
        "half rank": torch.cat([torch.ones(r - r // 2), torch.zeros(r // 2)]),
        "geometric, half rank": torch.cat([torch.logspace(0, -3, r - r // 2), torch.zeros(r // 2)]),
    }
    for k in (1, 4, r // 16, r // 4):
        large = torch.ones(max(1, k))
        found[f"{len(large)} large, else 1e-3"] = torch.cat(
            [large, torch.full((r - len(large),), 1e-3)]
        )
        found[f"rank {len(large)}"] = torch.cat([large, torch.zeros(r - len(large))])
    return found


def with_spectrum(m, n, s):
    """A matrix with singular values s, and its singular vectors."""
    u, v = (torch.linalg.qr(torch.randn(size, len(s)))[0] for size in (m, n))
    return (u * s) @ v.T, u, v


def measured(x, s, u, v, o):
    """Efficiency, largest singular value, and the largest of what leaves the range of X."""
    kept = s > 0
    size = torch.linalg.matrix_norm(o, 2)
    left = o - u[:, kept] @ (u[:, kept].T @ o)
    right = o - (o @ v[:, kept]) @ v[:, kept].T
    outside = max(torch.linalg.matrix_norm(part, 2).item() for part in (left, right))
    return ((x * o).sum() / (size * s.sum())).item(), size.item(), outside


def polar(x, by):
    """The iteration for a wide matrix."""
    steps = half.steps_of(len(x))
    return half.in_16_bits(x[None], POLYNOMIALS["polar_express"][:steps], by)[0]


def worst(m, n, by):
    """The worst of each number over all spectra, with the spectrum's name."""
    rows = {}
    for name, s in spectra(m).items():
        x, u, v = with_spectrum(m, n, s)
        rows[name] = measured(x, s, u, v, polar(x, by))
    least = min(rows, key=lambda name: rows[name][0])
    largest, null = (max(rows, key=lambda name: rows[name][i]) for i in (1, 2))
    return (rows[least][0], least), (rows[largest][1], largest), (rows[null][2], null)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--shapes", default="64x64,64x256,128x128,256x256,256x1024,512x512,512x1024"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in args.shapes.split(","):
        m, n = sorted(map(int, shape.split("x")))
        for name, by in ARITHMETICS.items():
            torch.manual_seed(0)
            found = worst(m, n, by)
            rows.append((shape, name, *(f"{value:.3f} ({which})" for value, which in found)))
    header = ("shape", "products in", "efficiency", "largest", "null space")
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
