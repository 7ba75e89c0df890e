"""Modules in no release, and what each parameter of them is, written down before anything ran.

A tuple holds alternatives that are all right; an expectation without a layout leaves it open.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

CASES = []  # (class, expected by parameter, an example of what forward takes)


def case(inputs, **expected):
    """Register a module; `__` stands for a dot in a parameter's name."""

    def register(cls):
        CASES.append((cls, {k.replace("__", "."): v for k, v in expected.items()}, inputs))
        return cls

    return register


W = 12
X = (torch.zeros(2, 5, W),)


@case(X, w__query="linear | in out", w__out="linear | out in", gate="norm", head__weight="head")
class Dictionary(nn.Module):
    """Matrices in a dictionary, a gate for each channel."""

    def __init__(self):
        super().__init__()
        self.w = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(W, W)) for name in ("query", "key", "value", "out")}
        )
        self.gate = nn.Parameter(torch.zeros(W))
        self.head = nn.Linear(W, 3)

    def forward(self, x):
        q, k, v = (x @ self.w[name] for name in ("query", "key", "value"))
        y = F.linear((q @ k.mT / math.sqrt(W)).softmax(-1) @ v, self.w["out"])
        return self.head((x + torch.tanh(self.gate) * y).mean(1))


@case(X, base__weight="linear", down="linear | out in", up="linear | out in", head__weight="head")
class Merged(nn.Module):
    """Low-rank factors, added to a weight before it is used."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(W, 2 * W)
        self.down = nn.Parameter(torch.zeros(3, W))
        self.up = nn.Parameter(torch.zeros(2 * W, 3))
        self.head = nn.Linear(2 * W, 2)

    def forward(self, x):
        weight = self.base.weight + 0.5 * self.up @ self.down
        return self.head(F.relu(F.linear(x, weight, self.base.bias)))


@case(X, weight="linear | out in", length="norm", head__weight="head")
class Normalised(nn.Module):
    """Lengths of rows apart from their directions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(W, W))
        self.length = nn.Parameter(torch.ones(W, 1))
        self.head = nn.Linear(W, 2)

    def forward(self, x):
        return self.head(F.linear(x, self.length * F.normalize(self.weight, dim=1)).relu())


@case(X, weight="linear | out in", head__weight="head")
class Ternary(nn.Module):
    """Weights that are rounded before they are used, gradients passed through."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(W, W))
        self.head = nn.Linear(W, 2)

    def forward(self, x):
        scale = self.weight.abs().mean()
        rounded = (self.weight / scale).round().clamp(-1, 1) * scale
        weight = self.weight + (rounded - self.weight).detach()
        return self.head(F.linear(x, weight).relu())


@case(
    X, up="linear | expert in (part=2 out)", down="linear | expert in out", route__weight="linear"
)
class StackedExperts(nn.Module):
    """All experts at once; gate and up are the halves of what one product gives."""

    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.up = nn.Parameter(torch.zeros(3, W, 2 * 8))
        self.down = nn.Parameter(torch.zeros(3, 8, W))
        self.route = nn.Linear(W, 3)
        self.head = nn.Linear(W, 2)

    def forward(self, x):
        flat = x.reshape(-1, W)
        share = self.route(flat).softmax(-1)
        gate, up = torch.bmm(flat.expand(3, -1, -1), self.up).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, self.down)
        return self.head((y * share.T.unsqueeze(-1)).sum(0))


@case(X, rel="embedding", qkv__weight="linear | (part=3 out) in", head__weight="head")
class Music(nn.Module):
    """Vectors for distances, of which the last are taken and multiplied by queries."""

    def __init__(self):
        super().__init__()
        self.rel = nn.Parameter(torch.zeros(16, W))
        self.qkv, self.head = nn.Linear(W, 3 * W), nn.Linear(W, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).split(W, dim=-1)
        scores = q @ k.mT + q @ self.rel[-x.shape[1] :].T
        return self.head(scores.softmax(-1) @ v)


@case(
    (torch.zeros(2, 3, 8, 8),),
    patch__weight="conv",
    cls="embedding",
    where="embedding",
    scale="norm",
    head__weight="head",
)
class Vision(nn.Module):
    """Patches, a class token and positions; a gain for each channel of the residual."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, W, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, W))
        self.where = nn.Parameter(torch.zeros(5, W))
        self.scale = nn.Parameter(torch.ones(W))
        self.mix = nn.Linear(W, W)
        self.head = nn.Linear(W, 2)

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.where
        return self.head((x + self.scale * self.mix(x).relu())[:, 0])


@case(
    (torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)),
    table__weight="embedding",
    body__weight="linear",
    out__weight="head",
)
class LossOnly(nn.Module):
    """What a Trainer takes: labels in, a loss out."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(W, 20)
        self.body = nn.Linear(W, W)
        self.table = nn.Embedding(20, W)

    def forward(self, input_ids, labels):
        logits = self.out(self.body(self.table(input_ids)).relu())
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


@case(X, inner__weight="linear", token_mix="linear | out in", bias_proj="linear | in out")
class Misnamed(nn.Module):
    """Names that say something else than what is done."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(W, W)
        self.token_mix = nn.Parameter(torch.zeros(5, 5))
        self.bias_proj = nn.Parameter(torch.zeros(W, W))
        self.last = nn.Linear(W, 2)

    def forward(self, x):
        return self.last((self.token_mix @ self.inner(x)).relu() @ self.bias_proj)


class NormFormer(nn.Module):
    """A model whose name holds that of a normalisation."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, 1, W))
        self.layer, self.out = nn.Linear(W, W), nn.Linear(W, 2)

    def forward(self, x):
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1)
        return self.out(torch.relu(self.layer(x))[:, 0])


case(X, start="embedding", layer__weight="linear", out__weight="head")(NormFormer)


@case(X, trunk__weight="linear", heads__1__weight="head", heads__0__weight="head")
class Heads(nn.Module):
    """One head for each task, in a loop; none is named."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(W, n) for n in (2, 3))
        self.trunk = nn.Linear(W, W)

    def forward(self, x):
        x = self.trunk(x).relu()
        return [head(x) for head in self.heads]


@case(X, kernel="conv | tap=3 in out", head__weight="head")
class Taps(nn.Module):
    """A kernel stored with its taps first."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(3, W, 8))
        self.bias = nn.Parameter(torch.zeros(8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.conv_tbc(x, self.kernel, self.bias, 1).relu())


@case(X, rows="linear | in out0 out1", out="linear | in0 in1 out", head__weight="head")
class Axes(nn.Module):
    """Heads as axes of the weight."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(W, 3, 4))
        self.out = nn.Parameter(torch.zeros(3, 4, W))
        self.head = nn.Linear(W, 2)

    def forward(self, x):
        q = torch.einsum("btd,dhk->bthk", x, self.rows).relu()
        return self.head(torch.einsum("bthk,hkd->btd", q, self.out))


@case(X, gain="norm", offset="bias", body__weight="linear", head__weight="head")
class Affine(nn.Module):
    """A normalisation by hand, whose gain is used as 1 + gain."""

    def __init__(self):
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.zeros(W)), nn.Parameter(torch.zeros(W))
        self.body, self.head = nn.Linear(W, W), nn.Linear(W, 2)

    def forward(self, x):
        x = self.body(x)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.head(x * (1 + self.gain) + self.offset)
