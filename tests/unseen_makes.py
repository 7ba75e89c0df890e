"""Modules in no release that are hard to make inputs for, or end in an unusual way."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.unseen_modules import case

LONG = torch.long


def raw(*shape):
    return nn.Parameter(torch.zeros(*shape))


@case(
    (torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=LONG)),
    patch__weight="conv",
    layers__0__weight="linear",
    exits__0__weight="head",
    exits__1__weight="head",
    back__weight="linear",
)
class Exits(nn.Module):
    """Scores of each layer, which also go into the next one."""

    def __init__(self, d=8):
        super().__init__()
        self.patch, self.back = nn.Conv2d(1, d, 4, 4), nn.Linear(3, d)
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(2))
        self.exits = nn.ModuleList(nn.Linear(d, 3) for _ in range(2))

    def forward(self, pixel_values, labels=None):
        x, scores = self.patch(pixel_values).flatten(2).mT, []
        for layer, leave in zip(self.layers, self.exits, strict=True):
            x = x + layer(x).relu()
            scores.append(leave(x.mean(1)))
            x = x + self.back(scores[-1].softmax(-1)).unsqueeze(1)
        return scores


@case(
    tuple(torch.zeros(2, 5, dtype=LONG) for _ in range(2)),
    words__weight="embedding",
    above__weight="linear",
    below__weight="linear",
    arcs="head",
)
class Parser(nn.Module):
    """A matrix between two sides that are made alike."""

    def __init__(self, d=8):
        super().__init__()
        self.words, self.tags = nn.Embedding(20, d), nn.Embedding(6, d)
        self.above, self.below, self.arcs = nn.Linear(d, 6), nn.Linear(d, 6), raw(6, 6)

    def forward(self, words, tags):
        x = self.words(words) + self.tags(tags)
        above, below = F.elu(self.above(x)), F.elu(self.below(x))
        return torch.einsum("bih,hd,bjd->bij", above, self.arcs, below)


@case(
    (torch.zeros(2, 6, 3), torch.zeros(2, 6)),
    inward="linear | in out",
    around="linear | in out",
    bias="bias",
    tau="other",
    read__weight="head",
)
class Liquid(nn.Module):
    """Times, whose reciprocals are added to rates that the inputs give."""

    def __init__(self, h=7):
        super().__init__()
        self.inward, self.around, self.bias, self.tau = raw(3, h), raw(h, h), raw(h), raw(h)
        self.read = nn.Linear(h, 2)

    def forward(self, x, steps):
        state, found = x.new_zeros(len(x), 7), []
        for t in range(x.shape[1]):
            f = (x[:, t] @ self.inward + state @ self.around + self.bias).sigmoid()
            step = steps[:, t : t + 1]
            state = (state + step * f) / (1 + step * (1 / F.softplus(self.tau) + f))
            found.append(self.read(state))
        return torch.stack(found, 1)


@case(
    (torch.zeros(2, 4, dtype=LONG),),
    table__weight="embedding",
    widths="norm",
    gate="linear | out in",
    inner="linear | expert in out",
    outer="linear | expert in out",
    scores__weight="head",
)
class Streams(nn.Module):
    """Gains of several streams; as many maps as there are shares."""

    def __init__(self, d=8, n=3):
        super().__init__()
        self.table, self.scores = nn.Embedding(13, d), nn.Linear(d, 13)
        self.widths, self.gate, self.inner, self.outer = (
            raw(2, 3),
            raw(n, d),
            raw(n, d, 5),
            raw(n, 5, d),
        )

    def forward(self, idx):
        x = self.table(idx).unsqueeze(-2).repeat(1, 1, 3, 1)
        for widths in self.widths:
            y = x.mean(-2).flatten(0, 1)
            shares = (y @ self.gate.T).softmax(-1)
            maps = zip(self.inner, self.outer, strict=True)
            found = [(y @ a).relu() @ b * shares[:, i : i + 1] for i, (a, b) in enumerate(maps)]
            x = x + widths[:, None] * sum(found).view(*idx.shape, 1, -1)
        return self.scores(x.sum(-2))


@case(
    ([torch.zeros(3, 32, 32), torch.zeros(3, 32, 32)],),
    stem__weight="conv",
    tower__weight="conv",
    classes__weight="head",
    boxes__weight="head",
    scale="scalar",
)
class Detector(nn.Module):
    """A list of images."""

    def __init__(self, d=8):
        super().__init__()
        self.stem, self.tower = nn.Conv2d(3, d, 3, 4, 1), nn.Conv2d(d, d, 3, padding=1)
        self.classes, self.boxes, self.scale = nn.Conv2d(d, 4, 1), nn.Conv2d(d, 4, 1), raw(1)

    def forward(self, images, targets=None):
        x = self.tower(self.stem(torch.stack(images)).relu()).relu()
        return [{"logits": self.classes(x), "boxes": (self.scale * self.boxes(x)).exp()}]


@case(
    (torch.zeros(2, 1, 14, 14),),
    first__weight="conv",
    capsules__weight="conv",
    maps="linear",
    image__weight="head",
)
class Capsules(nn.Module):
    """Only images of one size fit."""

    def __init__(self):
        super().__init__()
        self.first, self.capsules = nn.Conv2d(1, 8, 5), nn.Conv2d(8, 8, 5, 2)
        self.maps, self.image = raw(1, 18, 3, 6, 4), nn.Linear(18, 196)

    def forward(self, x):
        u = self.capsules(self.first(x).relu()).view(len(x), -1, 4)
        votes, logits = (self.maps @ u[:, :, None, :, None])[..., 0], u.new_zeros(len(x), 18, 3, 1)
        for _ in range(2):
            v = F.normalize((logits.softmax(2) * votes).sum(1), dim=-1)
            logits = logits + (votes * v.unsqueeze(1)).sum(-1, keepdim=True)
        return v.norm(dim=-1), self.image(v.flatten(1))


@case(
    (
        torch.zeros(2, 4, 5),
        torch.zeros(2, 4, 2),
        torch.zeros(2, 4, 1),
        torch.zeros(2, 4, dtype=LONG),
    ),
    embed_timestep__weight="embedding",
    embed_return__weight="linear",
    embed_action__weight="linear",
    predict_action__weight="head",
    predict_return__weight="head",
)
class Decisions(nn.Module):
    """Arguments of several widths, named as the modules that take them."""

    def __init__(self, d=8):
        super().__init__()
        self.embed_timestep, self.embed_state = nn.Embedding(10, d), nn.Linear(5, d)
        self.embed_return, self.embed_action = nn.Linear(1, d), nn.Linear(2, d)
        self.predict_return, self.predict_action = nn.Linear(d, 1), nn.Linear(d, 2)

    def forward(self, states, actions, returns_to_go, timesteps):
        b, t, _ = states.shape
        parts = (
            self.embed_return(returns_to_go),
            self.embed_state(states),
            self.embed_action(actions),
        )
        x = torch.stack([part + self.embed_timestep(timesteps) for part in parts], 1)
        x = x.permute(0, 2, 1, 3).reshape(b, 3 * t, -1).cumsum(1).reshape(b, t, 3, -1)
        return self.predict_action(x[:, :, 1]), self.predict_return(x[:, :, 2])


@case(
    (torch.zeros(4, 1, 12, 12), (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)), torch.zeros(4)),
    see__weight="conv",
    flat__weight="linear",
    lstm__weight_ih_l0="linear",
    actor__weight="head",
    critic__weight="head",
)
class Agent(nn.Module):
    """The state of a recurrent network among the arguments."""

    def __init__(self):
        super().__init__()
        self.see, self.lstm = nn.Conv2d(1, 4, 4, 4), nn.LSTM(8, 8)
        self.flat = nn.Linear(36, 8)
        self.actor, self.critic = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x, lstm_state, done):
        rows, found = lstm_state[0].shape[1], []
        steps = zip(
            self.flat(self.see(x).flatten(1)).view(-1, rows, 8), done.reshape(-1, rows), strict=True
        )
        for one, ended in steps:
            kept = tuple((1 - ended).view(1, -1, 1) * s for s in lstm_state)
            one, lstm_state = self.lstm(one.unsqueeze(0), kept)
            found.append(one)
        x = torch.cat(found).flatten(0, 1)
        return self.actor(x).argmax(-1), self.actor(x).log_softmax(-1), self.critic(x), lstm_state


@case(
    (torch.zeros(6, 3), torch.zeros(6, 3), torch.zeros(6, dtype=LONG)),
    points__weight="linear",
    density__weight="head",
    views__weight="linear",
    looks__weight="embedding",
    colours__weight="head",
)
class Radiance(nn.Module):
    """Points as rows, whose number of waves no module tells."""

    def __init__(self, w=16):
        super().__init__()
        self.points, self.density, self.looks = (
            nn.Linear(15, w),
            nn.Linear(w, 1),
            nn.Embedding(4, 4),
        )
        self.views, self.colours = nn.Linear(w + 19, 8), nn.Linear(8, 3)

    def waves(self, x):
        return torch.cat([x, *(f(k * x) for k in (1, 2) for f in (torch.sin, torch.cos))], -1)

    def forward(self, xyz, viewdirs, image_idx):
        x = self.points(self.waves(xyz)).relu()
        y = torch.cat([x, self.waves(viewdirs), self.looks(image_idx)], -1)
        return torch.cat([self.colours(self.views(y).relu()).sigmoid(), self.density(x).relu()], -1)


@case(
    (torch.zeros(2, 5, dtype=LONG),),
    words="embedding",
    places="embedding",
    maps="linear",
    keys="norm",
    back="linear",
    scores="head | in out",
)
class RawText(nn.Module):
    """Nothing but raw parameters: rows plus places are what the maps multiply."""

    def __init__(self, d=8, h=2):
        super().__init__()
        self.words, self.places, self.scores = raw(12, d), raw(10, d), raw(d, 12)
        self.maps, self.keys, self.back = raw(3, h, d, d // h), raw(h, 1, d // h), raw(h, d // h, d)

    def forward(self, tokens):
        x = F.layer_norm(self.words[tokens] + self.places[: tokens.shape[1]], (8,))
        q, k, v = torch.einsum("btd,chde->cbhte", x, self.maps)
        near = (q @ (k * self.keys).mT).softmax(-1)
        return (x + torch.einsum("bhte,hed->btd", near @ v, self.back)) @ self.scores


@case(
    (torch.zeros(2, 3, 16, 16), torch.zeros(2, 5, dtype=LONG)),
    see__weight="conv",
    near__weight="linear",
    start="embedding",
    words__weight="embedding",
    gates__weight="linear",
    scores__weight="head",
)
class Captions(nn.Module):
    """Weights of an attention are written into an output; gates multiply a first state."""

    def __init__(self, d=8):
        super().__init__()
        self.see, self.near, self.words = (
            nn.Conv2d(3, d, 4, 4),
            nn.Linear(d, 1),
            nn.Embedding(12, d),
        )
        self.start, self.gates, self.scores = raw(1, d), nn.Linear(2 * d, d), nn.Linear(d, 12)

    def forward(self, images, captions):
        x, words = self.see(images).flatten(2).mT, self.words(captions)
        state, weights = self.start.expand(len(x), -1), torch.zeros(*words.shape[:2], x.shape[1])
        found = []
        for t in range(words.shape[1]):
            share = self.near((x + words[:, t : t + 1]).tanh()).squeeze(2).softmax(1)
            seen = (x * share.unsqueeze(2)).sum(1)
            gate = self.gates(torch.cat([seen, words[:, t]], 1)).sigmoid()
            state = gate * state + (1 - gate) * seen
            weights[:, t] = share
            found.append(self.scores(state))
        return torch.stack(found, 1), weights


@case(
    (torch.zeros(2, 6),),
    style__weight="linear | (part=2 out) in",
    start="embedding",
    body__weight="conv",
    colours__weight="head",
)
class Canvas(nn.Module):
    """A learned image that is enlarged."""

    def __init__(self, d=5):
        super().__init__()
        self.style, self.start = nn.Linear(6, 2 * d), raw(1, d, 4, 4)
        self.body, self.colours = nn.Conv2d(d, d, 3, padding=1), nn.Conv2d(d, 3, 1)

    def forward(self, z):
        x = self.body(F.interpolate(self.start.repeat(len(z), 1, 1, 1), scale_factor=2))
        gain, offset = self.style(z)[..., None, None].chunk(2, 1)
        return self.colours(F.instance_norm(x) * (1 + gain) + offset).tanh()


@case(
    (torch.zeros(4, 6),),
    first__weight="linear",
    threshold="bias",
    depths="norm",
    layers__0__gain="norm",
    layers__1__gain="norm",
    last__weight="head",
)
class Thresholds(nn.Module):
    """What activations are compared with; a gain for each depth; one that the first layer skips."""

    class Layer(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.map, self.gain = nn.Linear(d, d), raw(d)

        def forward(self, x, skip=None):
            return self.map(x if skip is None else x + self.gain * skip).relu()

    def __init__(self, d=8):
        super().__init__()
        self.first, self.last, self.threshold, self.depths = (
            nn.Linear(6, d),
            nn.Linear(d, 6),
            raw(d),
            raw(2),
        )
        self.layers = nn.ModuleList(self.Layer(d) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        x = skip = x * (x > self.threshold).to(x.dtype)
        for i, layer in enumerate(self.layers):
            x = x * self.depths[i] + layer(x, skip if i else None)
        return self.last(x)
