"""Modules as they are written by hand in practice: `unseen_modules.py` says how they are noted."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.unseen_modules import case

LONG = torch.long


def ids(*shape):
    return torch.zeros(*shape, dtype=LONG)


def raw(*shape):
    return nn.Parameter(torch.zeros(*shape))


@case(
    (ids(2, 5),),
    base__weight="embedding",
    lora_A="embedding | out in",
    lora_B="linear | out in",
    head__weight="head",
)
class AdaptedTable(nn.Module):
    """Low-rank factors of a table by hand: rows of the first are looked up."""

    def __init__(self, d=12):
        super().__init__()
        self.base, self.lora_A, self.lora_B = nn.Embedding(30, d), raw(2, 30), raw(d, 2)
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        return self.head(self.base(x) + F.embedding(x, self.lora_A.T) @ self.lora_B.T)


@case(
    (torch.zeros(4, 10),),
    experts="linear | expert in out",
    offsets="bias",
    gates__0="linear | in out",
    towers__buy__weight="head",
    towers__click__weight="head",
)
class Tasks(nn.Module):
    """Each task has a gate over experts, all of which see the same."""

    def __init__(self, d=10, e=3, h=8):
        super().__init__()
        self.experts, self.offsets = raw(e, d, h), raw(e, h)
        self.gates = nn.ParameterList(raw(d, e) for _ in range(2))
        self.towers = nn.ModuleDict({task: nn.Linear(h, 1) for task in ("click", "buy")})

    def forward(self, x):
        h = F.relu(torch.einsum("bd,edh->beh", x, self.experts) + self.offsets)
        shares = [(x @ gate).softmax(-1) for gate in self.gates]
        pairs = zip(self.towers.items(), shares, strict=True)
        return {name: tower((g.unsqueeze(-1) * h).sum(1)) for (name, tower), g in pairs}


@case(
    (torch.zeros(2, 5, 16), torch.zeros(2, 8)),
    table="bias",
    times__1__weight="linear | (part=3 out) in",
    head__weight="head",
)
class Modulated(nn.Module):
    """Shift, scale and gate from a condition, each with an offset of its own in one table."""

    def __init__(self, d=16):
        super().__init__()
        self.times, self.table = nn.Sequential(nn.SiLU(), nn.Linear(8, 3 * d)), raw(3, d)
        self.body, self.head = nn.Linear(d, d), nn.Linear(d, 2)

    def forward(self, x, t):
        shift, scale, gate = (self.table + self.times(t).view(len(t), 3, -1)).chunk(3, 1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return self.head(x + gate * self.body(h))


@case(
    (torch.zeros(2, 8, 4, 4),),
    rows="embedding",
    columns="embedding",
    qkv__weight="conv",
    head__weight="head",
)
class Bottleneck(nn.Module):
    """Queries are multiplied by sums of a row's and a column's vector."""

    def __init__(self, c=8, h=2):
        super().__init__()
        self.h, self.qkv, self.head = h, nn.Conv2d(c, 3 * c, 1), nn.Linear(c, 3)
        self.rows, self.columns = raw(1, h, c // h, 4, 1), raw(1, h, c // h, 1, 4)

    def forward(self, x):
        b, c, height, width = x.shape
        q, k, v = self.qkv(x).view(b, 3, self.h, c // self.h, height * width).unbind(1)
        where = (self.rows + self.columns).view(1, self.h, c // self.h, -1)
        weights = (q.mT @ k + q.mT @ where.expand(b, -1, -1, -1)).softmax(-1)
        return self.head((v @ weights.mT).reshape(b, c, -1).mean(-1))


@case(
    (ids(2, 5), torch.tensor([5, 3])),
    rnn__weight_ih_l1="linear",
    w="linear | in out",
    b="bias",
    out__weight="head",
)
class Packed(nn.Module):
    """Sequences of several lengths, packed for a recurrent network; their mean by attention."""

    def __init__(self, d=6):
        super().__init__()
        self.table, self.rnn = nn.Embedding(20, d), nn.LSTM(d, d, 2, batch_first=True)
        self.w, self.b, self.out = raw(d, 8), raw(8), nn.Linear(8, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.table(x), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        h, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        h = torch.tanh(torch.tensordot(h, self.w, dims=1) + self.b)
        mask = torch.arange(h.shape[1]) < lengths[:, None]
        return self.out((h * mask.unsqueeze(-1)).sum(1) / lengths[:, None])


class Filter(nn.Module):
    """A long kernel as a function of time, and what multiplies the signal itself."""

    def __init__(self, d):
        super().__init__()
        self.first, self.last, self.bias = nn.Linear(3, 8), nn.Linear(8, d), raw(d)

    def forward(self, length):
        t = torch.linspace(0, 1, length)[:, None]
        return self.last(torch.sin(self.first(torch.cat([t, t.sin(), t.cos()], -1)))).T


@case(
    (torch.zeros(2, 9, 6),), kernel__bias="norm", kernel__last__weight="linear", out__weight="head"
)
class LongConvolution(nn.Module):
    """A gain that is named a bias."""

    def __init__(self, d=6):
        super().__init__()
        self.kernel, self.out = Filter(d), nn.Linear(d, 2)

    def forward(self, x):
        x, n = x.mT, x.shape[1]
        spectrum = torch.fft.rfft(x, n=2 * n) * torch.fft.rfft(self.kernel(n), n=2 * n)
        y = torch.fft.irfft(spectrum, n=2 * n)[..., :n] + x * self.kernel.bias[:, None]
        return self.out(y.mT)


@case(
    (ids(3), ids(3)),
    users="embedding | in out",
    b_u="embedding | in",
    item_bias="embedding | in",
    gamma="embedding | in",
    mean="scalar",
)
class Factorization(nn.Module):
    """A single number for each user and each item, whatever its name."""

    def __init__(self, d=4):
        super().__init__()
        self.users, self.items, self.gamma = raw(9, d), raw(7, d), raw(9)
        self.b_u, self.item_bias, self.mean = raw(9), raw(7), raw(1)

    def forward(self, user, item):
        likes = (self.users[user] * self.items[item]).sum(-1) * self.gamma[user].sigmoid()
        return likes + self.b_u[user] + self.item_bias[item] + self.mean


@case(
    (torch.zeros(2, 5, 3),),
    step__weight="linear",
    factor="other",
    start="embedding",
    out__weight="head",
)
class Kalman(nn.Module):
    """A covariance from its factor, which is added to another one."""

    def __init__(self, d=4):
        super().__init__()
        self.enter, self.step = nn.Linear(3, d), nn.Linear(d, d, bias=False)
        self.factor, self.start, self.out = raw(d, d), raw(1, d), nn.Linear(d, 3)

    def forward(self, x):
        z, spread = self.start.expand(len(x), -1), torch.eye(4)
        noise = self.factor.tril() @ self.factor.tril().T + 1e-3 * torch.eye(4)
        for t in range(x.shape[1]):
            spread = self.step.weight @ spread @ self.step.weight.T
            gain = spread @ torch.linalg.inv(spread + noise)
            z = self.step(z)
            z = z + (self.enter(x[:, t]) - z) @ gain.T
        return self.out(z)


@case((torch.zeros(2, 4, 12),), q="linear | in out0 out1", k="linear | in out0 out1", o="linear")
class Efficient(nn.Module):
    """Features of queries and places of keys add up to one: no experts, though both are shares."""

    def __init__(self, d=12, h=4):
        super().__init__()
        self.q, self.k, self.v = (raw(d, h, d // h) for _ in range(3))
        self.o, self.head = raw(h, d // h, d), nn.Linear(d, 2)

    def forward(self, x):
        q, k, v = (torch.einsum("btd,dhe->bthe", x, w) for w in (self.q, self.k, self.v))
        context = torch.einsum("bjhe,bjhf->bhef", k.softmax(1), v)
        y = torch.einsum("bihe,bhef->bihf", q.softmax(-1), context)
        return self.head(torch.einsum("bihe,hed->bid", y, self.o))
