"""The oracle's promise, on random and adversarial spectra, for every class of shapes in `plan`."""

import importlib
import math

import pytest
import torch

from hf_normopt import orthogonalize
from hf_normopt.norms.orthogonalize import POLYNOMIALS, _by_gram, _iterate, plan

LARGEST = {"gram": 1.0001, "polar_express": 1.0015, "polar_express_5": 1.0055, "rational": 1.01}
"""Of the singular values of O, by method. `docs/oracle.md` tells where they end."""

# At least one of every class, wide and tall, near the sizes where the class changes.
SHAPES = (
    *((1, 50), (2, 2), (2, 40), (100, 3), (5, 9), (8, 8), (8, 300)),
    *((9, 9), (9, 100), (16, 16), (16, 48), (160, 16), (16, 1024), (24, 120), (40, 60), (40, 101)),
    *((48, 240), (64, 64), (64, 161), (640, 64)),
    *((65, 65), (65, 170), (86, 300), (100, 100), (112, 112)),
    *((87, 250), (80, 160), (140, 128)),
)
DEVICE_SHAPES = ((2, 40), (8, 300), (9, 100), (16, 1024), (48, 240), (64, 161), (86, 300))
DEVICE_SHAPES += ((128, 140), (200, 200), (360, 380))
ACCURATE = (((41, 300), 0.98), ((50, 50), 0.98), ((64, 640), 0.98), ((16, 300), 0.999))


def kind(shape, accuracy=None, device="cpu"):
    """What `orthogonalize` tells apart: method, steps, and whether it iterates on Gram matrices."""
    chosen = plan(shape, accuracy=accuracy, device=device)
    m, n = min(shape), max(shape)
    return chosen.method, chosen.steps, bool(chosen.steps) and _by_gram(m, n, device == "cpu")


def spectra(m, count, generator):
    """Singular values whose largest is near 1, one kind after the other."""

    def uniform(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    def number(least, most):  # of singular values, or an exponent
        return least + (most - least) * uniform(1).item()

    kinds = (
        lambda: 10 ** (-number(1, 7) * uniform(m)),  # log-uniform
        lambda: 10 ** (-number(1, 7) * torch.linspace(0, 1, m, dtype=torch.float64)),  # geometric
        lambda: large(1, 10 ** -number(1.5, 4) * torch.ones(m)),  # one and many tiny ones
        lambda: large(1 + int(number(0, 0.5) * m), 10 ** -number(1.5, 4) * torch.ones(m)),
        lambda: large(1 + int(number(0, 0.2) * m), 10 ** (-2 - 1.2 * uniform(m))),
        lambda: large(1, 10 ** -number(2.5, 3.2) * (1 + 0.1 * uniform(m))),  # what costs most
        lambda: (10 ** (-4 * uniform(3)))[(3 * uniform(m)).long()],  # clusters
        lambda: large(1, uniform(m) * (uniform(m) < number(0, 1))),  # rank-deficient
        lambda: uniform(m) ** number(1, 9),
        lambda: torch.ones(m),
    )

    def large(many, rest):
        rest = rest.double().clone()
        rest[:many] = 1
        return rest

    return torch.stack([kinds[i % len(kinds)]().double() for i in range(count)])


def matrices(shape, count, seed):
    """Float32 matrices, their singular values over the scale, and bases of singular vectors.

    The bases are random, or hold a constant vector, or the left one is the identity. Each matrix
    has another scale, from 1e-20 to 1e20, but for the first of each basis.
    """
    generator = torch.Generator().manual_seed(seed)
    m, n = min(shape), max(shape)
    s = spectra(m, count, generator)
    u = torch.randn(9, m, m, generator=generator, dtype=torch.float64)
    v = torch.randn(9, n, m, generator=generator, dtype=torch.float64)
    u[3:6, :, 0] = v[3:6, :, 0] = 1
    u[6:] = torch.eye(m)
    which = torch.arange(count) % 9
    u, v = (torch.linalg.qr(basis)[0][which] for basis in (u, v))
    scale = 10 ** (40 * torch.rand(count, generator=generator, dtype=torch.float64) - 20)
    scale[:9] = 1
    g = (scale[:, None, None] * (u * s[:, None]) @ v.mT).float()
    return (g if shape[0] <= shape[1] else g.mT.contiguous()), s, scale


def judge(g, o, nuclear):
    """Efficiency, and the largest singular value of O."""
    g, o = g.double(), o.double()
    gram = o @ o.mT if o.shape[-2] <= o.shape[-1] else o.mT @ o
    largest = torch.linalg.eigvalsh(gram)[..., -1].sqrt()
    return (g * o).sum((-2, -1)) / (largest * nuclear), largest


def least_efficiency(shape, accuracy=None):
    return accuracy or (0.97 if 40 < min(shape) <= 64 else 0.98)


def check(shape, seed, count, accuracy=None, method=None, oracle=None):
    g, s, scale = matrices(shape, count, seed)
    o = oracle(g) if oracle else orthogonalize(g, accuracy=accuracy)
    efficiency, largest = judge(g, o, scale * s.sum(-1))
    i, j = efficiency.argmin(), largest.argmax()
    assert efficiency[i] >= least_efficiency(shape, accuracy), (s[i], scale[i], largest[i])
    assert largest[j] <= LARGEST[method or plan(shape, accuracy=accuracy).method], (s[j], scale[j])


def count_for(shape, work):
    """As many matrices as take about as long for every shape, 20 to 500."""
    return int(min(500, max(20, work / (min(shape) ** 2 * (max(shape) + 2 * min(shape))))))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_promise_on_cpus(shape):
    check(shape, 0, count_for(shape, 1e8))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_promise_on_cpus_with_more_seeds(shape):
    for seed in range(1, 6):
        check(shape, seed, count_for(shape, 1e8))


@pytest.mark.parametrize(("shape", "accuracy"), ACCURATE, ids=str)
def test_the_promise_with_an_accuracy(shape, accuracy):
    check(shape, 0, count_for(shape, 5e7), accuracy)


@pytest.mark.parametrize("shape", DEVICE_SHAPES, ids=str)
def test_the_promise_on_other_devices(shape, monkeypatch):
    """They iterate on the matrix itself, here on a CPU."""
    chosen = plan(shape, device="meta")
    monkeypatch.setattr(
        importlib.import_module("hf_normopt.norms.orthogonalize"), "_by_gram", lambda *_: False
    )
    oracle = lambda g: _iterate(g, chosen)
    check(shape, 0, count_for(shape, 5e7), method=chosen.method, oracle=oracle)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_class_of_shapes_has_its_tests(device):
    most = 600 if device == "cpu" else 500
    grid = [
        (m, math.ceil(ratio * m)) for m in range(1, most) for ratio in (1, 1.5, 2, 2.4, 2.6, 4, 64)
    ]
    tested = SHAPES if device == "cpu" else (*DEVICE_SHAPES, (1, 1))
    assert {kind(shape, None, device) for shape in grid} <= {
        kind((min(shape), max(shape)), None, device) for shape in tested
    }


def test_float64_is_exact():
    for shape in ((2, 40), (16, 160), (64, 64), (80, 30)):
        g = matrices(shape, 50, 0)[0].double()
        efficiency, largest = judge(g, orthogonalize(g), torch.linalg.svdvals(g).sum(-1))
        assert efficiency.amin() > 1 - 1e-6  # what counts as 0 of a float32's rounding
        assert largest.amax() < 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 100), (16, 48), (16, 1024), (64, 640), (80, 160)], ids=str)
def test_half_precision_costs_its_rounding(dtype, shape):
    g, _, scale = matrices(shape, 60, 0)
    g = (g / scale[:, None, None]).to(dtype)
    efficiency, largest = judge(g, orthogonalize(g), torch.linalg.svdvals(g.double()).sum(-1))
    assert efficiency.amin() >= least_efficiency(shape) - 0.005
    assert largest.amax() <= 1.02


def test_zeros_among_others():
    for shape in ((4, 100), (16, 160), (64, 64), (90, 300)):
        g = matrices(shape, 9, 0)[0]
        g[::2] = 0
        o = orthogonalize(g)
        assert not o[::2].any()
        assert torch.equal(o[1::2], orthogonalize(g[1::2]))


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_gram_matrices_give_what_the_matrix_itself_gives(name):
    """Factors in the wrong order would let rounding of large singular values into small ones."""
    for shape in ((9, 100), (16, 160), (64, 640), (110, 300)):
        g, s, _ = matrices(shape, 20, 0)
        o = orthogonalize(g, name)
        chosen = plan(shape, method=name)
        sigma = s / torch.linalg.vector_norm(s, dim=-1, keepdim=True)
        for a, b, c in POLYNOMIALS[name][: chosen.steps]:
            sigma = a * sigma + b * sigma**3 + c * sigma**5
        largest = judge(g, o, 1)[1]
        assert (largest - sigma.amax(-1)).amax() < 1e-4
