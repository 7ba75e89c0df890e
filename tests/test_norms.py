"""The laws that make a norm, its dual and its LMO belong together, for every norm there is.

A new norm is one line in NORMS.
"""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hf_normopt import Frobenius, MaxColumn, MaxRow, Norm, Spectral, operator_norm
from hf_normopt.norms.operators import TiedTable, parse_norm
from tests.tolerances import TOLERANCE

NORMS = {
    "rms->rms": operator_norm("rms", "rms"),
    "l2->l2": operator_norm("l2", "l2"),
    "l2->rms": operator_norm("l2", "rms"),
    "rms->l2": operator_norm("rms", "l2"),
    "l1->rms": operator_norm("l1", "rms"),
    "l1->l1": operator_norm("l1", "l1"),
    "l1->l1.5": operator_norm("l1", 1.5),
    "l1->l2": operator_norm("l1", "l2"),
    "l1->l7": operator_norm("l1", 7),
    "l1->linf": operator_norm("l1", "linf"),
    "tied rms->linf": TiedTable(),
    "rms->linf": operator_norm("rms", "linf"),
    "l1.1->linf": operator_norm(1.1, "linf"),
    "l2->linf": operator_norm("l2", "linf"),
    "l4->linf": operator_norm(4, "linf"),
    "linf->linf": operator_norm("linf", "linf"),
    "frobenius": Frobenius(),
}
DTYPES = list(TOLERANCE)

every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@st.composite
def operators(draw, batch=True):
    """Gradients of all shapes, ranks and sizes, with zero rows and columns."""
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rank = draw(st.integers(0, min(m, n)))
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2)])) if batch else ()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    spectrum = torch.logspace(
        0, -draw(st.sampled_from([0, 1, 3])), max(rank, 1), dtype=torch.float64
    )
    g = (rand(*lead, m, rank) * spectrum[:rank]) @ rand(*lead, rank, n)
    if draw(st.booleans()):
        g[..., draw(st.integers(0, m - 1)), :] = 0
    if draw(st.booleans()):
        g[..., :, draw(st.integers(0, n - 1))] = 0
    return g * 10.0 ** draw(st.sampled_from([-30, -4, 0, 4, 30]))


def inner(a, b):
    return (a.double() * b.double()).sum((-2, -1))


def close(a, b, dtype, factor=1.0, least=0.0):
    tolerance = max(factor * TOLERANCE[dtype].relative, least)
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=1e-300)


@every_norm
@given(g=operators())
@settings(max_examples=60, deadline=None)
def test_lmo_has_norm_one_and_attains_the_dual_norm(norm: Norm, g):
    """Prop. 1: ‖lmo(G)‖ = 1 and ⟨G, lmo(G)⟩ = ‖G‖†, the dual norm by its own closed form."""
    t, zero = norm.lmo(g), (g == 0).all(-1).all(-1)
    close(norm.norm(t), (~zero).double(), torch.float64, factor=1e3)
    close(inner(g, t), norm.dual_norm(g), torch.float64, factor=1e3)


@every_norm
@every_dtype
def test_laws_hold_in_every_dtype(norm: Norm, dtype):
    g = torch.randn(3, 12, 20).to(dtype)
    t = norm.lmo(g)
    assert t.dtype == dtype
    least = 6e-3 if isinstance(norm, Spectral) else 0.0  # its method's accuracy
    close(norm.norm(t), torch.ones(3), dtype, least=least)
    close(inner(g, t), norm.dual_norm(g), dtype, least=least)


@every_norm
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_hoelder(norm: Norm, data):
    """⟨G, T⟩ <= ‖G‖† ‖T‖ for any pair."""
    g = data.draw(operators(batch=False))
    t = torch.randn(g.shape, dtype=g.dtype)
    bound = norm.dual_norm(g) * norm.norm(t)
    assert inner(g, t).abs() <= bound * (1 + 1e-9) + 1e-300


@every_norm
def test_no_direction_beats_the_lmo(norm: Norm):
    """Among sampled directions of norm one, near the LMO and far from it, none gains more."""
    g = torch.randn(6, 9, dtype=torch.float64)
    best = norm.lmo(g)
    for scale in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        t = best + scale * best.abs().amax() * torch.randn(5000, 6, 9, dtype=torch.float64)
        t = t / norm.norm(t)[:, None, None]
        assert (inner(g.expand_as(t), t) <= inner(g, best) * (1 + 1e-12)).all()


@every_norm
def test_norm_is_a_norm(norm: Norm):
    a, b = torch.randn(2, 7, 5, dtype=torch.float64)
    close(norm.norm(-3 * a), 3 * norm.norm(a), torch.float64)
    assert norm.norm(a + b) <= norm.norm(a) + norm.norm(b)
    assert norm.norm(torch.zeros(7, 5)) == 0


INDUCED = {
    name: norm
    for name, norm in NORMS.items()
    if norm.input is not None and not isinstance(norm, TiedTable)
}


def test_a_tied_table_has_the_larger_norm_of_its_two_uses():
    w = torch.randn(5, 40, dtype=torch.float64)  # width, tokens
    uses = operator_norm("l1", "rms").norm(w), operator_norm("rms", "linf").norm(w.mT)
    close(TiedTable().norm(w), max(uses), torch.float64)
    close(TiedTable().lmo(w), operator_norm("rms", "linf").lmo(w.mT).mT, torch.float64)


@pytest.mark.parametrize("norm", INDUCED.values(), ids=INDUCED.keys())
def test_norm_is_the_operator_norm_of_definition_1(norm: Norm):
    """‖W‖ = max_x ‖W x‖_β / ‖x‖_α: never exceeded by a sample, and nearly reached by ascent."""
    w = torch.randn(5, 4, dtype=torch.float64)
    measure = {"rms": lambda x: torch.linalg.vector_norm(x, dim=0) / math.sqrt(x.shape[0])}

    def length(x, vector):
        exponent = (
            math.inf
            if vector == "linf"
            else float(str(vector).removeprefix("l") if vector != "rms" else 2)
        )
        return measure.get(vector, lambda x: torch.linalg.vector_norm(x, exponent, dim=0))(x)

    x = torch.cat(
        [torch.randn(4, 20000, dtype=torch.float64), torch.eye(4, dtype=torch.float64)], 1
    )
    x = torch.cat([x, x.sign()], 1)
    for _ in range(60):  # random ascent
        gain = length(w @ x, norm.output) / length(x, norm.input)
        assert (gain <= norm.norm(w) * (1 + 1e-9)).all()
        top = x[:, gain.topk(50).indices]
        top = top / length(top, norm.input)
        noise = (
            torch.randn(4, 50 * 40, dtype=torch.float64)
            * 0.1
            * torch.rand(50 * 40, dtype=torch.float64) ** 3
        )
        x = torch.cat([top, top.repeat(1, 40) + noise], 1)
    assert gain.amax() >= norm.norm(w) * (1 - 1e-3)


@pytest.mark.parametrize("norm", INDUCED.values(), ids=INDUCED.keys())
def test_weight_is_the_least_that_bounds_a_convolution_as_a_map_from_patches(norm: Norm):
    """‖[W_1 ... W_T]‖ <= weight · max_t ‖W_t‖, attained; by every kernel where inputs are l1."""
    taps = torch.randn(6, 5, 4, dtype=torch.float64)
    alike = taps[:1].expand(6, 5, 4)

    def of_patches(taps):
        return norm.norm(taps.movedim(0, -2).flatten(-2))

    bound = norm.weight(6) * norm.norm(taps).amax()
    assert of_patches(taps) <= bound * (1 + 1e-9)
    close(of_patches(alike), norm.weight(6) * norm.norm(taps[0]), torch.float64)
    if norm.input == "l1":
        close(of_patches(taps), bound, torch.float64)
    assert norm.weight(1) == 1


@every_norm
def test_arguments_are_never_changed(norm: Norm):
    for dtype in DTYPES:
        g = torch.randn(4, 6).to(dtype)
        before = g.clone()
        norm.lmo(g), norm.norm(g), norm.dual_norm(g)
        assert torch.equal(g, before)
        assert norm.lmo(g).data_ptr() != g.data_ptr()


@every_norm
def test_a_batch_is_a_loop(norm: Norm):
    g = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for function in (norm.norm, norm.lmo, norm.dual_norm):
        batch = function(g)
        for i in range(2):
            for j in range(3):
                close(batch[i, j], function(g[i, j]), torch.float64)


@every_norm
def test_lmo_ignores_the_scale_of_the_gradient(norm: Norm):
    for shape in ((5, 8), (8, 5), (1, 6), (6, 1), (1, 1)):
        g = torch.randn(shape)
        for c in (1e-35, 1e-10, 3.0, 1e10, 1e35):
            torch.testing.assert_close(norm.lmo(c * g), norm.lmo(g), rtol=1e-4, atol=1e-5)


@every_norm
@every_dtype
def test_zero_gives_zero(norm: Norm, dtype):
    assert torch.equal(
        norm.lmo(torch.zeros(2, 3, 4, dtype=dtype)), torch.zeros(2, 3, 4, dtype=dtype)
    )
    g = torch.randn(5, 5).to(dtype)
    g[1], g[:, 3] = 0, 0
    t = norm.lmo(g)
    assert t.isfinite().all()
    assert (t[1] == 0).all() or norm.norm(t) <= 1.02
    if not isinstance(norm, (MaxColumn,)):
        assert t[1].abs().amax() < 1e-4
    if not isinstance(norm, (MaxRow,)):
        assert t[:, 3].abs().amax() < 1e-4


@every_norm
def test_nan_is_not_hidden(norm: Norm):
    g = torch.randn(4, 4)
    g[2, 1] = torch.nan
    assert norm.lmo(g).isnan().any()
    assert norm.norm(g).isnan()
    assert norm.dual_norm(g).isnan()


@every_norm
def test_nothing_under_or_overflows(norm: Norm):
    for size in (1e-30, 1e25):
        g = size * torch.randn(6, 5)
        close(inner(g, norm.lmo(g)), norm.dual_norm(g), torch.float32)
        close(norm.norm(g) / size, norm.norm(g / size), torch.float32)


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


def permutation(n):
    return (
        torch.eye(n, dtype=torch.float64)[torch.randperm(n)]
        * torch.randn(n, dtype=torch.float64).sign()
    )


SYMMETRIES = {  # (left, right) transformations that leave the norm as it is
    "rms->rms": (orthogonal, orthogonal),
    "l2->l2": (orthogonal, orthogonal),
    "l1->rms": (orthogonal, permutation),
    "l1->l1.5": (permutation, permutation),
    "l1->linf": (permutation, permutation),
    "rms->linf": (permutation, orthogonal),
    "l4->linf": (permutation, permutation),
    "frobenius": (orthogonal, orthogonal),
}


@pytest.mark.parametrize("name", SYMMETRIES)
def test_equivariance(name):
    """lmo(P G Q) = P lmo(G) Q for the isometries of the norm."""
    norm, (left, right) = NORMS[name], SYMMETRIES[name]
    g, p, q = torch.randn(6, 4, dtype=torch.float64), left(6), right(4)
    torch.testing.assert_close(norm.lmo(p @ g @ q), p @ norm.lmo(g) @ q, rtol=1e-9, atol=1e-9)
    close(norm.dual_norm(p @ g @ q), norm.dual_norm(g), torch.float64)


@every_norm
def test_entry_rms_is_the_rms_of_the_lmo(norm: Norm):
    """On gradients of full rank with entries ±1, which have one magnitude."""
    for fan_out, fan_in in ((64, 64), (64, 16), (16, 64)):
        g = torch.randn(fan_out, fan_in, dtype=torch.float64).sign()
        rms = norm.lmo(g).square().mean().sqrt().item()
        assert rms == pytest.approx(norm.entry_rms(fan_out, fan_in), rel=1e-6)


STATISTICS = {
    name: NORMS[name]
    for name in ("l1->rms", "l1->l2", "l1->linf", "rms->linf", "l2->linf", "frobenius")
}


@pytest.mark.parametrize("norm", STATISTICS.values(), ids=STATISTICS.keys())
def test_the_statistic_of_one_gradient_gives_the_lmo(norm: Norm):
    """The paper's relation: an optimizer with its moving averages off is the LMO of its norm."""
    g = torch.randn(2, 5, 7, dtype=torch.float64)
    g[0, 1], g[0, :, 2] = 0, 0
    close(norm.precondition(g, norm.moments(g), eps=0.0), norm.lmo(g), torch.float64)


def test_operator_norm_refuses_pairs_without_a_closed_form():
    with pytest.raises(ValueError, match=r"'l2' -> 'l1' has no closed form.*l1 -> any p"):
        operator_norm("l2", "l1")
    with pytest.raises(ValueError, match=r"Unknown vector norm 'l0'"):
        operator_norm("l0", "linf")
    with pytest.raises(ValueError, match=r"Unknown vector norm 0.5"):
        operator_norm(0.5, "linf")


def test_a_class_refuses_the_pairs_of_another():
    for wrong in (
        lambda: MaxColumn(input="rms"),
        lambda: MaxRow(output="rms"),
        lambda: MaxColumn(output="xyz"),
        lambda: Spectral(input="l1", output="linf"),
    ):
        with pytest.raises(ValueError, match=r"is the pair of|Unknown vector norm|no closed form"):
            wrong()


@every_norm
def test_text_of_a_norm_reads_back(norm: Norm):
    assert str(parse_norm(str(norm))) == str(norm)
    g = torch.randn(3, 5)
    torch.testing.assert_close(parse_norm(str(norm)).lmo(g), norm.lmo(g))


def test_rms_is_l2_in_another_unit():
    """The Epilogue: ‖W‖_rms→rms = √(fan_in / fan_out) ‖W‖_2→2, and so on."""
    w = torch.randn(8, 18, dtype=torch.float64)
    close(NORMS["rms->rms"].norm(w), math.sqrt(18 / 8) * torch.linalg.svdvals(w)[0], torch.float64)
    close(NORMS["l1->rms"].norm(w), w.norm(dim=0).amax() / math.sqrt(8), torch.float64)
    close(NORMS["rms->linf"].norm(w), w.norm(dim=1).amax() * math.sqrt(18), torch.float64)
