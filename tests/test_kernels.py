"""Another package's kernels: used after a test on the device, and replaced where they fail it."""

import logging
import sys
from types import ModuleType

import pytest
import torch

from hf_normopt import create_normopt_optimizer, orthogonalize
from hf_normopt.norms import kernels
from hf_normopt.norms.orthogonalize import POLYNOMIALS
from tests.test_optimizer import llama


class Iteration:
    """Has the package's arguments; iterates in float32."""

    def __init__(
        self,
        ns_coefficients,
        ns_use_kernels,
        gram_newton_schulz_reset_iterations,
        compile_kwargs,
    ):
        assert not ns_use_kernels  # on CPUs
        assert compile_kwargs is None
        assert gram_newton_schulz_reset_iterations[0] == kernels.RESTART
        self.polynomials = ns_coefficients
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        for a, b, c in self.polynomials:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x


class NotANumber(Iteration):
    def __call__(self, x):
        return x * torch.nan


class Overshoots(Iteration):
    def __call__(self, x):
        return 1.05 * super().__call__(x)


class DoesNothing(Iteration):
    def __call__(self, x):
        return x


class UnknownDevice(Iteration):
    def __init__(self, **options):
        raise RuntimeError("no kernel image is available")


@pytest.fixture
def install(monkeypatch):
    kernels.gram_newton_schulz.cache_clear()

    def installed(iteration):
        package = ModuleType("gram_newton_schulz") if iteration else None
        if iteration:
            package.GramNewtonSchulz = iteration
        monkeypatch.setitem(sys.modules, "gram_newton_schulz", package)

    yield installed
    kernels.gram_newton_schulz.cache_clear()


def test_what_passes_the_test_is_used(install, caplog):
    install(Iteration)
    g = torch.randn(3, 20, 12)
    found = orthogonalize(g, "gram_newton_schulz")
    assert not caplog.messages
    torch.testing.assert_close(found, orthogonalize(g, "svd"), rtol=0, atol=0.01)
    used = kernels.gram_newton_schulz(POLYNOMIALS["polar_express"][:6], g.device)
    assert used.calls == 3 + 1  # the three matrices of the test, and g


@pytest.mark.parametrize(
    ("iteration", "complaint"),
    [
        (NotANumber, "give NaN"),
        (Overshoots, "a singular value of 1.05"),
        (DoesNothing, "an efficiency of 0."),
        (UnknownDevice, "RuntimeError: no kernel image"),
        (None, "ModuleNotFoundError"),
    ],
)
def test_what_fails_it_is_replaced_and_told_once(install, caplog, iteration, complaint):
    install(iteration)
    g = torch.randn(20, 12)
    for _ in range(2):
        found = orthogonalize(g, "gram_newton_schulz")
    torch.testing.assert_close(found, orthogonalize(g, "svd"), rtol=0, atol=0.01)
    (message,) = caplog.messages
    assert complaint in message
    assert "hf_normopt[kernels]" in message


def test_a_model_may_ask_for_it(install, caplog):
    install(Iteration)
    model = llama()
    optimizer = create_normopt_optimizer(model, lr=1e-2, norm_linear="rms->rms(gram_newton_schulz)")
    ids = torch.randint(64, (2, 8))
    model(ids, labels=ids).loss.backward()
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert not caplog.messages
    assert "rms->rms (gram_newton_schulz)" in str(optimizer)
