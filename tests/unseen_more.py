"""More modules in no release, as a stranger would write them: the second half of `CASES`."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.unseen_modules import case

LONG = torch.long


class GATLayer(nn.Module):
    """Scores of nodes are sums of products with a vector of each head."""

    def __init__(self, n_in, n_out, heads):
        super().__init__()
        self.heads, self.n_out = heads, n_out
        self.lin = nn.Linear(n_in, heads * n_out, bias=False)
        self.att_src = nn.Parameter(torch.zeros(1, heads, n_out))
        self.att_dst = nn.Parameter(torch.zeros(1, heads, n_out))
        self.bias = nn.Parameter(torch.zeros(heads * n_out))

    def forward(self, x, edge_index):
        src, dst = edge_index
        h = self.lin(x).view(-1, self.heads, self.n_out)
        a_src = (h * self.att_src).sum(-1)
        a_dst = (h * self.att_dst).sum(-1)
        alpha = F.leaky_relu(a_src[src] + a_dst[dst], 0.2).exp()
        denom = torch.zeros_like(a_src).index_add_(0, dst, alpha)
        alpha = alpha / (denom[dst] + 1e-9)
        out = torch.zeros_like(h).index_add_(0, dst, h[src] * alpha.unsqueeze(-1))
        return out.reshape(x.size(0), -1) + self.bias


@case(
    (torch.zeros(6, 10), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])),
    conv1__lin__weight="linear",
    conv1__att_src="linear",
    conv1__att_dst="linear",
    conv1__bias="bias",
    conv2__lin__weight="head",
)
class GAT(nn.Module):
    """Two layers of attention over the edges of a graph."""

    def __init__(self):
        super().__init__()
        self.conv1 = GATLayer(10, 8, 4)
        self.conv2 = GATLayer(32, 7, 1)

    def forward(self, x, edge_index):
        x = F.elu(self.conv1(x, edge_index))
        return self.conv2(x, edge_index)


@case(
    (torch.zeros(2, 6, 2),),
    embed__weight="linear",
    encoder__weight_ih_l0="linear",
    decoder__weight_ih="linear",
    W1__weight="linear",
    W2__weight="linear",
    v=("linear", "head"),
    start="embedding",
)
class PointerNet(nn.Module):
    """Scores of places, by products with one vector."""

    def __init__(self, d=16):
        super().__init__()
        self.embed = nn.Linear(2, d)
        self.encoder = nn.LSTM(d, d, batch_first=True)
        self.decoder = nn.LSTMCell(d, d)
        self.W1, self.W2 = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.v = nn.Parameter(torch.zeros(d))
        self.start = nn.Parameter(torch.zeros(d))

    def forward(self, points):
        x = self.embed(points)
        enc, (h, c) = self.encoder(x)
        h, c = h[0], c[0]
        inp = self.start.expand(x.size(0), -1)
        logits = []
        for _ in range(x.size(1)):
            h, c = self.decoder(inp, (h, c))
            u = torch.tanh(self.W1(enc) + self.W2(h).unsqueeze(1)) @ self.v
            logits.append(u)
            inp = x[torch.arange(x.size(0)), u.argmax(-1)]
        return torch.stack(logits, 1)


@case((torch.zeros(2, 5, 12),), inp__weight="linear", codes="embedding", out__weight="head")
class RawVQ(nn.Module):
    """One-hot vectors choose the rows of a codebook."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(12, 6)
        self.codes = nn.Parameter(torch.randn(9, 6))
        self.out = nn.Linear(6, 12)

    def forward(self, x):
        z = self.inp(x)
        idx = torch.cdist(z, self.codes.expand(len(z), -1, -1)).argmin(-1)
        q = F.one_hot(idx, 9).to(z.dtype) @ self.codes
        return self.out(z + (q - z).detach())


def posenc(x, n):
    out = [x]
    for i in range(n):
        out += [torch.sin(2.0**i * x), torch.cos(2.0**i * x)]
    return torch.cat(out, -1)


@case(
    (torch.zeros(10, 3), torch.zeros(10, 3)),
    layers__0__weight="linear",
    layers__2__weight="linear",
    sigma__weight="head",
    feat__weight="linear",
    view__weight="linear",
    rgb__weight="head",
)
class NeRF(nn.Module):
    """Colours and densities of points, from positions and directions."""

    def __init__(self, w=32, skip=2):
        super().__init__()
        self.skip = skip
        self.layers = nn.ModuleList(
            [nn.Linear(39, w), nn.Linear(w, w), nn.Linear(w + 39, w), nn.Linear(w, w)]
        )
        self.sigma = nn.Linear(w, 1)
        self.feat = nn.Linear(w, w)
        self.view = nn.Linear(w + 27, w // 2)
        self.rgb = nn.Linear(w // 2, 3)

    def forward(self, pts, dirs):
        p, d = posenc(pts, 6), posenc(dirs, 4)
        h = p
        for i, layer in enumerate(self.layers):
            if i == self.skip:
                h = torch.cat([h, p], -1)
            h = F.relu(layer(h))
        sigma = F.relu(self.sigma(h))
        h = F.relu(self.view(torch.cat([self.feat(h), d], -1)))
        return torch.cat([torch.sigmoid(self.rgb(h)), sigma], -1)


@case(
    (torch.zeros(2, 4, 5, dtype=LONG), torch.zeros(2, 5, dtype=LONG)),
    A__weight="embedding",
    C__weight="embedding",
    T_A="embedding",
    H__weight="linear",
    out__weight="head",
)
class MemN2N(nn.Module):
    """Sentences in a memory, which have places."""

    def __init__(self, vocab=40, d=12, hops=2):
        super().__init__()
        self.hops = hops
        self.A, self.C = nn.Embedding(vocab, d), nn.Embedding(vocab, d)
        self.T_A = nn.Parameter(torch.zeros(4, d))
        self.H = nn.Linear(d, d)
        self.out = nn.Linear(d, vocab)

    def forward(self, story, query):
        u = self.A(query).sum(1)
        m = self.A(story).sum(2) + self.T_A
        c = self.C(story).sum(2)
        for _ in range(self.hops):
            p = torch.einsum("bmd,bd->bm", m, u).softmax(-1)
            u = self.H(u) + torch.einsum("bm,bmd->bd", p, c)
        return self.out(u)


@case((torch.zeros(3, 20),), W1="linear", W2="linear", b1="bias", b3="bias")
class TiedAE(nn.Module):
    """The decoder's matrices are those of the encoder, transposed."""

    def __init__(self):
        super().__init__()
        self.W1 = nn.Parameter(torch.randn(10, 20))
        self.W2 = nn.Parameter(torch.randn(4, 10))
        self.b1, self.b2 = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(4))
        self.b3, self.b4 = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(20))

    def forward(self, x):
        h = torch.tanh(F.linear(x, self.W1, self.b1))
        z = F.linear(h, self.W2, self.b2)
        h = torch.tanh(F.linear(z, self.W2.t(), self.b3))
        return F.linear(h, self.W1.t(), self.b4)


@case(
    (torch.zeros(2, 6, dtype=LONG),),
    wte__weight="embedding",
    slopes=("norm", "scalar"),
    qkv__weight="linear | (part=3 out) in",
    o__weight="linear",
    head__weight="head",
)
class AlibiLM(nn.Module):
    """Each head has a slope, which multiplies distances."""

    def __init__(self, v=30, d=16, h=4):
        super().__init__()
        self.h = h
        self.wte = nn.Embedding(v, d)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.slopes = nn.Parameter(torch.tensor([2.0 ** -(i + 1) for i in range(h)]))
        self.head = nn.Linear(d, v)

    def forward(self, ids):
        x = self.wte(ids)
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.h, -1).transpose(1, 2) for z in self.qkv(x).split(d, -1))
        pos = torch.arange(t)
        bias = -(pos[:, None] - pos[None, :]).abs().float() * self.slopes.view(-1, 1, 1)
        s = q @ k.transpose(-1, -2) / math.sqrt(d // self.h) + bias
        s = s.masked_fill(pos[None, :] > pos[:, None], float("-inf"))
        x = x + self.o((s.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        return self.head(x)


@case(
    (torch.zeros(2, 8, dtype=LONG),),
    emb__weight="embedding",
    gru__weight_ih_l0="linear",
    word__weight="linear",
    context="linear",
    fc__weight="head",
)
class HAN(nn.Module):
    """A learned context vector, whose products with words are summed."""

    def __init__(self, v=50, d=12):
        super().__init__()
        self.emb = nn.Embedding(v, d)
        self.gru = nn.GRU(d, d, batch_first=True)
        self.word = nn.Linear(d, d)
        self.context = nn.Parameter(torch.zeros(d))
        self.fc = nn.Linear(d, 4)

    def forward(self, tokens):
        h, _ = self.gru(self.emb(tokens))
        u = torch.tanh(self.word(h))
        a = torch.softmax((u * self.context).sum(-1), dim=1)
        return self.fc((a.unsqueeze(-1) * h).sum(1))


@case(
    (torch.zeros(4, 5), torch.zeros(4, 2, dtype=LONG)),
    num_w=("embedding", "linear"),
    num_b=("embedding", "bias"),
    cats__0__weight="embedding",
    cls="embedding",
    enc__linear1__weight="linear",
    enc__self_attn__in_proj_weight="linear",
    head__weight="head",
)
class FTTransformer(nn.Module):
    """Each number becomes a vector of its own times that number."""

    def __init__(self, d=16):
        super().__init__()
        self.num_w, self.num_b = nn.Parameter(torch.zeros(5, d)), nn.Parameter(torch.zeros(5, d))
        self.cats = nn.ModuleList([nn.Embedding(7, d), nn.Embedding(3, d)])
        self.cls = nn.Parameter(torch.zeros(1, 1, d))
        self.enc = nn.TransformerEncoderLayer(d, 2, 32, batch_first=True)
        self.head = nn.Linear(d, 1)

    def forward(self, x_num, x_cat):
        x = x_num.unsqueeze(-1) * self.num_w + self.num_b
        c = torch.stack([e(x_cat[:, i]) for i, e in enumerate(self.cats)], 1)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x, c], 1)
        return self.head(self.enc(x)[:, 0])


@case(
    (torch.zeros(2, 3, 16, 16), torch.zeros(2, 16, dtype=torch.bool)),
    embed__weight="conv",
    mask_vec="embedding",
    pe="embedding",
    blk__weight="linear",
    decode__weight="head",
)
class SimMIM(nn.Module):
    """A mask places a learned vector."""

    def __init__(self, d=8):
        super().__init__()
        self.embed = nn.Conv2d(3, d, 4, 4)
        self.mask_vec = nn.Parameter(torch.zeros(d))
        self.pe = nn.Parameter(torch.zeros(1, 16, d))
        self.blk = nn.Linear(d, d)
        self.decode = nn.Linear(d, 48)

    def forward(self, img, mask):
        x = self.embed(img).flatten(2).transpose(1, 2)
        w = mask.unsqueeze(-1).type_as(x)
        x = x * (1 - w) + self.mask_vec * w
        return self.decode(F.relu(self.blk(x + self.pe)))


@case(
    (torch.zeros(2, 6, 8),),
    wx__weight="linear",
    gate_in__weight="linear",
    lam="other",
    out__weight="head",
)
class RGLRU(nn.Module):
    """Rates of a recurrence, which no name tells."""

    def __init__(self, d=8):
        super().__init__()
        self.wx, self.gate_in, self.gate_rec = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.lam = nn.Parameter(torch.ones(d))
        self.out = nn.Linear(d, d)

    def forward(self, x):
        r, i = torch.sigmoid(self.gate_rec(x)), torch.sigmoid(self.gate_in(x))
        log_a = -8.0 * r * F.softplus(self.lam)
        a = torch.exp(log_a)
        u = torch.sqrt(1 - a**2) * i * self.wx(x)
        h, ys = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + u[:, t]
            ys.append(h)
        return self.out(torch.stack(ys, 1))


@case(
    (torch.zeros(6, 8), torch.zeros(2, 5, dtype=LONG), torch.zeros(5, dtype=LONG)),
    bases="linear",
    comp=("linear", "other", "embedding", "norm"),
    root__weight="linear",
    cls__weight="head",
)
class RGCN(nn.Module):
    """Matrices of relations are mixtures of a few."""

    def __init__(self, rel=3, nb=2, i=8, o=6):
        super().__init__()
        self.bases = nn.Parameter(torch.zeros(nb, i, o))
        self.comp = nn.Parameter(torch.zeros(rel, nb))
        self.root = nn.Linear(i, o)
        self.cls = nn.Linear(o, 4)

    def forward(self, x, edge_index, edge_type):
        w = torch.einsum("rb,bio->rio", self.comp, self.bases)
        msg = torch.bmm(x[edge_index[0]].unsqueeze(1), w[edge_type]).squeeze(1)
        agg = torch.zeros(x.size(0), msg.size(1)).index_add(0, edge_index[1], msg)
        return self.cls(F.relu(self.root(x) + agg))


@case(
    (torch.zeros(2, 5, 6),),
    ctrl__weight_ih="linear",
    key__weight="linear",
    memory="embedding",
    out__weight="head",
)
class NTM(nn.Module):
    """A learned memory, repeated for each row and written to."""

    def __init__(self):
        super().__init__()
        self.ctrl = nn.LSTMCell(6 + 8, 16)
        self.key, self.erase, self.add = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 8)
        self.memory = nn.Parameter(torch.zeros(10, 8))
        self.out = nn.Linear(16 + 8, 4)

    def forward(self, x):
        b = x.size(0)
        m = self.memory.unsqueeze(0).repeat(b, 1, 1)
        h, c, r, ys = torch.zeros(b, 16), torch.zeros(b, 16), torch.zeros(b, 8), []
        for t in range(x.size(1)):
            h, c = self.ctrl(torch.cat([x[:, t], r], -1), (h, c))
            w = F.softmax(F.cosine_similarity(m, self.key(h).unsqueeze(1), dim=-1), -1).unsqueeze(
                -1
            )
            r = (w * m).sum(1)
            m = m * (1 - w * torch.sigmoid(self.erase(h)).unsqueeze(1)) + w * torch.tanh(
                self.add(h)
            ).unsqueeze(1)
            ys.append(self.out(torch.cat([h, r], -1)))
        return torch.stack(ys, 1)


@case(
    (torch.zeros(3, 11),),
    body__0__weight="linear",
    mu__weight="head",
    log_std=("bias", "other", "norm"),
    critic__2__weight="head",
)
class ActorCritic(nn.Module):
    """Deviations that depend on no input."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(11, 16), nn.Tanh())
        self.mu = nn.Linear(16, 3)
        self.log_std = nn.Parameter(torch.zeros(3))
        self.critic = nn.Sequential(nn.Linear(11, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, obs):
        mu = self.mu(self.body(obs))
        std = self.log_std.exp().expand_as(mu)
        return mu, std, self.critic(obs).squeeze(-1)


@case(
    (torch.zeros(2, 3, 16, 16),),
    enc__weight="conv",
    logits__weight="conv",
    book="embedding",
    dec__weight="head",
)
class GumbelVQ(nn.Module):
    """Samples choose the rows of a codebook, gradients passed through."""

    def __init__(self):
        super().__init__()
        self.enc, self.logits = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 12, 1)
        self.book = nn.Parameter(torch.zeros(12, 6))
        self.dec = nn.ConvTranspose2d(6, 3, 4, 4)

    def forward(self, x):
        scores = self.logits(F.relu(self.enc(x)))
        z = F.gumbel_softmax(scores, tau=1.0, hard=True, dim=1)
        q = torch.einsum("bkhw,kd->bdhw", z, self.book)
        return self.dec(q)


@case(
    (torch.zeros(2, 3, 16, 16), torch.zeros(2, 6, dtype=LONG)),
    stem__weight="conv",
    words__weight="embedding",
    rnn__weight_ih_l0="linear",
    film__weight="linear | (part=2 out) in",
    conv__weight="conv",
    cls__2__weight="head",
)
class FiLM(nn.Module):
    """A question shifts and scales the features of an image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.words = nn.Embedding(20, 10)
        self.rnn = nn.GRU(10, 12, batch_first=True)
        self.film = nn.Linear(12, 16)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8, affine=False)
        self.cls = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, image, question):
        _, h = self.rnn(self.words(question))
        gamma, beta = self.film(h[0]).chunk(2, -1)
        x = self.stem(image)
        y = self.bn(self.conv(x)) * (1 + gamma[:, :, None, None]) + beta[:, :, None, None]
        return self.cls((x + F.relu(y)).amax((2, 3)))
