import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from hf_normopt import Layout, operator_norm
from hf_normopt.norms.layouts import usual_layout

SPECTRAL = operator_norm("rms", "rms")

LAYOUTS = {  # pattern: (stored shape, shapes of the operators)
    "out in": ((3, 5), [(3, 5)]),
    "in out": ((3, 5), [(5, 3)]),
    "in (part=3 out)": ((4, 15), [(3, 5, 4)]),
    "(part=3 out) in": ((15, 4), [(3, 5, 4)]),
    "(out=6+2+2) in": ((10, 4), [(6, 4), (2, 4), (2, 4)]),
    "in (out=6+2+2)": ((4, 10), [(6, 4), (2, 4), (2, 4)]),
    "(out0=2 part=3 out) in": ((24, 5), [(3, 8, 5)]),  # interleaved per head (GPT-NeoX)
    "(out0=2 out=6+2+2) in": ((20, 5), [(12, 5), (4, 5), (4, 5)]),  # grouped (Falcon)
    "expert (part=2 out) in": ((4, 6, 5), [(4, 2, 3, 5)]),
    "expert in (out part=2)": ((4, 6, 10), [(4, 2, 5, 6)]),  # gate and up interleaved
    "(head=2 out) in": ((6, 5), [(2, 3, 5)]),
    "out (head=2 in)": ((5, 6), [(2, 5, 3)]),
    "(head0=2 head1=4+1+1 out=3) in": ((36, 5), [(2, 4, 3, 5), (2, 1, 3, 5), (2, 1, 3, 5)]),
    "(out0=2 out1=4+3) in": ((14, 5), [(8, 5), (6, 5)]),  # k and v of a latent, per head
    "(expert=2 in) out": ((6, 5), [(2, 5, 3)]),  # flattened experts (DBRX)
    "in out0 out1": ((5, 2, 3), [(6, 5)]),
    "out in tap=3 tap=2": ((4, 5, 3, 2), [(3, 2, 4, 5)]),
    "(group=2 out) in tap=3": ((6, 2, 3), [(2, 3, 3, 2)]),
    "(group=2 in) out tap=3": ((6, 2, 3), [(2, 3, 2, 3)]),
    "in0 in1 out": ((1, 7, 4), [(4, 7)]),
    "out": ((6,), [(6, 1)]),
    "(part=3 out)": ((6,), [(3, 2, 1)]),
    "out0 out1": ((2, 3), [(6, 1)]),
    "": ((), [(1, 1)]),
}


@pytest.mark.parametrize("pattern", LAYOUTS)
def test_views_are_inverse_bit_for_bit(pattern):
    shape, operators = LAYOUTS[pattern]
    layout, stored = Layout(pattern), torch.randn(shape)
    pieces = layout.to_operators(stored)
    assert [tuple(piece.shape) for piece in pieces] == operators
    assert torch.equal(layout.from_operators(pieces, shape), stored)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_random_layouts_are_inverse(data):
    """Any nesting of named axes, with and without a split."""
    names = iter([f"{k}{i}" for i in range(9) for k in ("out", "in", "part")])
    words, shape, split = [], [], False
    for _ in range(data.draw(st.integers(1, 4))):
        axes, size = [], 1
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(["out", "in", "expert", "head"])) + next(names)[-1]
            pieces = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=1 if split else 3))
            split |= len(pieces) > 1
            axes.append(f"{name}={'+'.join(map(str, pieces))}")
            size *= sum(pieces)
        words.append(f"({' '.join(axes)})")
        shape.append(size)
    layout, stored = Layout(" ".join(words)), torch.arange(torch.Size(shape).numel()).reshape(shape)
    assert torch.equal(layout.from_operators(layout.to_operators(stored), tuple(shape)), stored)


def lmo(layout, stored):
    pieces = tuple(SPECTRAL.lmo(piece) for piece in layout.to_operators(stored))
    return layout.from_operators(pieces, tuple(stored.shape))


def test_lmo_through_a_layout_is_the_lmo_of_the_separate_matrices():
    q, k, v = torch.randn(8, 6), torch.randn(4, 6), torch.randn(4, 6)
    separate = [SPECTRAL.lmo(x) for x in (q, k, v)]
    fused = lmo(Layout("(out=8+4+4) in"), torch.cat([q, k, v]))
    torch.testing.assert_close(fused, torch.cat(separate))
    conv1d = lmo(Layout("in (out=8+4+4)"), torch.cat([q, k, v]).T)
    torch.testing.assert_close(conv1d, torch.cat(separate).T)


def test_operators_of_a_convolution_compute_it():
    """A grouped convolution is, tap by tap and group by group, its operators."""
    conv = nn.Conv1d(6, 9, kernel_size=3, groups=3, bias=False)
    (taps,) = Layout("(group=3 out) in tap=3").to_operators(conv.weight)  # (group, tap, out, in)
    x = torch.randn(1, 6, 10)
    groups = x[0].reshape(3, 2, 10)
    y = sum(taps[:, t] @ groups[:, :, t : t + 8] for t in range(3))
    torch.testing.assert_close(y.reshape(1, 9, 8), conv(x))


def test_operators_of_a_transposed_convolution_compute_it():
    conv = nn.ConvTranspose1d(6, 9, kernel_size=1, groups=3, bias=False)
    (taps,) = Layout("(group=3 in) out tap=1").to_operators(conv.weight)
    x = torch.randn(1, 6, 10)
    y = taps[:, 0] @ x[0].reshape(3, 2, 10)
    torch.testing.assert_close(y.reshape(1, 9, 10), conv(x))


def test_taps():
    assert Layout("out in tap=3 tap=2").taps == 6
    assert Layout("expert out in").taps == 1


def test_plain_layouts_are_views():
    for pattern in ("out in", "in out", "expert out in", "(part=3 out) in", "out in tap=3"):
        stored = torch.randn(LAYOUTS.get(pattern, ((2, 3, 3), []))[0])
        assert all(piece._base is stored for piece in Layout(pattern).to_operators(stored))


@pytest.mark.parametrize(
    ("role", "shape", "pattern"),
    [
        ("linear", (3, 4), "out in"),
        ("linear", (2, 3, 4), "stack out in"),
        ("head", (4,), "out"),
        ("embedding", (5, 4), "in out"),
        ("embedding", (4,), "out"),
        ("conv", (4, 3, 5, 5), "out in tap=5 tap=5"),
        ("bias", (4,), "out"),
        ("bias", (2, 4), "out0 out1"),
        ("other", (2, 3, 4), "out0 out1 out2"),
        ("scalar", (), ""),
    ],
)
def test_usual_layouts(role, shape, pattern):
    assert str(usual_layout(role, shape)) == pattern


def test_errors():
    with pytest.raises(ValueError, match=r"describes 2 stored axes, the tensor has shape \(3,\)"):
        Layout("out in").to_operators(torch.ones(3))
    with pytest.raises(ValueError, match="does not divide"):
        Layout("(part=3 out) in").to_operators(torch.ones(4, 2))
    with pytest.raises(ValueError, match="cannot read 'Out'"):
        Layout("Out in")
    for pattern in ("(out in", "out)) in", "out(in)"):
        with pytest.raises(ValueError, match="in pairs"):
            Layout(pattern)
    with pytest.raises(ValueError, match="a tap axis needs its size"):
        Layout("out in tap")
    with pytest.raises(ValueError, match="may leave one size open"):
        Layout("(part out) in")
    with pytest.raises(ValueError, match="one axis at the most"):
        Layout("(out=1+2) (in=1+2)")
