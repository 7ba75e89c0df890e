"""Modules of more fields, in no release: `unseen_modules.py` says how they are written down."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.unseen_modules import case

LONG = torch.long


class ModulatedConv(nn.Module):
    """A kernel that is scaled for each row of the batch."""

    def __init__(self, i, o, k, demodulated=True):
        super().__init__()
        self.weight, self.affine = nn.Parameter(torch.zeros(1, o, i, k, k)), nn.Linear(8, i)
        self.shift, self.demodulated = nn.Parameter(torch.zeros(1, o, 1, 1)), demodulated

    def forward(self, x, style):
        b, _, h, w = x.shape
        _, o, i, k, _ = self.weight.shape
        weight = self.weight * self.affine(style).view(b, 1, i, 1, 1)
        if self.demodulated:
            weight = weight * torch.rsqrt(weight.square().sum([2, 3, 4], keepdim=True) + 1e-8)
        x = F.conv2d(x.reshape(1, -1, h, w), weight.view(b * o, i, k, k), padding=k // 2, groups=b)
        return x.view(b, o, h, w) + self.shift


@case(
    (torch.zeros(2, 8),),
    start="embedding",
    body__weight="conv",
    body__shift="bias",
    colours__weight="head",
    colours__shift="bias",
)
class Painter(nn.Module):
    """The last of its modulated kernels makes the image."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, 6, 4, 4))
        self.body, self.colours = ModulatedConv(6, 6, 3), ModulatedConv(6, 3, 1, False)

    def forward(self, z):
        x = F.leaky_relu(self.body(self.start.repeat(len(z), 1, 1, 1), z), 0.2)
        return self.colours(x, z)


@case(
    (torch.zeros(2, 5, 12),),
    kv__weight="linear | (part=2 out) in",
    content="bias",
    distance="bias",
    out__weight="head",
)
class TwoBiases(nn.Module):
    """Queries with a vector for each head beside them, as content and as a place."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.r = nn.Linear(12, 12), nn.Linear(12, 24), nn.Linear(12, 12)
        self.content, self.distance = (nn.Parameter(torch.zeros(3, 4)) for _ in range(2))
        self.out = nn.Linear(12, 2)

    def forward(self, x):
        b, t, d = x.shape
        angle = torch.arange(t)[:, None] / 10 ** torch.arange(d // 2)
        r = self.r(torch.cat([angle.sin(), angle.cos()], -1)).view(t, 3, 4)
        q, (k, v) = self.q(x).view(b, t, 3, 4), self.kv(x).chunk(2, -1)
        k, v = k.reshape(b, t, 3, 4), v.reshape(b, t, 3, 4)
        near = torch.einsum("bihd,bjhd->bhij", q + self.content, k)
        far = torch.einsum("bihd,jhd->bhij", q + self.distance, r)
        y = torch.einsum("bhij,bjhd->bihd", ((near + far) / 2).softmax(-1), v)
        return self.out(y.flatten(2))


@case(
    (torch.zeros(2, 3, 8, 8),),
    codes__0="embedding",
    codes__1="embedding",
    first="linear | in out",
    offset="bias",
    last__weight="linear",
    head__weight="head",
)
class Codes(nn.Module):
    """A kernel for each layer, which a network makes from the layer's code."""

    def __init__(self):
        super().__init__()
        self.codes = nn.ParameterList(nn.Parameter(torch.zeros(4)) for _ in range(2))
        self.first, self.offset = nn.Parameter(torch.zeros(4, 7)), nn.Parameter(torch.zeros(7))
        self.last, self.head = nn.Linear(7, 3 * 3 * 9), nn.Linear(3, 2)

    def forward(self, x):
        for code in self.codes:
            kernel = self.last(torch.tanh(code @ self.first + self.offset)).view(3, 3, 3, 3)
            x = x + F.conv2d(x, kernel, padding=1).relu()
        return self.head(x.mean((2, 3)))


class Noisy(nn.Module):
    """A weight with noise, in training only."""

    def __init__(self, i, o):
        super().__init__()
        self.mean, self.spread = nn.Parameter(torch.zeros(o, i)), nn.Parameter(torch.zeros(o, i))
        self.register_buffer("noise", torch.zeros(o, i))

    def forward(self, x):
        noise = self.spread * self.noise if self.training else 0
        return F.linear(x, self.mean + noise)


@case(
    (torch.zeros(2, 12),),
    body__mean="linear | out in",
    body__spread="linear | out in",
    values__mean="head",
    values__spread="head",
    helper__weight="head",
)
class Trained(nn.Module):
    """What only training reaches: noise, and a head that helps."""

    def __init__(self):
        super().__init__()
        self.body, self.values, self.helper = Noisy(12, 8), Noisy(8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = self.body(x).relu()
        return (self.values(x), self.helper(x)) if self.training else self.values(x)


@case(
    {"numbers": torch.zeros(4, 5), "kinds": torch.zeros(4, dtype=LONG)},
    each="linear | stack in out",
    offset="bias",
    kind__weight="embedding",
    cls="embedding",
    out__weight="head",
)
class Columns(nn.Module):
    """A map for each column; arguments by name alone."""

    def __init__(self):
        super().__init__()
        self.each, self.offset = nn.Parameter(torch.zeros(5, 2, 8)), nn.Parameter(torch.zeros(5, 8))
        self.kind, self.cls = nn.Embedding(3, 8), nn.Parameter(torch.zeros(8))
        self.mix, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 1)

    def forward(self, *, numbers, kinds=None):
        x = torch.stack([numbers.sin(), numbers.cos()], -1)
        x = (x.transpose(0, 1) @ self.each).transpose(0, 1) + self.offset
        if kinds is not None:
            x = torch.cat([x, self.kind(kinds).unsqueeze(1)], 1)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        return self.out(self.mix(x, x, x)[0][:, 0])


@case(
    tuple(torch.zeros(4, dtype=LONG) for _ in range(3)),
    real="embedding",
    imaginary="embedding",
    phase="embedding",
    weight__weight="embedding",
    margin="scalar",
)
class Rotations(nn.Module):
    """Relations as rotations of entities: tables whose rows are multiplied more than once."""

    def __init__(self):
        super().__init__()
        self.real, self.imaginary = (nn.Parameter(torch.zeros(30, 8)) for _ in range(2))
        self.phase, self.weight = nn.Parameter(torch.zeros(5, 8)), nn.Embedding(5, 8)
        self.margin = nn.Parameter(torch.zeros(1))

    def forward(self, head, relation, tail):
        a, b, phase = self.real[head], self.imaginary[head], self.phase[relation]
        real = a * phase.cos() - b * phase.sin() - self.real[tail]
        imaginary = a * phase.sin() + b * phase.cos() - self.imaginary[tail]
        distance = torch.stack([real, imaginary]).norm(dim=0).sum(-1)
        return self.margin - distance + (a * self.weight(relation) * self.real[tail]).sum(-1)


@case((torch.zeros(2, 1, 200),), low="other", band="other", conv__weight="conv", out__weight="head")
class Bands(nn.Module):
    """Filters from the edges of their bands."""

    def __init__(self):
        super().__init__()
        self.low, self.band = (nn.Parameter(torch.ones(6, 1)) for _ in range(2))
        self.register_buffer("time", 2 * math.pi * torch.arange(-8, 0.0)[None] / 100)
        self.conv, self.out = nn.Conv1d(6, 8, 5), nn.Linear(8, 3)

    def forward(self, sound):
        low = 1 + self.low.abs()
        high = (low + self.band.abs()).clamp(1, 50)
        left = (torch.sin(high @ self.time) - torch.sin(low @ self.time)) / self.time
        band = torch.cat([left, high - low, left.flip(1)], 1)
        return self.out(self.conv(F.conv1d(sound, band[:, None]).square()).relu().mean(-1))


@case(
    (torch.zeros(2, 5, dtype=LONG),),
    table__weight="embedding",
    prior__weight="linear",
    latent__weight="linear",
    words__weight="head",
)
class Softmaxes(nn.Module):
    """A mixture of distributions, of which each has a share."""

    def __init__(self):
        super().__init__()
        self.table, self.latent = nn.Embedding(20, 8), nn.Linear(8, 2 * 8)
        self.prior, self.words = nn.Linear(8, 2), nn.Linear(8, 20)

    def forward(self, ids):
        x = self.table(ids)
        share = self.prior(x).softmax(-1).unsqueeze(-1)
        words = self.words(self.latent(x).tanh().unflatten(-1, (2, 8))).softmax(-1)
        return (words * share).sum(2).log()


@case(
    (torch.zeros(2, 5, 8),),
    choose__weight="linear",
    lora_A="linear",
    lora_B="linear | stack out in",
    gains="norm",
    out__weight="head",
)
class AdaptedByExperts(nn.Module):
    """Low-rank factors of several experts, stacked."""

    def __init__(self):
        super().__init__()
        self.base, self.choose = nn.Linear(8, 8), nn.Linear(8, 3, bias=False)
        self.lora_A, self.lora_B = (nn.Parameter(torch.zeros(3, *s)) for s in ((2, 8), (8, 2)))
        self.gains, self.out = nn.Parameter(torch.ones(3)), nn.Linear(8, 2)

    def forward(self, x):
        share = self.choose(x).softmax(-1) * self.gains
        low = torch.einsum("btd,erd->bter", x, self.lora_A)
        y = torch.einsum("bter,eor->bteo", low, self.lora_B)
        return self.out(self.base(x) + (y * share.unsqueeze(-1)).sum(2))


@case(
    (torch.zeros(2, 5, 8),),
    queries="embedding",
    ask="linear | in out",
    read__in_proj_weight="linear | (part=3 out) in",
    out__weight="head",
)
class Asks(nn.Module):
    """Learned queries, which a raw matrix maps before they attend."""

    def __init__(self):
        super().__init__()
        self.queries, self.ask = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(6, 8))
        self.read, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        queries = (self.queries @ self.ask).expand(len(x), -1, -1)
        return self.out(self.read(queries, x, x)[0])


@case(
    (torch.zeros(2, 5, 8),),
    score__weight="linear",
    cell__weight_ih="linear",
    bins__weight="head",
    classes__weight="head",
)
class Looks(nn.Module):
    """Weights of an attention beside what it gives; a mean of places by their probabilities."""

    def __init__(self):
        super().__init__()
        self.score, self.cell = nn.Linear(8, 1), nn.GRUCell(8, 6)
        self.bins, self.classes = nn.Linear(6, 4 * 3), nn.Linear(6, 5)
        self.register_buffer("places", torch.arange(3.0))

    def forward(self, x):
        share = self.score(torch.tanh(x)).squeeze(-1).softmax(1)
        y = self.cell((x * share.unsqueeze(-1)).sum(1))
        boxes = self.bins(y).unflatten(-1, (4, 3)).softmax(-1) @ self.places
        return torch.cat([boxes, self.classes(y)], 1), share


@case(
    (torch.zeros(3, dtype=LONG), torch.zeros(3, dtype=LONG), torch.eye(22)),
    users="embedding",
    items="embedding",
    maps__0="linear | in out",
    offsets__0="bias",
    shares="norm",
)
class Neighbours(nn.Module):
    """Tables that neighbours mix before rows are taken."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Parameter(torch.zeros(10, 8)), nn.Parameter(torch.zeros(12, 8))
        self.maps, self.offsets = (
            nn.ParameterList(nn.Parameter(torch.zeros(*size)) for _ in range(2))
            for size in ((8, 8), (1, 8))
        )
        self.shares = nn.Parameter(torch.ones(3))

    def forward(self, users, items, adjacency):
        x = torch.cat([self.users, self.items])
        found = [x]
        for weight, offset in zip(self.maps, self.offsets, strict=True):
            x = F.leaky_relu(adjacency @ x @ weight + offset)
            found.append(F.normalize(x))
        mean = sum(share * one for share, one in zip(self.shares, found, strict=True))
        left, right = mean.split([10, 12])
        return (left[users] * right[items]).sum(-1)


@case(
    (torch.zeros(2, 5, 8),),
    base__weight="linear",
    gains="norm",
    offsets="bias",
    values__weight="linear | (part=2 out) in",
    out__weight="head",
)
class OneMap(nn.Module):
    """Queries and keys are gains and offsets of one map."""

    def __init__(self):
        super().__init__()
        self.base, self.values, self.out = nn.Linear(8, 4), nn.Linear(8, 32), nn.Linear(16, 3)
        self.gains, self.offsets = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.zeros(2, 4))

    def forward(self, x):
        q, k = (F.silu(self.base(x)).unsqueeze(2) * self.gains + self.offsets).unbind(2)
        gate, v = F.silu(self.values(x)).chunk(2, -1)
        return self.out(gate * ((q @ k.mT).relu().square() @ v))


@case(
    (torch.zeros(2, 3, 6),),
    sources="embedding",
    targets="embedding",
    lambda_a="other",
    mix__weight="linear",
    gain="norm",
    out__weight="head",
)
class Roads(nn.Module):
    """Nodes that are compared; a state that is normalised anew; vectors of which a number stays."""

    def __init__(self):
        super().__init__()
        self.sources, self.targets = (nn.Parameter(torch.zeros(*s)) for s in ((3, 4), (4, 3)))
        self.lambda_a, self.lambda_b = (nn.Parameter(torch.zeros(4)) for _ in range(2))
        self.mix, self.gain, self.out = (
            nn.Linear(6, 6),
            nn.Parameter(torch.ones(6)),
            nn.Linear(6, 2),
        )

    def forward(self, x):
        near = (self.sources @ self.targets).relu().softmax(-1)
        x = torch.einsum("nm,bmd->bnd", near, self.mix(x))
        for _ in range(2):
            x = x + F.layer_norm(x, (6,)) * self.gain
        return self.out(x * (self.lambda_a * self.lambda_b).sum().exp())
