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


def rotate(x):
    """Positions as angles, by halves."""
    angle = torch.arange(x.shape[-2])[:, None] / 10 ** torch.arange(x.shape[-1] // 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@case(X, qkv__weight="linear | (part=3 out) in", out__weight="head")
class Rotary(nn.Module):
    """Halves of queries and keys are rotated into each other."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


@case(
    X,
    down__weight="linear | (out=6+4) in",
    up__weight="linear | (out0=3 part=2 out1) in",
    q__weight="linear | out in",
)
class Latent(nn.Module):
    """Keys and values from a latent vector, and one rotated key for all heads."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(W, 6 + 4), nn.Linear(6, 3 * 8)
        self.q, self.out = nn.Linear(W, 3 * 8), nn.Linear(W, 2)

    def forward(self, x):
        q, turned = self.q(x).unflatten(-1, (3, 8)).transpose(1, 2).split(4, -1)
        latent, shared = self.down(x).split([6, 4], -1)
        k, v = self.up(F.rms_norm(latent, (6,))).unflatten(-1, (3, 8)).transpose(1, 2).split(4, -1)
        shared = rotate(shared.unsqueeze(1)).expand(-1, 3, -1, -1)
        keys, queries = torch.cat([k, shared], -1), torch.cat([q, rotate(turned)], -1)
        scores = queries @ keys.mT
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@case(
    (torch.zeros(2, 5, dtype=torch.long),),
    table="embedding | in out",
    up="linear | in out",
    where="embedding",
    body__weight="linear",
    offset="bias",
)
class Factors(nn.Module):
    """A table in two factors, which make the scores of tokens too."""

    def __init__(self):
        super().__init__()
        self.table, self.up = nn.Parameter(torch.zeros(20, 4)), nn.Parameter(torch.zeros(4, W))
        self.where = nn.Parameter(torch.zeros(1, 16, W))
        self.body, self.offset = nn.Linear(W, W), nn.Parameter(torch.zeros(20))

    def forward(self, ids):
        x = self.table[ids] @ self.up + self.where[:, : ids.shape[1]]
        for _ in range(2):
            x = x + self.body(x).tanh()
        return x @ self.up.T @ self.table.T + self.offset


@case(
    (torch.zeros(2, 4, 8, 8),),
    route__weight="linear",
    kernels="conv | stack out in tap=3 tap=3",
    head__weight="head",
)
class MixedKernels(nn.Module):
    """Each image is convolved with its own weighted mean of kernels."""

    def __init__(self):
        super().__init__()
        self.route, self.head = nn.Linear(4, 3), nn.Linear(6, 2)
        self.kernels = nn.Parameter(torch.zeros(3, 6, 4, 3, 3))

    def forward(self, x):
        rows, channels, height, width = x.shape
        share = self.route(x.mean((2, 3))).softmax(-1)
        kernel = torch.einsum("bn,noikl->boikl", share, self.kernels).reshape(-1, channels, 3, 3)
        y = F.conv2d(x.reshape(1, -1, height, width), kernel, groups=rows)
        return self.head(y.view(rows, 6, -1).mean(-1))


@case(
    (torch.zeros(5, W), torch.eye(5)), first="linear | in out", last="head | in out", offset="bias"
)
class Graph(nn.Module):
    """Features are multiplied by a matrix, then by the adjacency of the nodes."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Parameter(torch.zeros(W, 8)), nn.Parameter(torch.zeros(8, 3))
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, x, adjacency):
        return adjacency @ (torch.relu(adjacency @ (x @ self.first)) @ self.last) + self.offset


@case(
    (torch.zeros(2, 3, 16, 16),),
    patch__weight="conv",
    rows="embedding",
    columns="embedding",
    queries="embedding",
    classes__weight="head",
    box__0__weight="linear",
    box__2__weight="head",
)
class Detector(nn.Module):
    """Positions of rows and columns side by side; learned queries."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, W, 4, 4)
        self.rows, self.columns = (nn.Parameter(torch.zeros(9, W // 2)) for _ in range(2))
        self.queries = nn.Parameter(torch.zeros(6, W))
        self.ask, self.classes = nn.Linear(W, W), nn.Linear(W, 4)
        self.box = nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, 4))

    def forward(self, pixels):
        x = self.patch(pixels)
        height, width = x.shape[-2:]
        rows = self.rows[:height].unsqueeze(1).repeat(1, width, 1)
        columns = self.columns[:width].unsqueeze(0).repeat(height, 1, 1)
        x = x.flatten(2).mT + torch.cat([columns, rows], -1).flatten(0, 1)
        queries = self.ask(self.queries).expand(len(x), -1, -1)
        y = F.scaled_dot_product_attention(queries, x, x)
        return {"pred_logits": self.classes(y), "pred_boxes": self.box(y).sigmoid()}


@case((torch.zeros(2, W), torch.zeros(2, W)), body__weight="linear", form="head")
class Bilinear(nn.Module):
    """A bilinear form for each label."""

    def __init__(self):
        super().__init__()
        self.body, self.form = nn.Linear(W, 8), nn.Parameter(torch.zeros(3, 8, 8))

    def forward(self, a, b):
        return torch.einsum("bi,lij,bj->bl", self.body(a).relu(), self.form, self.body(b).relu())


@case((torch.zeros(3, W),), body__weight="linear", classes="head | out in", sharpness="scalar")
class Prototypes(nn.Module):
    """Scores are distances to a vector of each class."""

    def __init__(self):
        super().__init__()
        self.body, self.classes = nn.Linear(W, 8), nn.Parameter(torch.zeros(5, 8))
        self.sharpness = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return -self.sharpness * torch.cdist(self.body(x), self.classes).square()


@case(X, base__weight="linear", lora_a="linear | in out", lora_b="linear | in out", rate="scalar")
class HandLora(nn.Module):
    """Factors of a library that stores them the other way."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(W, 8), nn.Linear(8, 2)
        self.lora_a, self.lora_b = nn.Parameter(torch.zeros(W, 3)), nn.Parameter(torch.zeros(3, 8))
        self.rate = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.head((self.base(x) + self.rate * (x @ self.lora_a @ self.lora_b)).relu())


@case(
    (torch.zeros(2, 6, W), torch.zeros(2, 6, 8)),
    text__weight="linear",
    image__weight="linear",
    scale="scalar",
)
class Contrastive(nn.Module):
    """The output is a product of activations: no matrix is a head."""

    def __init__(self):
        super().__init__()
        self.text, self.image = nn.Linear(W, 4), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, text, image):
        a, b = F.normalize(self.text(text).mean(1)), F.normalize(self.image(image).mean(1))
        return self.scale.exp() * a @ b.T


@case(
    (torch.zeros(2, 4, 8, 8), torch.zeros(2, 6)),
    patch__weight="conv",
    modulation__weight="linear | (part=3 out) in",
    where="embedding",
    final__weight="head",
)
class Diffusion(nn.Module):
    """Shift, scale and gate of each channel are made from a condition of another width."""

    def __init__(self):
        super().__init__()
        self.patch, self.where = nn.Conv2d(4, W, 2, 2), nn.Parameter(torch.zeros(1, 16, W))
        self.modulation, self.mix = nn.Linear(6, 3 * W), nn.Linear(W, W)
        self.final = nn.Linear(W, 16)

    def forward(self, x, t):
        x = self.patch(x).flatten(2).mT + self.where
        shift, scale, gate = self.modulation(F.silu(t)).unsqueeze(1).chunk(3, -1)
        x = x + gate * self.mix(F.layer_norm(x, (W,)) * (1 + scale) + shift).relu()
        return self.final(x)


@case(
    (torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long)),
    bags__0__weight="embedding",
    dense__weight="linear",
    top__weight="head",
)
class Recommender(nn.Module):
    """Bags of features, and the products of all pairs of vectors."""

    def __init__(self):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(9, 6) for _ in range(2))
        self.dense, self.top = nn.Linear(4, 6), nn.Linear(9, 1)

    def forward(self, numbers, a, b):
        dense = self.dense(numbers).relu()
        x = torch.stack([dense, *(bag(i) for bag, i in zip(self.bags, (a, b), strict=True))], 1)
        i, j = torch.tril_indices(3, 3, -1)
        return self.top(torch.cat([dense, (x @ x.mT)[:, i, j]], 1))


@case(
    (torch.zeros(2, W), torch.zeros(2, dtype=torch.long)),
    trunk__weight="linear",
    weights="head | stack in out",
)
class PerDomain(nn.Module):
    """The domain of each example picks its head."""

    def __init__(self):
        super().__init__()
        self.trunk, self.weights = nn.Linear(W, 8), nn.Parameter(torch.zeros(3, 8, 2))

    def forward(self, x, domain):
        return torch.bmm(self.trunk(x).relu()[:, None], self.weights[domain])[:, 0]


class Cell(nn.Module):
    """The gates of an LSTM from one matrix."""

    def __init__(self, inputs, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4 * width, inputs + width))
        self.offset = nn.Parameter(torch.zeros(4 * width))

    def forward(self, x, h, c):
        gates = F.linear(torch.cat([x, h], -1), self.weight, self.offset)
        i, f, g, o = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


@case(
    (torch.zeros(2, 5, dtype=torch.long),),
    table__weight="embedding",
    cell__weight="linear | (part=4 out) in",
    cell__offset="bias",
    start="embedding",
    out__weight="head",
)
class Recurrent(nn.Module):
    """A recurrence by hand, from a learned state."""

    def __init__(self):
        super().__init__()
        self.table, self.cell = nn.Embedding(20, 6), Cell(6, 8)
        self.start, self.out = nn.Parameter(torch.zeros(8)), nn.Linear(8, 20)

    def forward(self, ids):
        h, c, all_h = self.start.expand(len(ids), -1), torch.zeros(len(ids), 8), []
        for x in self.table(ids).unbind(1):
            h, c = self.cell(x, h, c)
            all_h.append(h)
        return self.out(torch.stack(all_h, 1))


@case(
    (torch.zeros(2, 8, W),),
    into__weight="linear | (part=2 out) in",
    taps__weight="conv",
    rates__weight="linear | (out=2+4+4) in",
    step__weight="linear",
    A_log="other",
    D="norm",
    head__weight="head",
)
class StateSpace(nn.Module):
    """A selective scan."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Linear(W, 2 * 16), nn.Linear(16, 2)
        self.taps = nn.Conv1d(16, 16, 3, groups=16, padding=2)
        self.rates, self.step = nn.Linear(16, 2 + 4 + 4), nn.Linear(2, 16)
        self.A_log, self.D = nn.Parameter(torch.zeros(16, 4)), nn.Parameter(torch.ones(16))

    def forward(self, u):
        x, z = self.into(u).chunk(2, -1)
        x = F.silu(self.taps(x.mT)[..., : u.shape[1]].mT)
        step, b, c = self.rates(x).split([2, 4, 4], -1)
        step, rate, h, y = F.softplus(self.step(step)), -self.A_log.exp(), 0, []
        for t in range(u.shape[1]):
            new = step[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
            h = torch.exp(step[:, t, :, None] * rate) * h + new
            y.append((h * c[:, t, None]).sum(-1))
        return self.head((torch.stack(y, 1) + self.D * x) * F.silu(z))
