import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hf_normopt import orthogonalize
from hf_normopt.norms.orthogonalize import (
    _DELTA,
    _NARROWED,
    EFFICIENCY,
    METHODS,
    POLES,
    POLYNOMIALS,
    WEIGHTS,
    plan,
)

EXACT = ("svd", "gram")
CONVERGED = (*EXACT, "auto", "polar_express")

SPECTRA = {
    "flat": lambda r: torch.ones(r),
    "log 1e-3": lambda r: torch.logspace(0, -3, r),
    "log 1e-5": lambda r: torch.logspace(0, -5, r),
    "one large, the rest 1e-3": lambda r: torch.tensor([1.0] + [1e-3] * (r - 1)),
    "one large, the rest 1e-4": lambda r: torch.tensor([1.0] + [1e-4] * (r - 1)),
    "half rank": lambda r: torch.tensor([1.0] * (r - r // 2) + [0.0] * (r // 2)),
    "rank one": lambda r: torch.tensor([1.0] + [0.0] * (r - 1)),
}
SHAPES = (
    (48, 48),
    (16, 200),
    (200, 16),
    (1, 64),
    (64, 1),
    (1, 1),
    (96, 96),
    (256, 320),
    (192, 700),
)


def with_spectrum(shape, spectrum, dtype=torch.float64):
    m, n = shape
    u = torch.linalg.qr(torch.randn(m, min(m, n), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, min(m, n), dtype=torch.float64))[0]
    s = spectrum(min(m, n)).double()
    return ((u * s) @ v.T).to(dtype), (u * (s > 0)) @ v.T, u[:, s == 0], v[:, s == 0]


def efficiency(g, o):
    """⟨G, O⟩ / (‖O‖ ‖G‖†), 1 for the exact oracle."""
    g, o = g.double(), o.double()
    return (
        (g * o).sum() / (torch.linalg.matrix_norm(o, 2) * torch.linalg.matrix_norm(g, "nuc"))
    ).item()


@pytest.mark.parametrize("method", CONVERGED)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_efficiency_on_every_spectrum(method, spectrum, shape, dtype):
    g, polar, left_null, right_null = with_spectrum(shape, spectrum, dtype)
    o = orthogonalize(g, method)
    exact = method in EXACT or (method == "auto" and dtype == torch.float64)
    is_small = method == "auto" and 40 < min(shape) <= 64
    assert efficiency(g, o) >= (0.9999 if exact else 0.97 if is_small else EFFICIENCY)
    if is_small:
        assert efficiency(g, orthogonalize(g, accuracy=EFFICIENCY)) >= EFFICIENCY
    assert torch.linalg.matrix_norm(o.double(), 2) <= (1.001 if exact else 1.01)  # none overshoots
    if method in ("auto", "svd") and dtype == torch.float64:
        torch.testing.assert_close(o, polar, rtol=0, atol=1e-9)
    for null in (
        o.double().mT @ left_null,
        o.double() @ right_null,
    ):  # nothing moves without a gradient
        assert null.numel() == 0 or null.abs().amax() < (1e-4 if exact else 1e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_one_goes_downhill(method, dtype):
    """At σ = 1 some published coefficient sets turn the step uphill."""
    for m, n in ((30, 70), (70, 30), (64, 4096), (256, 1024)):
        for noise in (0, 1e-3) if method != "cubic" else (0,):
            g = (torch.outer(torch.randn(m), torch.randn(n)) + noise * torch.randn(m, n)).to(dtype)
            o = orthogonalize(g, method)
            assert (g * o).sum() > 0.6 * torch.linalg.matrix_norm(g, "nuc") * (noise == 0)
            assert torch.linalg.matrix_norm(o.double(), 2) < 1.2


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_null_spaces_of_products_stay_null(method, dtype):
    g = torch.randn(256, 2, dtype=dtype) @ torch.randn(2, 1024, dtype=dtype)
    assert torch.linalg.matrix_norm(orthogonalize(g, method)).square().item() == pytest.approx(
        2, rel=1e-4
    )


@pytest.mark.parametrize("method", METHODS)
def test_rank_zero(method):
    for shape in ((3, 5), (5, 3), (0, 4), (2, 0, 4)):
        g = torch.zeros(shape)
        assert torch.equal(orthogonalize(g, method), g)


@pytest.mark.parametrize("method", CONVERGED)
def test_long_matrices(method):
    """Aspect ratio 1:4096."""
    for g in (torch.randn(1, 4096), torch.randn(4096, 1), torch.randn(2, 8192)):
        o = orthogonalize(g, method)
        assert efficiency(g, o) > 0.998
        near = 7e-3 if method == "auto" else 1e-4
        torch.testing.assert_close(
            torch.linalg.svdvals(o), torch.ones(min(g.shape)), rtol=0, atol=near
        )


@pytest.mark.parametrize("method", [name for name in METHODS if name != "float16"])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_batches_transposes_and_scales(method, data):
    m, n = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    g = torch.randn(2, 3, m, n, dtype=torch.float64)
    before, o = g.clone(), orthogonalize(g, method)
    assert torch.equal(g, before)
    torch.testing.assert_close(o[1, 2], orthogonalize(g[1, 2], method), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(o.mT, orthogonalize(g.mT, method), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(o, orthogonalize(1e-200 * g, method), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(o, orthogonalize(1e200 * g, method), rtol=1e-7, atol=1e-8)


def function(sigma, c, weights):
    """What `rational` does to singular values."""
    return sigma * (
        c[0]
        + c[1] * sigma**2
        + sum(w / (sigma**2 + t) for w, t in zip(weights, POLES, strict=False))
    )


@pytest.mark.parametrize(("least", "c", "weights", "lost"), WEIGHTS)
def test_weights_of_the_poles(least, c, weights, lost):
    """Chebyshev: the error of the best weights reaches its bound once more than there are weights.

    And the bound that `_inverse_root` puts on what is lost below the range holds.
    """
    sigma = torch.logspace(math.log10(least), 0, 200_001, dtype=torch.float64)
    error = function(sigma, c, weights) - 1
    assert error.abs().amax() <= _DELTA
    extrema = error[1:-1][(error[1:-1] - error[:-2]).sign() != (error[2:] - error[1:-1]).sign()]
    extrema = torch.cat([error[:1], extrema, error[-1:]])
    extrema = extrema[extrema.abs() > 0.98 * _DELTA]
    assert (extrema[1:] * extrema[:-1] < 0).all()
    assert len(extrema) >= len(weights) + len(c) + 1

    sigma = torch.logspace(-9, 0, 200_001, dtype=torch.float64)
    f = function(sigma, c, weights)
    u, t = POLES[len(weights) - 2 : len(weights)]
    below = t * u / ((sigma**2 + t) * (sigma**2 + u))
    assert (sigma * (1 - _DELTA - f) <= lost * below).all()
    if len(weights) == len(POLES):
        f /= 1 + _DELTA
        assert (sigma <= _NARROWED * f)[f < WEIGHTS[0][0]].all()


@pytest.mark.parametrize("m", [2, 8, 9, 40, 64, 96, 100, 101, 190, 400, 1024, 4096, 8192])
@pytest.mark.parametrize("accuracy", [None, EFFICIENCY])
def test_steps_are_enough_for_every_spectrum(m, accuracy):
    """One singular value of 1 and m of any other size: there the iteration loses most."""
    chosen = plan((m, m), device="cuda", method="float32", accuracy=accuracy)
    sigma = torch.logspace(-9, 0, 100_001, dtype=torch.float64)
    f = sigma
    for a, b, c in POLYNOMIALS[chosen.method][: chosen.steps]:
        f = a * f + b * f**3 + c * f**5
    efficiencies = (f[-1] + m * sigma * f) / (f.amax() * (1 + m * sigma))
    assert efficiencies.amin() >= (0.97 if accuracy is None and 40 < m <= 64 else EFFICIENCY)
    assert f.amax() <= 1.006


@pytest.mark.parametrize("shape", [(200, 200), (200, 700)])
@pytest.mark.parametrize(
    ("spectrum", "factors"),
    [
        (lambda r: torch.ones(r), 2),
        (lambda r: torch.rand(r) + 0.5, 2),
        (lambda r: torch.logspace(0, -2, r), 3),
        (lambda r: torch.logspace(0, -3, r), 4),
        (lambda r: torch.tensor([1.0] + [0.02] * (r - 1)), 4),
        (lambda r: torch.tensor([1.0] + [1e-3] * (r - 1)), 6),
        (lambda r: torch.tensor([1.0] + [1e-4] * (r - 1)), 6),
        (lambda r: torch.tensor([1.0] + [0.0] * (r - 1)), 6),
    ],
)
def test_as_many_poles_as_the_spectrum_needs(shape, spectrum, factors, monkeypatch):
    assert plan(shape).method == "rational"
    g = with_spectrum(shape, spectrum, torch.float32)[0]
    cholesky, calls = torch.linalg.cholesky_ex, []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: calls.append(1) or cholesky(a))
    o = orthogonalize(g)
    assert efficiency(g, o) >= EFFICIENCY
    assert torch.linalg.svdvals(o).amax() < 1.01
    assert len(calls) == factors


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_does_not_depend_on_its_neighbours(method):
    g = torch.randn(4, 20, 70)
    before = orthogonalize(g, method)[1]
    g[0], g[2], g[3] = 0, 1e-30 * g[2], torch.nan
    assert torch.equal(orthogonalize(g, method)[1], before)


@pytest.mark.parametrize("shape", [(40, 50), (200, 200), (1, 9)])
def test_it_is_differentiable(shape):
    g = torch.randn(shape, requires_grad=True)
    orthogonalize(g).sum().backward()
    assert g.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(16, 2048), (64, 768)])
def test_devices_with_rounded_products_iterate_on_the_matrix_itself(shape, monkeypatch):
    """TF32 rounds factors to 10 bits: on the Gram matrix that would be amplified."""
    bmm = torch.bmm
    calls = []
    monkeypatch.setattr(torch, "bmm", lambda *factors: calls.append(1) or bmm(*factors))
    steps = plan(shape, device="cuda", method="float32").steps
    g = torch.randn(shape, device="meta")
    assert orthogonalize(g).shape == g.shape
    assert len(calls) == steps  # a product of X and its transpose in each
    orthogonalize(torch.randn(shape))
    assert len(calls) > 3 * steps


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_other_devices_compile_it_as_one_graph():
    for shape in ((64, 64), (3, 96, 300), (500, 40)):
        compiled = torch.compile(orthogonalize, backend="eager", fullgraph=True)
        assert compiled(torch.randn(shape, device="meta")).shape == shape


def test_plan_counts_the_work_and_chooses_the_least():
    assert plan((0, 5)).work == plan((3, 0, 5)).work == 0
    assert plan((1, 4096)).work < 2e4
    assert plan((512, 512), torch.float64).method == "svd"
    assert plan((512, 512), accuracy=0.999).method == "gram"
    assert plan((512, 512), device="cuda", method="float32").method == "polar_express"
    assert plan((7, 64, 64)).work == 7 * plan((64, 64)).work
    assert plan((64, 300)) == plan((300, 64))
    muon = plan((100, 200), method="muon")
    assert (muon.steps, muon.work) == (5, 5 * (4 * 100**2 * 200 + 2 * 100**3))
    for shape in ((64, 64), (384, 384), (384, 1536), (16, 1024)):
        methods = ("polar_express", "rational", "gram")
        # the iteration converges to 1e-5 when it is asked for by name, in more steps
        assert plan(shape).work <= min(plan(shape, method=name).work for name in methods)


def test_polar_factor_is_the_nearest_semi_orthogonal_matrix():
    """Prop. 4."""
    g = torch.randn(5, 8, dtype=torch.float64)
    best = torch.linalg.matrix_norm(orthogonalize(g) - g)
    for _ in range(300):
        other = torch.linalg.qr(orthogonalize(g).mT + 0.3 * torch.randn(8, 5, dtype=torch.float64))[
            0
        ].mT
        for sign in (1, -1):
            assert torch.linalg.matrix_norm(sign * other - g) >= best


def test_shampoo_without_accumulation():
    """Equations 12 to 16: (GGᵀ)^(-1/4) G (GᵀG)^(-1/4) = U Vᵀ, with pseudo-inverse roots."""

    def root(gram):
        values, q = torch.linalg.eigh(gram)
        inverse = torch.where(values > 1e-9 * values[-1], values.clamp_min(1e-30) ** -0.25, 0)
        return (q * inverse) @ q.mT

    for rank in (1, 3, 5):
        g = torch.randn(5, rank, dtype=torch.float64) @ torch.randn(rank, 7, dtype=torch.float64)
        shampoo = root(g @ g.mT) @ g @ root(g.mT @ g)
        torch.testing.assert_close(orthogonalize(g), shampoo, rtol=0, atol=1e-7)


def test_cubic_iteration_converges_below_the_square_root_of_three():
    """Appendix A: σ = 1.7 converges to 1, σ = 1.74 does not."""
    (a, b, _), steps = POLYNOMIALS["cubic"][0], 60
    for start, converges in ((1.7, True), (1.74, False)):
        x = start
        for _ in range(steps):
            x = min(a * x + b * x**3, 1e6) if x > -1e6 else x
        assert (abs(x - 1) < 1e-6) == converges


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_with_nan_or_infinity_gives_nan(method):
    g = torch.randn(2, 4, 5)
    g[0, 1, 1] = torch.inf
    o = orthogonalize(g, method)
    assert o[0].isnan().all()
    assert o[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    g = torch.randn(12, 20).to(dtype)
    o = orthogonalize(g)
    assert o.dtype == dtype
    assert torch.equal(o, orthogonalize(g.float()).to(dtype))


def test_errors():
    with pytest.raises(ValueError, match=r"Unknown method 'qr'; expected one of auto, float32"):
        orthogonalize(torch.eye(2), "qr")
    with pytest.raises(ValueError, match=r"found a tensor of shape \(3,\)"):
        orthogonalize(torch.ones(3))
    with pytest.raises(ValueError, match="accuracy"):
        orthogonalize(torch.eye(2), accuracy=2.0)
