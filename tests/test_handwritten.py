"""Models that are in no release: their roles and layouts come from what their `forward` does."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_normopt import classify


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wq = nn.Parameter(torch.randn(width, width))
        self.wo = nn.Parameter(torch.randn(width, width))
        self.ls = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        h = self.norm(x)
        return x + self.ls * F.linear(torch.tanh(h @ self.wq + self.shift), self.wo)


class HeadFirst(nn.Module):
    """The head is defined first and used last; a raw class token and positions."""

    def __init__(self, width=8, tokens=5, classes=3):
        super().__init__()
        self.output = nn.Linear(width, classes)
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.where = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.where
        for block in self.blocks:
            x = block(x)
        return self.output(x[:, 0])


class TiedByHand(nn.Module):
    """Token scores by the table's own transpose: a tie that no attribute shows."""

    def __init__(self, vocabulary=11, width=8):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)

    def forward(self, ids):
        return F.linear(torch.relu(self.mix(self.table(ids))), self.table.weight)


class Experts(nn.Module):
    def __init__(self, experts=4, width=8, inner=6):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(experts, width))
        self.up = nn.Parameter(torch.randn(experts, width, inner))
        self.down = nn.Parameter(torch.randn(experts, width, inner))

    def forward(self, x):
        weights = F.linear(x, self.gate).softmax(-1)
        h = torch.einsum("bd,edh->beh", x, self.up).relu()
        return torch.einsum("beh,edh,be->bd", h, self.down, weights)


class Several(nn.Module):
    """Heads by name, one of them with two layers; a recurrent trunk."""

    def __init__(self, width=8):
        super().__init__()
        self.words = nn.Embedding(11, width)
        self.cell = nn.LSTM(width, width, batch_first=True)
        self.tasks = nn.ModuleDict(
            {
                "topic": nn.Linear(width, 3),
                "tone": nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 2)),
            }
        )

    def forward(self, ids):
        states, _ = self.cell(self.words(ids))
        return {name: head(states[:, -1]) for name, head in self.tasks.items()}


class Boxes(nn.Module):
    """A multi-layer head in a loop, and queries."""

    def __init__(self, width=8):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        sizes = [width, width, width, 4]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, features):
        queries = self.queries.unsqueeze(0).expand(len(features), -1, -1)
        x = self.norm(self.attention(queries, features, features)[0])
        for i, layer in enumerate(self.layers):
            x = layer(x).relu() if i + 1 < len(self.layers) else layer(x)
        return x.sigmoid()


class Generator(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.ConvTranspose2d(8, 6, 4, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 3, 4, 2, 1),
            nn.Tanh(),
        )


class Relative(nn.Module):
    """A table of biases that is indexed, stored transposed; a temperature; a skip of the state."""

    def __init__(self, heads=2, width=8):
        super().__init__()
        self.biases = nn.Parameter(torch.zeros(heads, 9))
        self.register_buffer("index", torch.zeros(3, 3, dtype=torch.long))
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2)).unsqueeze(1) * self.temperature * self.scale.exp()
        attention = (scores + self.biases[:, self.index]).softmax(-1)
        return self.out((attention @ v.unsqueeze(1)).mean(1))


class Strange(nn.Module):
    """What nobody can know is `other`, with a reason."""

    def __init__(self):
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(3, 4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(torch.ops.mylib.mystery(x, self.spectrum))


CASES = {
    HeadFirst: {
        "output.weight": "head | out in",
        "patch.weight": "conv | out in tap=2 tap=2",
        "cls": "embedding | in0 in1 out",
        "where": "embedding | in0 in1 out",
        "blocks.0.norm.weight": "norm | out",
        "blocks.0.wq": "linear | in out",
        "blocks.0.wo": "linear | out in",
        "blocks.0.ls": "norm | out",
        "blocks.0.shift": "bias | out",
    },
    TiedByHand: {"table.weight": "embedding | in out", "mix.weight": "linear | out in"},
    Experts: {
        "gate": "linear | out in",
        "up": "linear | expert in out",
        "down": "linear | expert out in",
    },
    Several: {
        "words.weight": "embedding | in out",
        "cell.weight_hh_l0": "linear | (gate=4 out) in",
        "tasks.topic.weight": "head | out in",
        "tasks.tone.0.weight": "linear | out in",
        "tasks.tone.2.weight": "head | out in",
    },
    Boxes: {
        "queries": "embedding | in out",
        "attention.in_proj_weight": "linear | (part=3 out) in",
        "attention.out_proj.weight": "linear | out in",
        "layers.1.weight": "linear | out in",
        "layers.2.weight": "head | out in",
    },
    Generator: {
        "0.weight": "conv | in out tap=4 tap=4",
        "1.weight": "norm | out",
        "3.weight": "head | in out tap=4 tap=4",
    },
    Relative: {
        "biases": "embedding | out in",
        "temperature": "norm | out0 out1 out2",
        "scale": "scalar |",
        "qkv.weight": "linear | (part=3 out) in",
        "out.weight": "head | out in",
    },
    Strange: {"spectrum": "other | out0 out1", "linear.weight": "head | out in"},
}


@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
def test_roles_and_layouts(cls):
    found = {s.name: f"{s.role} | {s.layout}".strip() for s in classify(cls())}
    assert {name: found[name] for name in CASES[cls]} == CASES[cls]
    heads = {name for name, role in found.items() if role.startswith("head")}
    assert heads == {name for name, role in CASES[cls].items() if role.startswith("head")}


def test_a_tie_made_in_forward_is_told():
    (spec,) = (s for s in classify(TiedByHand()) if s.name == "table.weight")
    assert "head" in spec.reason
    assert "TiedByHand" in spec.reason


def test_layouts_are_those_that_forward_multiplies_by():
    """The operators of the raw matrices, applied to an input, give what the module computes."""
    torch.manual_seed(0)
    experts = Experts()
    x = torch.randn(5, 8)
    operators = {
        s.name: s.layout.to_operators(experts.get_parameter(s.name))[0] for s in classify(experts)
    }
    weights = (x @ operators["gate"].mT).softmax(-1)
    h = torch.stack([(x @ up.mT).relu() for up in operators["up"]], 1)
    y = torch.stack([h[:, e] @ down.mT for e, down in enumerate(operators["down"])], 1)
    torch.testing.assert_close((y * weights[..., None]).sum(1), experts(x))


def test_wrapped_in_ddp_like_modules_and_compiled():
    expected = [(s.role, str(s.layout)) for s in classify(Several())]
    for wrap in (nn.DataParallel, torch.compile):
        assert [(s.role, str(s.layout)) for s in classify(wrap(Several()))] == expected


def test_sources_that_cannot_be_read_fall_back_to_the_order_of_definition():
    space = {"nn": nn}
    exec(
        "class Typed(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        return self.second(self.first(x))\n",
        space,
    )
    roles = {s.name: s.role for s in classify(space["Typed"]())}
    assert (roles["first.weight"], roles["second.weight"]) == ("linear", "head")


class Endless(nn.Module):
    def __init__(self):
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x, depth=0):
        return x if depth > x.sum() else self.forward(self.step(x), depth + 1)


class Doubling(Endless):
    def forward(self, x, depth=0):
        return x if depth > x.sum() else self.forward(x, depth) + self.forward(self.step(x), depth)


class Converging(Endless):
    def forward(self, x):
        while (x - self.step(x)).abs().max() > 1e-3:
            x = self.step(x)
        return x


@pytest.mark.parametrize(
    "cls", [Endless, Doubling, pytest.param(Converging, marks=pytest.mark.slow)]
)
def test_a_forward_that_never_ends_is_no_harm(cls):
    assert {s.role for s in classify(cls())} == {"head", "bias"}
