"""Modules of more fields, in no release: each stands for one thing that others do as well."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tests.unseen_modules import case

LONG = torch.long


def raw(*shape):
    return nn.Parameter(torch.zeros(*shape))


@case(
    ({"image": torch.zeros(2, 3, 8, 8), "text": torch.zeros(2, 5, dtype=LONG), "task": "vqa"},),
    enc_image__weight="conv",
    enc_text__weight="embedding",
    fuse__weight="linear",
    head_vqa__weight="head",
    head_cap__weight="head",
)
class PlainDict(nn.Module):
    """A batch with fields; encoders and heads in plain dictionaries, one of which does not run."""

    def __init__(self, d=8):
        super().__init__()
        self.enc = {"image": nn.Conv2d(3, d, 4, 4), "text": nn.Embedding(20, d)}
        self.out = {"vqa": nn.Linear(d, 6), "cap": nn.Linear(d, 20)}
        for prefix, group in (("enc", self.enc), ("head", self.out)):
            for name, module in group.items():
                self.add_module(f"{prefix}_{name}", module)
        self.fuse = nn.Linear(d, d)

    def forward(self, batch):
        image = self.enc["image"](batch["image"]).flatten(2).mT
        x = torch.cat([image, self.enc["text"](batch["text"])], 1)
        return self.out[batch["task"]](F.gelu(self.fuse(x.mean(1))))


@dataclass
class Graphs:
    """Several graphs as one: nodes, edges, and in which graph each node is."""

    x: torch.Tensor
    edge_index: torch.Tensor
    batch: torch.Tensor


@case(
    (
        Graphs(
            torch.arange(6), torch.tensor([[0, 1, 3], [1, 2, 4]]), torch.tensor([0] * 3 + [1] * 3)
        ),
    ),
    node__weight="embedding",
    virtual="embedding",
    eps="scalar",
    mix__weight="linear",
    pred__weight="head",
)
class VirtualNode(nn.Module):
    """An argument with attributes; one learned vector for each graph."""

    def __init__(self, d=8):
        super().__init__()
        self.node, self.virtual, self.eps = nn.Embedding(10, d), raw(1, d), raw(1)
        self.mix, self.pred = nn.Linear(d, d), nn.Linear(d, 3)

    def forward(self, data):
        count = int(data.batch.max()) + 1
        h, shared = self.node(data.x), self.virtual.repeat(count, 1)
        source, target = data.edge_index
        for _ in range(2):
            h = h + shared[data.batch]
            near = torch.zeros_like(h).index_add_(0, target, h[source].relu())
            h = self.mix((1 + self.eps) * h + near)
            shared = shared + torch.zeros_like(shared).index_add_(0, data.batch, h)
        return self.pred(torch.zeros(count, h.shape[1]).index_add_(0, data.batch, h))


@case(
    (torch.zeros(3, 5), torch.zeros(3, 2)),
    freqs="other",
    body__weight="linear",
    mean__weight="head",
    log_std="other",
    log_vars="other",
)
class Policy(nn.Module):
    """Frequencies of times, a width of noise that is added, and what scales and is added."""

    def __init__(self):
        super().__init__()
        self.freqs, self.log_std, self.log_vars = raw(4), raw(1, 2), raw(2)
        self.body, self.mean = nn.Linear(5 + 8, 8), nn.Linear(8, 2)

    def forward(self, obs, target):
        angles = obs[:, :1] * self.freqs[None] * 6.28
        x = self.body(torch.cat([obs, angles.sin(), angles.cos()], -1)).relu()
        mean = self.mean(x)
        action = mean + self.log_std.exp() * torch.randn_like(mean)
        error = (action - target).square()
        return torch.exp(-self.log_vars) * error + self.log_vars


@case(
    (torch.zeros(4, dtype=LONG), torch.zeros(4, 3)),
    kinds__weight="embedding",
    radial__weight="linear",
    energy__weight="head",
)
class Forces(nn.Module):
    """A gradient that forward itself takes."""

    def __init__(self, d=8):
        super().__init__()
        self.kinds, self.radial, self.energy = nn.Embedding(9, d), nn.Linear(4, d), nn.Linear(d, 1)

    def forward(self, numbers, positions):
        with torch.enable_grad():
            places = positions.detach().requires_grad_(True)
            distances = (places[:, None] - places + 1e-3).norm(dim=-1)
            near = torch.exp(-(distances[..., None] - torch.arange(4.0)).square())
            x = self.kinds(numbers) + torch.tanh(self.radial(near)).sum(1)
            energy = self.energy(x).sum()
            return energy, -torch.autograd.grad(energy, places)[0]


@case(
    (torch.zeros(2, 5, dtype=LONG), torch.zeros(2, 5, 5, dtype=LONG)),
    atoms__weight="embedding",
    distance="embedding",
    virtual="embedding",
    sinks="other",
    maps__weight="linear",
    bank="linear",
    null="embedding",
    energy__weight="head",
)
class Masks(nn.Module):
    """Tables that become a mask, logits beside others, and a row beside a bank."""

    def __init__(self, d=8, heads=2):
        super().__init__()
        self.atoms, self.distance, self.virtual = nn.Embedding(9, d), raw(6, heads), raw(1, heads)
        self.sinks, self.bank, self.null = raw(heads), raw(4, d), raw(d)
        self.maps, self.energy = nn.Linear(d, 3 * d), nn.Linear(d, 1)

    def forward(self, numbers, steps):
        x = self.atoms(numbers)
        b, t, _ = x.shape
        mask = torch.zeros(b, 2, t, t)
        mask[:, :, 1:, 1:] = self.distance[steps[:, 1:, 1:]].permute(0, 3, 1, 2)
        mask[:, :, 0] = mask[:, :, 0] + self.virtual.view(1, 2, 1)
        q, k, v = (y.view(b, t, 2, -1).transpose(1, 2) for y in self.maps(x).chunk(3, -1))
        near = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        logits = q @ k.mT
        sinks = self.sinks.view(1, -1, 1, 1).expand(b, -1, t, 1)
        far = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1] @ v
        x = x + (near + far).transpose(1, 2).flatten(2)
        bank = torch.cat([self.null[None], self.bank])
        return self.energy((x @ bank.T).softmax(-1) @ bank)


@case(
    (torch.zeros(4, 3, 10),),
    body__weight="linear",
    recur="linear",
    leak="other",
    threshold="other",
    out__weight="head",
)
class Spikes(nn.Module):
    """Steps of activations are activations."""

    def __init__(self, h=8):
        super().__init__()
        self.body, self.recur, self.out = nn.Linear(10, h), raw(h, h), nn.Linear(h, 4)
        self.leak, self.threshold = raw(h), raw(h)

    def forward(self, x):
        v = spikes = torch.zeros(x.shape[1], 8)
        found = []
        for one in x:
            v = self.leak.sigmoid() * v + self.body(one) + spikes @ self.recur
            v = v - spikes * self.threshold
            spikes = (v - self.threshold > 0).to(x.dtype)
            found.append(self.out(spikes))
        return torch.stack(found)


@case(
    (torch.zeros(2, 3, 4, 16, 16),),
    tube__weight="conv",
    space="embedding",
    time="embedding",
    middle__weight="head",
    back__weight="linear",
    gain="norm",
    offset="bias",
    mean__weight="head",
)
class Video(nn.Module):
    """Scores on the way; gains and offsets of one shape; a distribution as output."""

    def __init__(self, d=8):
        super().__init__()
        self.tube, self.space, self.time = (
            nn.Conv3d(3, d, (2, 8, 8), (2, 8, 8)),
            raw(4, d),
            raw(2, 1, d),
        )
        self.middle, self.back, self.mean = nn.Linear(d, 5), nn.Linear(5, d), nn.Linear(d, 3)
        self.gain, self.offset = raw(2, 1, d), raw(2, 1, d)

    def forward(self, video):
        x = self.tube(video).flatten(3).permute(0, 2, 3, 1) + self.space + self.time
        x = x + (x / x.std()) * self.gain + self.offset
        scores = self.middle(x).log_softmax(-1)
        x = x + self.back(scores.exp())
        mean = self.mean(x.mean((1, 2)))
        return torch.distributions.Normal(mean, 1.0, validate_args=False), scores


@case(
    (torch.zeros(5, 3, 6), torch.zeros(5, dtype=LONG)),
    shares="norm",
    first="linear",
    offsets="bias",
    scores__weight="head",
    centers=("embedding", "head"),
)
class Labelled(nn.Module):
    """Shares of layers, biases of stacked experts, and what only labels reach."""

    def __init__(self):
        super().__init__()
        self.shares, self.first, self.offsets = raw(3), raw(2, 7, 6), raw(2, 7)
        self.scores, self.centers = nn.Linear(7, 4), raw(4, 7)

    def forward(self, layers, labels=None):
        x = torch.einsum("l,bld->bd", self.shares.softmax(0), layers)
        x = (torch.einsum("ehi,bi->beh", self.first, x) + self.offsets).relu().mean(1)
        scores = self.scores(x)
        if labels is None:
            return scores
        return scores, (x - self.centers[labels]).square().mean()
