"""Polar factors by products in 16 bits, as GPUs find them; here the products are emulated."""

import importlib
import logging
import math
import sys
from types import ModuleType

import pytest
import torch

from hf_normopt import orthogonalize
from hf_normopt.norms import half, kernels
from hf_normopt.norms.half import DEVICES, NAMES, NULL, Products, device_of
from hf_normopt.norms.orthogonalize import EFFICIENCY, POLYNOMIALS, plan
from recipes.measure_16_bits import Rounded, measured, polar, spectra, with_spectrum

LARGEST = 1.02
SIX = POLYNOMIALS["polar_express"][:6]
SHAPES = [(64, 64), (64, 200), (96, 100), (130, 520)]
SPECTRA = list(spectra(64))
ARITHMETICS = {"float16": Rounded(), "split sums": Rounded(parts=3), "torch": Products()}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def check(x, s, u, v, o):
    efficiency, largest, null = measured(x, s, u, v, o)
    assert efficiency >= EFFICIENCY
    assert largest <= LARGEST
    assert null <= NULL


@pytest.mark.parametrize("by", ARITHMETICS.values(), ids=ARITHMETICS)
@pytest.mark.parametrize("spectrum", range(len(SPECTRA)), ids=SPECTRA)
def test_promise_on_every_spectrum(spectrum, by):
    shapes = SHAPES[:2] if type(by) is Products else SHAPES  # float16 on a CPU takes long
    for m, n in shapes:
        s = list(spectra(m).values())[spectrum]
        x, u, v = with_spectrum(m, n, s)
        check(x, s, u, v, polar(x, by))


@pytest.mark.parametrize("spectrum", ["geometric", "rank 32"])
def test_promise_for_a_large_matrix(spectrum):
    s = spectra(512)[spectrum]
    x, u, v = with_spectrum(512, 1024, s)
    check(x, s, u, v, polar(x, Rounded()))


def test_both_ways_to_iterate_are_tested():
    assert {half.segment(m, n) for m, n in SHAPES} == {1, half.RESTART}


def test_bfloat16_would_fill_a_null_space():
    """That is why it is float16."""
    s = spectra(128)["rank 4"]
    x, u, v = with_spectrum(128, 128, s)
    assert measured(x, s, u, v, polar(x, Rounded(torch.bfloat16)))[2] > 2 * NULL


def test_nothing_goes_uphill():
    for m, n in SHAPES:
        for noise in (0, 1e-6, 1e-3, 0.1, 10):
            x = torch.outer(torch.randn(m), torch.randn(n)) / math.sqrt(m * n)
            x = x + noise * torch.randn(m, n) * 10 ** (-3 * torch.rand(m, 1))
            assert (x * polar(x, Rounded())).sum() > 0
        axis = torch.zeros(m, n)
        axis[3, 5] = -2.0
        o = polar(axis, Rounded())
        assert o[3, 5] == pytest.approx(-1, abs=0.01)
        assert torch.linalg.matrix_norm(o, 2) < LARGEST


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 1e37])
def test_scale_does_not_matter(scale):
    x = torch.randn(64, 200)
    expected, found = polar(x, Rounded()), polar(scale * x, Rounded())
    if scale > 1e-40:  # below, a float32 has few digits left
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    assert torch.linalg.matrix_norm(found, 2) < LARGEST


@pytest.mark.parametrize("shape", [(2, 3, 64, 130), (2, 130, 64), (64, 64)])
def test_batches_transposes_and_neighbours(shape):
    g = torch.randn(shape)
    before, o = g.clone(), orthogonalize(g, "float16")
    assert torch.equal(g, before)
    assert o.shape == g.shape
    bound = torch.linalg.matrix_norm(o, 2) * torch.linalg.matrix_norm(g, "nuc")
    assert ((g * o).sum((-2, -1)) / bound).amin() >= EFFICIENCY
    if g.ndim > 2:
        g[1:] = 0
        g[1:, ..., 1, 1] = torch.nan
        again = orthogonalize(g, "float16")
        torch.testing.assert_close(again[0], o[0], rtol=0, atol=1e-5)
        assert again[1].isnan().all()
    assert orthogonalize(torch.zeros(shape), "float16").eq(0).all()


@pytest.mark.parametrize("m", [64, 100, 256, 1024, 4096, 4097, 8192, 16384])
def test_bound_and_steps_are_enough(m):
    """k singular values of 1 and the rest at d >= 1e-3: there the iteration loses most."""
    polynomials = POLYNOMIALS["polar_express"][: half.steps_of(m)]
    ks = torch.logspace(0, math.log10(m - 1), 40, dtype=torch.float64).floor()[:, None]
    d = torch.logspace(-3, 0, 60, dtype=torch.float64)
    squares, eighths = (ks + (m - ks) * d**p for p in (2, 8))
    largest = eighths**0.125
    bound = torch.maximum(largest, torch.minimum(squares.sqrt(), 60 * squares / (m * largest)))
    f = torch.stack([1 / bound, d / bound])
    for a, b, c in polynomials:
        f = a * f + b * f**3 + c * f**5
    efficiency = (ks * f[0] + (m - ks) * d * f[1]) / (f.amax(0) * (ks + (m - ks) * d))
    assert efficiency.amin() >= EFFICIENCY
    assert f.amax() < 1.006


def test_bound_is_what_theory_says():
    """(Σ σ⁸)^(1/8) for one large singular value, ‖X‖_F for equal ones, between them 60 ‖X‖_F²."""
    for s, expected in (
        (torch.tensor([1.0] + [1e-3] * 99), 1.0),
        (torch.ones(100), 10.0),
        (torch.tensor([1.0] * 2 + [0.0] * 98), 1.2 / 2**0.125),
    ):
        x = with_spectrum(100, 120, s)[0]
        by, length = Rounded(), x.norm()
        scaled = by.rounded(half.SIZE * x / length)[None]
        bound = half._bound(by.product(scaled, scaled.mT), by) * length
        assert bound.item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("m", "n"), [(64, 64), (64, 200)])
def test_work_is_what_is_multiplied(m, n):
    class Counted(Rounded):
        work = 0

        def added(self, c, a, b, beta, alpha, symmetric=False):
            self.work += 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
            return super().added(c, a, b, beta, alpha)

    by = Counted()
    polar(torch.randn(m, n), by)
    assert by.work - 2 * m**3 == half.work(m, n)  # but for the square in the bound
    assert plan((3, m, n), device="h100").work == 3 * half.work(m, n)


def test_products_said_to_be_symmetric_are():
    class Checked(Rounded):
        seen = 0

        def added(self, c, a, b, beta, alpha, symmetric=False):
            found = super().added(c, a, b, beta, alpha)
            if symmetric:
                self.seen += 1
                length = torch.linalg.matrix_norm(found)
                assert torch.linalg.matrix_norm(found - found.mT) <= 5e-3 * length
            return found

        def product(self, a, b, symmetric=False):
            return self.added(torch.zeros(()), a, b, 0.0, 1.0, symmetric)

    for m, n in SHAPES:
        by = Checked()
        polar(with_spectrum(m, n, spectra(m)["geometric"])[0], by)
        assert by.seen


def test_which_devices_take_it():
    for name in [*NAMES, *(key for key in DEVICES if key == "xpu")]:
        assert plan((256, 512), device=name).method == "float16", name
        assert plan((32, 512), device=name).method != "float16"
    for name in ("cpu", "meta", "mps"):
        assert device_of(name) is None
        assert plan((256, 512), device=name).method != "float16"
    for options in ({"accuracy": 0.98}, {"method": "float32"}, {"dtype": torch.float64}):
        assert plan((256, 512), device="a100", **options).method in ("polar_express", "svd")
    assert plan((256, 512), device="cpu", method="float32") == plan((256, 512), device="cpu")


@pytest.mark.parametrize(
    ("capability", "key"),
    [((6, 1), None), ((7, 0), "7.0"), ((8, 7), "8.6"), ((10, 3), "10.0"), ((13, 0), "12.0")],
)
def test_devices_newer_than_the_table(capability, key, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert device_of.__wrapped__("cuda:7") == DEVICES.get(key)


def kernel(a, b, C=None, alpha=1.0, beta=1.0):  # noqa: N803 (quack's)
    """What quack's computes: one half, and its mirror image."""
    found = Products().product(a, b) if C is None else Products().added(C, a, b, beta, alpha)
    return found.tril() + found.tril(-1).mT


KERNELS = {
    "NaN": (lambda *a, **k: kernel(*a, **k) * torch.nan, "give NaN"),
    "wrong": (lambda a, b, **k: kernel(a, b), "give "),
    "other arguments": (lambda a, b: kernel(a, b), "TypeError"),
    "a pair": (lambda *a, **k: (None, kernel(*a, **k)), "Error"),
}


@pytest.fixture
def install(monkeypatch):
    def installed(kernel):
        module = ModuleType("quack.gemm_interface")
        module.gemm_symmetric = kernel
        monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
        monkeypatch.setitem(sys.modules, "quack.gemm_interface", module)
        monkeypatch.setattr(kernels, "SHAPE", (64, 96))

    return installed


def test_a_kernel_that_passes_the_test_is_used(install, caplog):
    install(kernel)
    by = kernels.symmetric_products(torch.device("cpu"), SIX)
    assert isinstance(by, kernels.SymmetricProducts)
    assert not caplog.messages
    s = spectra(64)["geometric"]
    x, u, v = with_spectrum(64, 200, s)
    check(x, s, u, v, polar(x, by))


@pytest.mark.parametrize(("wrong", "complaint"), KERNELS.values(), ids=KERNELS)
def test_a_kernel_that_fails_it_is_not_and_a_warning_says_why(install, caplog, wrong, complaint):
    install(wrong)
    with caplog.at_level(logging.WARNING):
        by = kernels.symmetric_products(torch.device("cpu"), SIX)
    assert type(by) is Products
    (message,) = caplog.messages
    assert complaint in message


def test_without_the_package_nothing_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "quack", None)
    assert type(kernels.symmetric_products(torch.device("cpu"), SIX)) is Products
    assert type(kernels.products_on(torch.device("cpu"), SIX)) is Products
    assert not caplog.messages


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_devices_wait_for_nothing_and_compile_it_as_one_graph(monkeypatch):
    """Tensors on meta have no values: whoever asked for one would fail."""
    module = importlib.import_module("hf_normopt.norms.orthogonalize")
    monkeypatch.setattr(module, "device_of", lambda device: DEVICES["9.0"])
    plan.cache_clear()
    compiled = torch.compile(orthogonalize, backend="eager", fullgraph=True)
    for shape in ((3, 96, 300), (500, 80), (128, 128)):
        assert plan(shape, device="meta").method == "float16"
        assert orthogonalize(torch.randn(shape, device="meta")).shape == shape
        assert compiled(torch.randn(shape, device="meta")).shape == shape
    plan.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(256, 256), (512, 2048), (1024, 1024)])
def test_promise_on_a_real_device(shape):
    for s in spectra(min(shape)).values():
        x, u, v = with_spectrum(*shape, s)
        g = x.cuda()
        check(x, s, u, v, orthogonalize(g, "float16").cpu())
