"""Whether the last step's inverse root could start the next one's: how far momenta move.

    python recipes/measure_warm_start.py

trains a small Llama on Shakespeare, and for each of its matrices takes the momentum X that the
spectral norm's oracle receives in two steps that follow each other. With A = X Xᵀ (over its norm)
and Z = (A + ε)^(-1/2) of the first, an iteration that corrects Z for the second X starts from the
eigenvalues of Z (A + ε) Z, which ought to be near 1. A minute and a half on a CPU core.
"""

import gzip
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_normopt import Spectral, create_normopt_optimizer
from hf_normopt.tables import format_table

TEXT = Path(__file__).parent / "data" / "tinyshakespeare" / "train.txt.gz"
STEPS = (30, 120)
CORRECTIONS = 4


def root(a):
    """a^(-1/2)."""
    values, q = torch.linalg.eigh(a)
    return (q * values.rsqrt()) @ q.mT


def efficiency(x, o):
    bound = torch.linalg.matrix_norm(o, 2) * torch.linalg.matrix_norm(x, "nuc")
    return ((x * o).sum() / bound).item()


def compare(before, now, eps):
    """Change of X; extreme eigenvalues of Z A Z; efficiency of Z X, corrected ever more often."""
    if now.shape[0] > now.shape[1]:
        before, now = before.mT, now.mT
    size = torch.linalg.matrix_norm(now @ now.mT).sqrt()
    before, now = before / size, now / size
    eye = torch.eye(len(now), dtype=now.dtype)
    a, z = now @ now.mT + eps * eye, root(before @ before.mT + eps * eye)
    values = torch.linalg.eigvalsh(z @ a @ z)
    found = [efficiency(now, z @ now)]
    for _ in range(CORRECTIONS):  # Newton and Schulz's quintic, scaled so that it converges
        m = z @ a @ z.mT
        size = torch.linalg.matrix_norm(m, 2)
        m = m / size
        z = (1.875 * eye - 1.25 * m + 0.375 * m @ m) @ z / size.sqrt()
        found.append(efficiency(now, z @ now))
    change = torch.linalg.matrix_norm(now - before) / torch.linalg.matrix_norm(now)
    return [change.item(), values[0].item(), values[-1].item(), *found]


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=6, **sizes))
    optimizer = create_normopt_optimizer(model, lr=2e-3, weight_decay=0.01)
    data = torch.tensor(list(gzip.decompress(TEXT.read_bytes())))
    last, rows = {}, []

    def observe(move, eta):
        if not isinstance(move.rule.norm, Spectral):
            return
        now = move.smooth.double()
        if step in STEPS:
            for eps in (3e-6, 1e-4):
                found.setdefault(eps, []).append(compare(last[id(move.param)], now, eps))
        last[id(move.param)] = now.clone()

    for step in range(1, max(STEPS) + 1):
        starts = torch.randint(len(data) - 128, (16,))
        ids = torch.stack([data[start : start + 128] for start in starts])
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found = {}
        optimizer.observer = observe if {step, step + 1} & {*STEPS} else None
        optimizer.step()
        for eps, measured in found.items():
            medians = torch.tensor(measured).median(0).values.tolist()
            rows.append((str(step), f"{eps:g}", *(f"{value:.3g}" for value in medians)))
    corrected = [f"after {i + 1}" for i in range(CORRECTIONS)]
    header = ("step", "eps", "change of X", "least", "greatest", "efficiency", *corrected)
    print("Medians over matrices; least and greatest eigenvalue of Z A Z.")
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
