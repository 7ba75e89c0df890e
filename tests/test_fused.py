"""Layouts of fused maps, against what the modelling code multiplies."""

import importlib
import re

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_normopt import Layout, classify, operator_norm

SPECTRAL = operator_norm("rms", "rms")


def build(folder, owner, config, args=(), **changes):
    """A module of transformers, without memory."""
    models = f"transformers.models.{folder}"
    modeling = importlib.import_module(f"{models}.modeling_{folder}")
    if config is not None:
        configuration = importlib.import_module(f"{models}.configuration_{folder}")
        args = (getattr(configuration, config)(**changes), *args)
    with torch.device("meta"):
        return getattr(modeling, owner)(*args)


def axes(owner, inputs=None):
    """The layouts of an owner's matrices that hold several maps, by path."""
    return {
        spec.name.removesuffix(".weight"): str(spec.layout)
        for spec in classify(owner, inputs=inputs)
        if spec.role in ("linear", "conv", "head") and re.search("part|[(]out", str(spec.layout))
    }


def in_heads(owner, inputs=None):
    """The layouts of an owner's matrices with heads as operators of their own."""
    return {
        spec.name.removesuffix(".weight"): str(spec.layout)
        for spec in classify(owner, inputs=inputs, heads=True)
        if "head" in str(spec.layout) and spec.role != "bias"
    }


# Idioms, as an architecture in no release may write them


def rotated(x):
    """A rotation of pairs, as of positions."""
    first, second = x.chunk(2, dim=-1)
    angles = torch.arange(x.shape[-2])[:, None] * torch.ones(first.shape[-1])
    return torch.cat(
        [
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ],
        dim=-1,
    )


class Unreleased(nn.Module):
    """Divides many projections in many ways."""

    def __init__(self, heads=4, dim=6):
        super().__init__()
        self.heads, self.dim, width = heads, dim, heads * dim
        self.qkv = nn.Linear(width, 3 * width)
        self.grouped = nn.Linear(width, 2 * (heads // 2 + 2) * dim)
        self.kv = nn.ModuleList([nn.Linear(width, 2 * width)])
        self.rotated = nn.Linear(width, width)
        self.glu = nn.Sequential(nn.Conv1d(width, 2 * width, 1), nn.GLU(1))
        self.gate_up = nn.Parameter(torch.ones(2, width, 2 * width))
        self.einsum = nn.Parameter(torch.ones(width, heads, dim))
        self.fused = nn.Parameter(torch.ones(3, heads, width, dim))
        self.plain = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        x = x + self.glu(x.mT).mT
        q, k, v = (
            y.transpose(1, 2)
            for y in self.qkv(x).view(batch, length, self.heads, 3, self.dim).unbind(dim=-2)
        )
        groups = self.grouped(x).unflatten(-1, (-1, self.heads // 2 + 2, self.dim))
        q2, k2, v2 = groups.split([self.heads // 2, 1, 1], dim=-2)
        q2 = q2.flatten(2, 3).transpose(1, 2)
        k2, v2 = (y.expand_as(groups[..., :2, :]).flatten(2, 3).transpose(1, 2) for y in (k2, v2))
        k3, v3 = (t.contiguous() for t in self.kv[0](x).chunk(2, dim=-1))
        k3, v3 = (y.reshape(batch, length, self.heads, -1).transpose(1, 2) for y in (k3, v3))
        a = self.rotated(x).view(batch, length, -1, self.dim).transpose(1, 2)
        a = torch.cat([rotated(a[..., :4]), a[..., 4:]], dim=-1)
        gate_up = torch.bmm(x, self.gate_up)
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        q4, k4, v4 = torch.einsum("bld,shde->sbhle", x, self.fused)
        attended = attend(q, k, v) + attend(q2, k2, v2) + attend(a, k3, v3) + attend(q4, k4, v4)
        x = self.out(attended.transpose(1, 2).reshape(batch, length, width))
        heads = torch.einsum("bld,dhe->blhe", x, self.einsum).flatten(2)
        return self.plain(x * gate * up) @ self.plain.weight + heads


attend = nn.functional.scaled_dot_product_attention


def test_idioms_of_no_release():
    owner, inputs = Unreleased(), (torch.zeros(2, 5, 24),)
    assert axes(owner, inputs) == {
        "qkv": "(out0=4 part=3 out1) in",
        "grouped": "(out0=2 out1=12+6+6) in",
        "kv.0": "(part=2 out) in",
        "glu.0": "(part=2 out) in tap=1",
        "gate_up": "stack in (out part=2)",
        "fused": "part out1 in out2",
    }
    layouts = {spec.name: str(spec.layout) for spec in classify(owner, inputs=inputs)}
    assert layouts["einsum"] == "in out0 out1"
    assert in_heads(owner, inputs)["qkv"] == "(head=4 part=3 out) in"


class GEGLU(nn.Module):
    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return x * nn.functional.gelu(gate)


class Transformer(nn.Module):
    """Its feed-forwards have no class of their own."""

    def __init__(self, width=24):
        super().__init__()
        layers = (nn.LayerNorm(width), nn.Linear(width, 4 * width), GEGLU(), nn.Linear(48, width))
        self.layers = nn.ModuleList([nn.Sequential(*layers)])

    def forward(self, x):
        for feed_forward in self.layers:
            x = feed_forward(x) + x
        return x


class Cell(nn.Module):
    """Two products are added, then divided."""

    def __init__(self, width=24):
        super().__init__()
        self.of_input = nn.Linear(width, 4 * width)
        self.of_state = nn.Linear(width, 4 * width)

    def forward(self, x, h, c):
        i, f, g, o = (self.of_input(x) + self.of_state(h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Adapted(nn.Module):
    """LoRA by hand."""

    def __init__(self, width, outputs):
        super().__init__()
        self.base = nn.Linear(width, outputs)
        self.down, self.up = nn.Linear(width, 2), nn.Linear(2, outputs)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * 0.5


class Modulated(nn.Module):
    """A block of a diffusion transformer; its modulation has one axis less than its tokens."""

    def __init__(self, heads=4, width=24):
        super().__init__()
        self.heads, self.width = heads, width
        self.q, self.kv = nn.Linear(width, width), Adapted(width, 2 * width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def attention(self, x):
        batch, length, channels = x.shape
        q = self.q(x).reshape(batch, length, self.heads, channels // self.heads).transpose(1, 2)
        kv = self.kv(x).reshape(batch, -1, 2, self.heads, channels // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        return attend(q, k, v).transpose(1, 2).reshape(x.shape)

    def forward(self, x, condition):
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)
        y = self.attention(x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        return x + gate.unsqueeze(1) * y


class Stages(nn.Module):
    """Collects maps in a list; slices without a space; unpacks the rest."""

    def __init__(self, width=24):
        super().__init__()
        self.width = width
        self.stem, self.stages = nn.Conv2d(3, 2 * width, 1), nn.ModuleList([nn.Conv2d(24, 24, 3)])
        self.sliced, self.in_proj = nn.Linear(width, 2 * width), nn.Linear(width, 3 * width)

    def forward(self, image, x):
        maps = list(self.stem(image).chunk(2, 1))
        maps.extend(stage(maps[-1].exp()) for stage in self.stages)
        y, d = self.sliced(x), self.width
        a, b = y[:,:,:d], y[:,:,d:]  # fmt: skip
        *gates, v = self.in_proj(x).split(d, dim=-1)
        for gate in gates:
            v = v * gate
        return maps[0].sum() + maps[-1].sum(), a * b, v


X, IMAGE = torch.zeros(2, 5, 24), torch.zeros(2, 24, 5, 5)


@pytest.mark.parametrize(
    ("owner", "inputs", "expected"),
    [
        (
            Cell,
            (X[:, 0], X[:, 1], X[:, 2]),
            {"of_input": "(part=4 out) in", "of_state": "(part=4 out) in"},
        ),
        (
            Modulated,
            (X, X[:, 0]),
            {
                "kv.base": "(part=2 out) in",
                "kv.up": "(part=2 out) in",
                "modulation.1": "(part=3 out) in",
            },
        ),
        (
            Stages,
            (torch.zeros(2, 3, 5, 5), X),
            {
                "stem": "(part=2 out) in tap=1 tap=1",
                "sliced": "(part=2 out) in",
                "in_proj": "(part=3 out) in",
            },
        ),
    ],
)
def test_styles_of_no_release(owner, inputs, expected):
    assert axes(owner(), inputs) == expected


def test_feed_forward_without_a_class():
    found = {spec.name: str(spec.layout) for spec in classify(Transformer())}
    assert found["layers.0.1.weight"] == "(part=2 out) in"
    assert found["layers.0.3.weight"] == "out in"


def test_same_class_of_other_sizes():
    """What is in a Sequential is asked too."""

    class Trunk(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.out = nn.Linear(sizes[0], 2)
            self.net, self.sizes = nn.Sequential(nn.Linear(8, sum(sizes)), nn.ReLU()), sizes

        def forward(self, x):
            a, b = self.net(x).split(list(self.sizes), -1)
            return self.out(a), b

    assert axes(Trunk(4, 6)) == {"net.0": "(out=4+6) in"}
    assert axes(Trunk(2, 8)) == {"net.0": "(out=2+8) in"}


def test_layer_under_peft_and_in_a_refined_class():
    """PEFT replaces the matrix, FSDP2 the module's class."""
    from peft import LoraConfig, get_peft_model

    model = transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**TINY))
    expected = axes(model)["layers.0.attention.query_key_value"]
    assert expected == "(out0=4 part=3 out1) in"
    attention = model.layers[0].attention
    attention.__class__ = type("FSDPGPTNeoXAttention", (type(attention),), {})
    get_peft_model(model, LoraConfig(target_modules=["query_key_value"]))
    model.requires_grad_(True)
    assert axes(model)["layers.0.attention.query_key_value.base_layer"] == expected


def test_stored_experts():
    dbrx = build("dbrx", "DbrxExpertGLU", "DbrxFFNConfig", hidden_size=8)
    layouts = {spec.name: str(spec.layout) for spec in classify(dbrx)}
    assert layouts == {
        "w1": "(expert=4 out) in",
        "v1": "(expert=4 out) in",
        "w2": "(expert=4 in) out",
    }


def test_heads():
    """Of whole models, as attentions take what only their model makes."""

    def of(name, config, **changes):
        with torch.device("meta"):
            model = getattr(transformers, name)(getattr(transformers, config)(**changes))
        return {
            name.split(".", 2)[-1]: layout
            for name, layout in in_heads(model).items()
            if re.search(r"(layers?|h|block|blocks)[.]0[.]", name)
        }

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32}
    llama = of("LlamaModel", "LlamaConfig", **sizes, num_key_value_heads=2)
    assert llama == {
        "self_attn.q_proj": "(head=4 out) in",
        "self_attn.k_proj": "(head=2 out) in",
        "self_attn.v_proj": "(head=2 out) in",
        "self_attn.o_proj": "out (head=4 in)",
    }
    assert of("GPT2Model", "GPT2Config", n_layer=1, n_head=4, n_embd=32) == {
        "attn.c_attn": "in (part=3 head=4 out)",
        "attn.c_proj": "(head=4 in) out",
    }
    bert = of("BertModel", "BertConfig", **sizes)
    assert {name.rpartition(".")[2]: layout for name, layout in bert.items()} == {
        "query": "(head=4 out) in",
        "key": "(head=4 out) in",
        "value": "(head=4 out) in",
        "dense": "out (head=4 in)",
    }
    t5 = of("T5EncoderModel", "T5Config", num_layers=1, d_model=32, d_kv=8, num_heads=4)
    assert {name.rpartition(".")[2]: layout for name, layout in t5.items()} == {
        "q": "(head=4 out) in",
        "k": "(head=4 out) in",
        "v": "(head=4 out) in",
        "o": "out (head=4 in)",
    }
    neox = of("GPTNeoXModel", "GPTNeoXConfig", **sizes)
    assert neox["attention.query_key_value"] == "(head=4 part=3 out) in"
    mla = of(
        "DeepseekV3Model",
        "DeepseekV3Config",
        **sizes,
        num_key_value_heads=4,
        first_k_dense_replace=1,
    )
    assert mla == {
        "self_attn.q_b_proj": "(head=4 out) in",
        "self_attn.kv_b_proj": "(head=4 part=2 out) in",
        "self_attn.o_proj": "out (head=4 in)",
    }
    changes = {"new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 2}
    falcon = of("FalconModel", "FalconConfig", hidden_size=64, num_hidden_layers=1, **changes)
    assert falcon["self_attention.query_key_value"] == "(head0=2 head1=4+1+1 out=8) in"


# Operators compute what the model computes

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 50,
}


def layouts(model):
    return {spec.name: spec.layout for spec in classify(model)}


def maps(layout, weight, bias, x):
    """Outputs of a matrix's operators, each (..., batch, length, fan_out)."""
    outputs = []
    bias_layout = Layout(str(layout).replace(" in", "").replace("in ", ""))
    biases = bias_layout.to_operators(bias) if bias is not None else [None] * 9
    for operator, offset in zip(layout.to_operators(weight), biases, strict=False):
        flat = operator.reshape(-1, *operator.shape[-2:])
        offsets = [0] * len(flat) if offset is None else offset.reshape(len(flat), -1)
        outputs += [x @ one.T + by for one, by in zip(flat, offsets, strict=True)]
    return outputs


@pytest.fixture
def capture(monkeypatch):
    """What attentions receive as queries, keys and values, with rotations switched off."""
    seen = []

    def attention(module, query, key, value, *_, **__):
        seen.append([x.transpose(1, 2).flatten(2) for x in (query, key, value)])
        out = torch.ones(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        return out, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "capture", attention)
    return seen


ROTATIONS = {"position_embeddings": (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))}


@pytest.mark.parametrize(
    ("model", "changes", "attention", "path", "arguments"),
    [
        ("GPT2", {}, "h.0.attn", "c_attn", {}),
        ("GPTNeoX", {}, "layers.0.attention", "query_key_value", ROTATIONS),
        ("GPTBigCode", {}, "h.0.attn", "c_attn", {}),
        ("GPTBigCode", {"multi_query": False}, "h.0.attn", "c_attn", {}),
        (
            "Phi3",
            {"num_key_value_heads": 2, "pad_token_id": 0},
            "layers.0.self_attn",
            "qkv_proj",
            ROTATIONS,
        ),
        ("ModernBert", {"pad_token_id": 0}, "layers.0.attn", "Wqkv", ROTATIONS),
    ],
)
def test_query_key_and_value_are_what_attention_receives(
    capture, model, changes, attention, path, arguments
):
    make, config = (getattr(transformers, f"{model}{what}") for what in ("Model", "Config"))
    layout = layouts(make(config(**TINY, **changes)))[f"{attention}.{path}.weight"]
    model = make(config(**TINY, **changes, attn_implementation="capture")).eval()
    owner = model.get_submodule(attention)
    projection = owner.get_submodule(path)
    if projection.bias is not None:
        nn.init.normal_(projection.bias)
    x = torch.randn(1, 3, 32)
    extra = (
        {"attention_mask": None} if "attention_mask" in owner.forward.__code__.co_varnames else {}
    )
    owner(x, **arguments, **extra)
    expected = maps(layout, projection.weight, projection.bias, x)
    assert len(expected) == 3
    for one, received in zip(expected, capture[-1], strict=True):
        torch.testing.assert_close(one, received)


def test_query_key_and_value_of_bloom():
    config = transformers.BloomConfig(**TINY | {"n_head": 4})
    model = transformers.BloomModel(config)
    owner = model.h[0].self_attention
    x = torch.randn(1, 3, 32)
    received = owner._reshape(owner.query_key_value(x))
    layout = layouts(model)["h.0.self_attention.query_key_value.weight"]
    expected = maps(layout, owner.query_key_value.weight, owner.query_key_value.bias, x)
    for one, by_head in zip(expected, received, strict=True):
        torch.testing.assert_close(one, by_head.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "changes",
    [
        {"multi_query": True},
        {"multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ],
)
def test_query_key_and_value_of_falcon(changes):
    config = transformers.FalconConfig(**TINY, **changes)
    model = transformers.FalconModel(config)
    owner = model.h[0].self_attention
    x = torch.randn(1, 3, 32)
    received = owner._split_heads(owner.query_key_value(x))
    layout = layouts(model)["h.0.self_attention.query_key_value.weight"]
    expected = maps(layout, owner.query_key_value.weight, owner.query_key_value.bias, x)
    for one, by_head in zip(expected, received, strict=True):
        by_head = by_head.flatten(2)
        if by_head.shape != one.shape:  # keys are repeated for the queries of their group
            by_head = by_head.reshape(1, 3, 2, 2, 8)[:, :, :, 0].flatten(2)
        torch.testing.assert_close(one, by_head)


def received(module):
    """The arguments that a module is called with."""
    calls = []
    module.register_forward_pre_hook(lambda _, args: calls.append(args))
    return calls


def test_maps_of_deepseek(capture):
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 6, "v_head_dim": 10}
    changes = TINY | sizes | {"qk_rope_head_dim": 8, "rope_interleave": False}
    config = transformers.DeepseekV3Config(**changes, attn_implementation="capture")
    found = layouts(transformers.DeepseekV3Model(transformers.DeepseekV3Config(**changes)))
    model = transformers.DeepseekV3Model(config)
    owner, x = model.layers[0].self_attn, torch.randn(1, 3, 32)
    owner(x, attention_mask=None, **ROTATIONS)
    at = "layers.0.self_attn"
    compress, matrix = found[f"{at}.kv_a_proj_with_mqa.weight"], owner.kv_a_proj_with_mqa.weight
    latent, k_rot = maps(compress, matrix, None, x)
    latent = owner.kv_a_layernorm(latent)
    k, v = maps(found[f"{at}.kv_b_proj.weight"], owner.kv_b_proj.weight, None, latent)
    _, key, value = capture[-1]
    by_head = key.unflatten(-1, (4, 14))
    torch.testing.assert_close(by_head[..., :6].flatten(2), k)
    torch.testing.assert_close(by_head[..., 6:], k_rot.unsqueeze(2).expand(1, 3, 4, 8))
    torch.testing.assert_close(value, v)


def test_query_and_gate_of_qwen3_next(capture):
    changes = TINY | {"head_dim": 8, "num_key_value_heads": 2, "layer_types": ["full_attention"]}
    config = transformers.Qwen3NextConfig(**changes, attn_implementation="capture")
    plain = transformers.Qwen3NextModel(transformers.Qwen3NextConfig(**changes))
    model = transformers.Qwen3NextModel(config)
    owner, x = model.layers[0].self_attn, torch.randn(1, 3, 32)
    gated = received(owner.o_proj)
    owner(x, attention_mask=None, **ROTATIONS)
    layout = layouts(plain)["layers.0.self_attn.q_proj.weight"]
    query, gate = maps(layout, owner.q_proj.weight, None, x)
    normed = owner.q_norm(query.unflatten(-1, (4, 8))).flatten(2)
    torch.testing.assert_close(capture[-1][0], normed)
    torch.testing.assert_close(gated[0][0], torch.sigmoid(gate))


def test_maps_of_mamba2(monkeypatch):
    config = transformers.Mamba2Config(
        hidden_size=16,
        num_heads=4,
        head_dim=8,
        state_size=6,
        n_groups=2,
        num_hidden_layers=1,
        vocab_size=50,
        chunk_size=4,
    )
    model = transformers.Mamba2Model(config)
    owner, x = model.layers[0].mixer, torch.randn(1, 4, 16)
    modeling, convolved, gated = (
        transformers.models.mamba2.modeling_mamba2,
        [],
        received(owner.norm),
    )
    convolve = modeling.causal_conv1d_fn
    monkeypatch.setattr(
        modeling,
        "causal_conv1d_fn",
        lambda y, *args, **kwargs: convolved.append(y) or convolve(y, *args, **kwargs),
    )
    owner(x)
    layout = layouts(model)["layers.0.mixer.in_proj.weight"]
    gate, *hidden_b_c, _ = maps(layout, owner.in_proj.weight, None, x)
    assert [y.shape[-1] for y in hidden_b_c] == [32, 12, 12]
    torch.testing.assert_close(gated[0][1], gate)
    torch.testing.assert_close(convolved[0].mT, torch.cat(hidden_b_c, dim=-1))


def test_gate_and_up_of_gpt_oss():
    experts = build("gpt_oss", "GptOssExperts", "GptOssConfig", num_local_experts=2, **TINY)
    experts = experts.to_empty(device="cpu")
    nn.init.normal_(experts.gate_up_proj)
    (operators,) = classify(experts)[0].layout.to_operators(experts.gate_up_proj)
    x = torch.randn(3, 32)
    y = x @ experts.gate_up_proj[1]  # as its forward multiplies, and then divides
    torch.testing.assert_close(x @ operators[1, 0].T, y[..., ::2])
    torch.testing.assert_close(x @ operators[1, 1].T, y[..., 1::2])


# An LMO through a layout is the LMO of the separate matrices


def lmo(layout, stored):
    pieces = tuple(SPECTRAL.lmo(piece) for piece in layout.to_operators(stored))
    return layout.from_operators(pieces, tuple(stored.shape))


def test_gpt2_is_the_same_model_with_linear():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY))
    found = layouts(model)
    for name, weight in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            parts = weight.T.chunk(3) if "c_attn" in name else [weight.T]
            expected = torch.cat([SPECTRAL.lmo(part) for part in parts])
            torch.testing.assert_close(lmo(found[name], weight).T, expected)


def test_phi3_is_llama_with_fused_projections():
    changes = TINY | {"num_key_value_heads": 2, "pad_token_id": 0}
    fused = transformers.Phi3Model(transformers.Phi3Config(**changes))
    llama = transformers.LlamaModel(transformers.LlamaConfig(**changes)).layers[0]
    attention, mlp = llama.self_attn, llama.mlp
    separate = {
        "layers.0.self_attn.qkv_proj.weight": (
            attention.q_proj.weight,
            attention.k_proj.weight,
            attention.v_proj.weight,
        ),
        "layers.0.mlp.gate_up_proj.weight": (mlp.gate_proj.weight, mlp.up_proj.weight),
    }
    found = layouts(fused)
    for name, weights in separate.items():
        expected = torch.cat([SPECTRAL.lmo(weight) for weight in weights])
        assert fused.get_parameter(name).shape == expected.shape
        torch.testing.assert_close(lmo(found[name], torch.cat(weights)), expected)


def test_mixtral_is_a_list_of_experts():
    config = transformers.MixtralConfig(**TINY, num_local_experts=3)
    model = transformers.MixtralModel(config)
    found = layouts(model)
    name = "layers.0.mlp.experts.gate_up_proj"
    stored = model.get_parameter(name)
    expected = [[SPECTRAL.lmo(part) for part in expert.chunk(2)] for expert in stored]
    expected = torch.stack([torch.cat(parts) for parts in expected])
    torch.testing.assert_close(lmo(found[name], stored), expected)
