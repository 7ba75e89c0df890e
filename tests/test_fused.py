"""Layouts of fused maps, against what the modelling code multiplies."""

import importlib

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_normopt import Layout, classify, operator_norm
from hf_normopt.roles.architectures import fused_axis, head_axes, stored_layout
from hf_normopt.roles.fused import matrices

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


def axes(owner):
    """The fused axes of an owner, by path."""
    paths = matrices(owner)
    return {path: row.axis(owner) for path in paths if (row := fused_axis(owner, path))}


# Each row was compared with the lines of transformers 5.23 that divide the owner's map.
OWNERS = [
    ("aria", "AriaExperts", "AriaTextConfig", (), {"gate_up_proj": "(part=2 out)"}),
    (
        "axk2",
        "AXK2Attention",
        "AXK2Config",
        (0,),
        {
            "q_gate_proj": "(out0=32 out1=96+64)",
            "kv_a_proj_with_mqa": "(out=128+32)",
            "kv_b_proj": "(out0=32 part=2 out1)",
        },
    ),
    ("bamba", "BambaMixer", "BambaConfig", (0,), {"in_proj": "(out=8192+8192+256+256+128)"}),
    ("bark", "BarkSelfAttention", "BarkSubModelConfig", (), {"att_proj": "(part=3 out)"}),
    ("blip", "BlipAttention", "BlipVisionConfig", (), {"qkv": "(part=3 out)"}),
    (
        "bloom",
        "BloomAttention",
        "BloomConfig",
        (0,),
        {"query_key_value": "(out0=8 part=3 out1)"},
    ),
    ("clvp", "ClvpGatedLinearUnit", "ClvpEncoderConfig", (), {"proj": "(part=2 out)"}),
    ("codegen", "CodeGenAttention", "CodeGenConfig", (), {"qkv_proj": "(out0=4 part=3 out1)"}),
    (
        "cohere2_vision",
        "Cohere2VisionMultiModalProjector",
        "Cohere2VisionConfig",
        (),
        {"linear_1": "(part=2 out)"},
    ),
    (
        "deepseek_v2",
        "DeepseekV2Attention",
        "DeepseekV2Config",
        (0,),
        {"kv_a_proj_with_mqa": "(out=512+64)", "kv_b_proj": "(out0=32 part=2 out1)"},
    ),
    (
        "deepseek_v3",
        "DeepseekV3Attention",
        "DeepseekV3Config",
        (0,),
        {"kv_a_proj_with_mqa": "(out=512+64)", "kv_b_proj": "(out0=128 part=2 out1)"},
    ),
    ("deepseek_v32", "DeepseekV32Indexer", "DeepseekV32Config", (0,), {}),  # rotated in part
    (
        "deepseek_v4",
        "DeepseekV4CSACompressor",
        "DeepseekV4Config",
        (),
        {"kv_proj": "(part=2 out)", "gate_proj": "(part=2 out)"},
    ),
    ("dia", "DiaMLP", "DiaEncoderConfig", (), {"gate_up_proj": "(part=2 out)"}),
    ("diffllama", "DiffLlamaAttention", "DiffLlamaConfig", (0,), {}),
    (
        "exaone4_5",
        "Exaone4_5_VisionAttention",
        "Exaone4_5_VisionConfig",
        (),
        {"qkv": "(out=3584+1792+1792)"},
    ),
    ("falcon", "FalconAttention", "FalconConfig", (), {"query_key_value": "(out=4544+64+64)"}),
    (
        "falcon_mamba",
        "FalconMambaMixer",
        "FalconMambaConfig",
        (0,),
        {"in_proj": "(part=2 out)", "x_proj": "(out=48+16+16)"},
    ),
    (
        "florence2",
        "Florence2VisionChannelAttention",
        "Florence2VisionConfig",
        (0,),
        {"qkv": "(part=3 out)"},
    ),
    (
        "gemma3n",
        "Gemma3nAudioConformerLightConv1d",
        "Gemma3nAudioConfig",
        (),
        {"linear_start": "(part=2 out)"},
    ),
    ("glm", "GlmMLP", "GlmConfig", (), {"gate_up_proj": "(part=2 out)"}),
    ("glm4v", "Glm4vVisionAttention", "Glm4vVisionConfig", (), {"qkv": "(part=3 out)"}),
    ("gpt2", "GPT2Attention", "GPT2Config", (), {"c_attn": "(part=3 out)"}),
    ("gpt_bigcode", "GPTBigCodeAttention", "GPTBigCodeConfig", (), {"c_attn": "(out=768+64+64)"}),
    (
        "gpt_neox",
        "GPTNeoXAttention",
        "GPTNeoXConfig",
        (),
        {"query_key_value": "(out0=64 part=3 out1)"},
    ),
    (
        "gpt_neox_japanese",
        "GPTNeoXJapaneseAttention",
        "GPTNeoXJapaneseConfig",
        (),
        {"query_key_value": "(out0=32 part=3 out1)"},
    ),
    ("gpt_oss", "GptOssExperts", "GptOssConfig", (), {"gate_up_proj": "(out part=2)"}),
    (
        "granite_speech",
        "GraniteSpeechConformerAttention",
        "GraniteSpeechEncoderConfig",
        (),
        {"to_kv": "(part=2 out)"},
    ),
    (
        "granitemoehybrid",
        "GraniteMoeHybridMLP",
        "GraniteMoeHybridConfig",
        (),
        {"input_linear": "(part=2 out)"},
    ),
    ("imagegpt", "ImageGPTAttention", "ImageGPTConfig", (), {"c_attn": "(part=3 out)"}),
    ("jetmoe", "JetMoeAttention", "JetMoeConfig", (), {"kv_proj": "(part=2 out)"}),
    (
        "kimi_linear",
        "KimiLinearAttention",
        "KimiLinearConfig",
        (0,),
        {"kv_a_proj_with_mqa": "(out=512+64)", "kv_b_proj": "(out0=32 part=2 out1)"},
    ),
    ("lfm2", "Lfm2ShortConv", "Lfm2Config", (0,), {"in_proj": "(part=3 out)"}),
    ("lightglue", "LightGlueMatchAssignmentLayer", "LightGlueConfig", (), {}),
    ("llama", "LlamaAttention", "LlamaConfig", (0,), {}),
    ("llama4", "Llama4TextExperts", "Llama4TextConfig", (), {"gate_up_proj": "(part=2 out)"}),
    (
        "mamba",
        "MambaMixer",
        "MambaConfig",
        (0,),
        {"in_proj": "(part=2 out)", "x_proj": "(out=48+16+16)"},
    ),
    (
        "mamba2",
        "Mamba2Mixer",
        "Mamba2Config",
        (0,),
        {"in_proj": "(out=8192+8192+1024+1024+128)"},
    ),
    ("mgp_str", "MgpstrAttention", "MgpstrConfig", (), {"qkv": "(part=3 out)"}),
    (
        "minimax",
        "MiniMaxLightningAttention",
        "MiniMaxConfig",
        (0,),
        {"qkv_proj": "(out0=32 part=3 out1)"},
    ),
    (
        "mistral4",
        "Mistral4Attention",
        "Mistral4Config",
        (0,),
        {"kv_a_proj_with_mqa": "(out=256+64)", "kv_b_proj": "(out0=32 out1=64+128)"},
    ),
    ("mixtral", "MixtralExperts", "MixtralConfig", (), {"gate_up_proj": "(part=2 out)"}),
    ("modernbert", "ModernBertAttention", "ModernBertConfig", (0,), {"Wqkv": "(part=3 out)"}),
    ("modernbert", "ModernBertMLP", "ModernBertConfig", (), {"Wi": "(part=2 out)"}),
    ("mpt", "MptAttention", "MptConfig", (), {"Wqkv": "(part=3 out)"}),
    (
        "openai_privacy_filter",
        "OpenAIPrivacyFilterExperts",
        "OpenAIPrivacyFilterConfig",
        (),
        {"gate_up_proj": "(part=2 out)"},
    ),
    (
        "persimmon",
        "PersimmonAttention",
        "PersimmonConfig",
        (),
        {"query_key_value": "(out0=64 part=3 out1)"},
    ),
    ("phi3", "Phi3Attention", "Phi3Config", (), {"qkv_proj": "(part=3 out)"}),
    ("phi3", "Phi3MLP", "Phi3Config", (), {"gate_up_proj": "(part=2 out)"}),
    (
        "qwen2_5_vl",
        "Qwen2_5_VLVisionAttention",
        "Qwen2_5_VLVisionConfig",
        (),
        {"qkv": "(part=3 out)"},
    ),
    (
        "qwen3_5",
        "Qwen3_5GatedDeltaNet",
        "Qwen3_5TextConfig",
        (0,),
        {"in_proj_qkv": "(out=2048+2048+4096)"},
    ),
    (
        "qwen3_next",
        "Qwen3NextAttention",
        "Qwen3NextConfig",
        (0,),
        {"q_proj": "(out0=16 part=2 out1)"},
    ),
    (
        "qwen3_next",
        "Qwen3NextGatedDeltaNet",
        "Qwen3NextConfig",
        (0,),
        {
            "in_proj_qkvz": "(out0=16 out1=128+128+256+256)",
            "in_proj_ba": "(out0=16 part=2 out1)",
        },
    ),
    (
        "seamless_m4t",
        "SeamlessM4TConformerConvolutionModule",
        "SeamlessM4TConfig",
        (),
        {"pointwise_conv1": "(part=2 out)"},
    ),
    ("timesformer", "TimesformerSelfAttention", "TimesformerConfig", (), {"qkv": "(part=3 out)"}),
    (
        "vibevoice",
        "VibeVoiceDiffusionHeadFinalLayer",
        "VibeVoiceDiffusionHeadConfig",
        (8,),
        {"linear_1": "(part=2 out)"},
    ),
    ("vitdet", "VitDetAttention", "VitDetConfig", (), {"qkv": "(part=3 out)"}),
    ("vits", "VitsPosteriorEncoder", "VitsConfig", (), {"conv_proj": "(part=2 out)"}),
    ("hiera", "HieraMaskUnitAttention", None, (96, 192, 2, 4, 64, True), {"qkv": "(part=3 out)"}),
    (
        "levit",
        "LevitAttention",
        None,
        (128, 16, 4, 2, 14),
        {"queries_keys_values.linear": "(out0=4 out1=16+16+32)"},
    ),
    (
        "levit",
        "LevitAttentionSubsample",
        None,
        (128, 256, 16, 8, 4, 2, 14, 7),
        {"keys_values.linear": "(out0=8 out1=16+64)"},
    ),
    ("rf_detr", "RfDetrC2FLayer", "RfDetrConfig", (128,), {"conv1.conv": "(part=2 out)"}),
    (
        "seamless_m4t",
        "SeamlessM4TConformerAdapterLayer",
        "SeamlessM4TConfig",
        (),
        {"residual_conv": "(part=2 out)", "self_attn_conv": "(part=2 out)"},
    ),
    (
        "univnet",
        "UnivNetKernelPredictor",
        "UnivNetConfig",
        (3, 4),
        {"kernel_conv": "(layer=4 out)", "bias_conv": "(layer=4 out)"},
    ),
    ("zamba", "ZambaMambaMixer", "ZambaConfig", (0,), {"in_proj": "(out part=2)"}),
    (
        "zamba2",
        "Zamba2MambaMixer",
        "Zamba2Config",
        (0,),
        {"in_proj": "(out=5120+5120+64+64+8)"},
    ),
]


@pytest.mark.parametrize(("folder", "owner", "config", "args", "expected"), OWNERS, ids=str)
def test_owners(folder, owner, config, args, expected):
    assert axes(build(folder, owner, config, args)) == expected


@pytest.mark.parametrize(
    ("folder", "owner", "config", "changes", "expected"),
    [
        (
            "falcon",
            "FalconAttention",
            "FalconConfig",
            {"multi_query": False},
            "(out0=71 part=3 out1)",
        ),
        (
            "falcon",
            "FalconAttention",
            "FalconConfig",
            {
                "new_decoder_architecture": True,
                "hidden_size": 8192,
                "num_attention_heads": 128,
                "num_kv_heads": 8,
            },
            "(out0=8 out1=1024+64+64)",
        ),
        (
            "gpt_bigcode",
            "GPTBigCodeAttention",
            "GPTBigCodeConfig",
            {"multi_query": False},
            "(out0=12 part=3 out1)",
        ),
        (
            "phi3",
            "Phi3Attention",
            "Phi3Config",
            {"num_key_value_heads": 8},
            "(out=3072+768+768)",
        ),
        (
            "gpt2",
            "GPT2Attention",
            "GPT2Config",
            {"hidden_size": 60, "num_attention_heads": 5},
            "(part=3 out)",
        ),
    ],
)
def test_variants_of_one_class(folder, owner, config, changes, expected):
    """What the source says in words is asked of each module, not remembered for its class."""
    for _ in range(2):
        assert list(axes(build(folder, owner, config, **changes)).values()) == [expected]
        build(folder, owner, config)


def test_cross_attention_of_gpt2():
    attention = transformers.models.gpt2.modeling_gpt2.GPT2Attention
    owner = attention(transformers.GPT2Config(n_embd=8, n_head=2), is_cross_attention=True)
    assert axes(owner) == {"c_attn": "(part=2 out)"}


# Idioms, as an architecture in no release may write them


def rotate(q, k):
    return q, k


class Unreleased(nn.Module):
    """Divides many projections in many ways."""

    def __init__(self, heads=4, dim=6):
        super().__init__()
        self.heads, self.dim, width = heads, dim, heads * dim
        self.qkv = nn.Linear(width, 3 * width)
        self.grouped = nn.Linear(width, 2 * (heads // 2 + 2) * dim)
        self.kv = nn.ModuleList([nn.Linear(width, 2 * width)])
        self.rotated = nn.Linear(width, width)
        self.other = nn.Linear(width, width)
        self.glu = nn.Sequential(nn.Conv1d(width, 2 * width, 1), nn.GLU(1))
        self.gate_up = nn.Parameter(torch.ones(2, width, 2 * width))
        self.einsum = nn.Parameter(torch.ones(width, heads, dim))
        self.fused = nn.Parameter(torch.ones(3, heads, width, dim))
        self.plain = nn.Linear(width, 2 * width)
        self.scores = nn.Linear(width, 2)
        self.padded = nn.Linear(width, width)

    def forward(self, x):
        batch, length, _ = x.shape
        x = x + self.glu(x.mT).mT
        q, k, v = (
            y.transpose(1, 2)
            for y in self.qkv(x).view(batch, length, self.heads, 3, self.dim).unbind(dim=-2)
        )
        groups = self.grouped(x).unflatten(-1, (-1, self.heads // 2 + 2, self.dim))
        q2, k2, v2 = groups.split([self.heads // 2, 1, 1], dim=-2)
        k3, v3 = map(lambda t: t.contiguous(), self.kv[0](x).chunk(2, dim=-1))  # noqa: C417
        half = self.dim // 2
        a, b = self.rotated(x).view(batch, length, -1, self.dim), self.other(x)
        b = b.reshape(*x.shape[:2], self.heads, self.dim)
        a_rot, a_pass = a[..., :half], a[..., half:]
        b_rot, b_pass = b[..., :half], b[..., half:]
        a_rot, b_rot = rotate_rope(a_rot, b_rot)
        a, b = torch.cat([a_rot, a_pass], dim=-1), torch.cat([b_rot, b_pass], dim=-1)
        gate_up = torch.bmm(x, self.gate_up)
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        heads = torch.einsum("bld,dhe->blhe", x, self.einsum)
        q4, k4, v4 = torch.einsum("bld,shde->sbhle", x, self.fused)
        start, end = self.scores(x).split(1, dim=-1)
        x = (
            attend(q, k, v)
            + attend(q2, k2, v2)
            + attend(a, k3, v3)
            + attend(a, b, b)
            + attend(q4, k4, v4)
        )
        return x * gate * up, self.plain(x), heads, start, end, self.padded(x)[..., :20]


rotate_rope, attend = rotate, torch.add


def test_idioms_of_no_release():
    owner = Unreleased()
    assert axes(owner) == {
        "qkv": "(out0=4 part=3 out1)",
        "grouped": "(out0=2 out1=12+6+6)",
        "kv.0": "(part=2 out)",
        "glu.0": "(part=2 out)",
        "gate_up": "(out part=2)",
    }
    assert stored_layout(owner, "gate_up") == "stack in (out part=2)"
    assert stored_layout(owner, "einsum") == "in out0 out1"
    assert stored_layout(owner, "fused") == "part out1 in out2"
    assert stored_layout(owner, "absent") is None
    assert head_axes(owner, "qkv") == ("(head=4 part=3 out)", "in")


def rearrange(tensor, pattern, **sizes):
    """Stands for the function of einops: what it does is read off the pattern."""
    raise NotImplementedError


class Einops(nn.Module):
    """Attention as in many ViTs, over images with a map of one channel more."""

    def __init__(self, heads=4, width=24):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.by_head = nn.Linear(width, 3 * width)
        self.on_images = nn.Conv2d(width, 3 * width, 1)

    def forward(self, x, image):
        q, k, v = rearrange(self.to_qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        k2, q2, v2 = rearrange(self.by_head(x), "... (h s d) -> s ... h d", s=3, h=self.heads)
        parts = self.on_images(image).chunk(3, dim=1)
        q3, k3, v3 = (rearrange(y, "b (h c) x y -> b h c (x y)", h=self.heads) for y in parts)
        return attend(q, k, v), attend(q2, k2, v2), attend(q3, k3, v3)


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
        q = self.q(x).reshape(batch, length, self.heads, channels // self.heads)
        kv = self.kv(x).reshape(batch, -1, 2, self.heads, channels // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        return attend(q, k, v)

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
        maps.extend(stage(maps[-1]) for stage in self.stages)
        y, d = self.sliced(x), self.width
        a, b = y[:,:,:d], y[:,:,d:]  # fmt: skip
        *gates, v = self.in_proj(x).split(d, dim=-1)
        for gate in gates:
            v = v * gate
        return torch.cat(maps, 1), a * b, v


@pytest.mark.parametrize(
    ("owner", "expected"),
    [
        (
            Einops,
            {
                "to_qkv": "(part=3 out)",
                "by_head": "(out0=4 part=3 out1)",
                "on_images": "(part=3 out)",
            },
        ),
        (Cell, {"of_input": "(part=4 out)", "of_state": "(part=4 out)"}),
        (
            Modulated,
            {"kv.base": "(part=2 out)", "kv.up": "(part=2 out)", "modulation.1": "(part=3 out)"},
        ),
        (
            Stages,
            {"stem": "(part=2 out)", "sliced": "(part=2 out)", "in_proj": "(part=3 out)"},
        ),
    ],
)
def test_styles_of_no_release(owner, expected):
    assert axes(owner()) == expected


def test_feed_forward_without_a_class():
    found = {spec.name: str(spec.layout) for spec in classify(Transformer())}
    assert found["layers.0.1.weight"] == "(part=2 out) in"
    assert found["layers.0.3.weight"] == "out in"


def test_same_class_of_other_sizes():
    """What is in a Sequential is asked too."""

    class Head(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.net, self.sizes = nn.Sequential(nn.Linear(8, sum(sizes)), nn.ReLU()), sizes

        def forward(self, x):
            a, b = self.net(x).split(list(self.sizes), -1)
            return a.exp(), b

    assert axes(Head(4, 6)) == {"net.0": "(out=4+6)"}
    assert axes(Head(2, 8)) == {"net.0": "(out=2+8)"}


def test_layer_under_peft_and_in_a_refined_class():
    """PEFT replaces the matrix, FSDP2 the module's class."""
    from peft import LoraConfig, get_peft_model

    model = transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**TINY))
    get_peft_model(model, LoraConfig(target_modules=["query_key_value"]))
    attention = model.layers[0].attention
    attention.__class__ = type("FSDPGPTNeoXAttention", (type(attention),), {})
    assert axes(attention) == {"query_key_value": "(out0=4 part=3 out1)"}
    mixer = build("zamba", "ZambaMambaMixer", "ZambaConfig", (0,))
    mixer.__class__ = type("FSDPZambaMambaMixer", (type(mixer),), {"__module__": "torch.fsdp"})
    assert axes(mixer) == {"in_proj": "(out part=2)"}


def test_stored_experts():
    dbrx = build("dbrx", "DbrxExpertGLU", "DbrxFFNConfig", hidden_size=8)
    layouts = {spec.name: str(spec.layout) for spec in classify(dbrx)}
    assert layouts == {
        "w1": "(expert=4 out) in",
        "v1": "(expert=4 out) in",
        "w2": "(expert=4 in) out",
    }
    experts = {
        ("llama4", "Llama4TextExperts", "Llama4TextConfig"): "expert in (part=2 out)",
        ("gpt_oss", "GptOssExperts", "GptOssConfig"): "expert in (out part=2)",
        ("aria", "AriaExperts", "AriaTextConfig"): "expert in (part=2 out)",
        ("mixtral", "MixtralExperts", "MixtralConfig"): "expert (part=2 out) in",
        ("phimoe", "PhimoeExperts", "PhimoeConfig"): "expert (part=2 out) in",
    }
    for owner, layout in experts.items():
        assert stored_layout(build(*owner), "gate_up_proj") == layout
        down = "expert in out" if layout.startswith("expert in") else "expert out in"
        assert stored_layout(build(*owner), "down_proj") == down


def test_heads():
    llama = build("llama", "LlamaAttention", "LlamaConfig", (0,), num_key_value_heads=8)
    assert head_axes(llama, "q_proj") == ("(head=32 out)", "in")
    assert head_axes(llama, "k_proj") == head_axes(llama, "v_proj") == ("(head=8 out)", "in")
    assert head_axes(llama, "o_proj") == ("out", "(head=32 in)")
    gpt2 = build("gpt2", "GPT2Attention", "GPT2Config")
    assert head_axes(gpt2, "c_attn") == ("(part=3 head=12 out)", "in")
    assert head_axes(gpt2, "c_proj") == ("out", "(head=12 in)")
    bert = build("bert", "BertAttention", "BertConfig")
    assert head_axes(bert.self, "query") == ("(head=12 out)", "in")
    assert head_axes(bert, "output.dense") == ("out", "(head=12 in)")
    t5 = build("t5", "T5Attention", "T5Config")
    assert head_axes(t5, "o") == ("out", "(head=8 in)")
    neox = build("gpt_neox", "GPTNeoXAttention", "GPTNeoXConfig")
    assert head_axes(neox, "query_key_value") == ("(head=64 part=3 out)", "in")
    mla = build("deepseek_v3", "DeepseekV3Attention", "DeepseekV3Config", (0,))
    assert head_axes(mla, "q_b_proj") == ("(head=128 out)", "in")
    assert head_axes(mla, "kv_b_proj") == ("(head=128 part=2 out)", "in")
    assert head_axes(mla, "kv_a_proj_with_mqa") is None
    assert head_axes(mla, "o_proj") == ("out", "(head=128 in)")
    changes = {"new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 2}
    falcon = build("falcon", "FalconAttention", "FalconConfig", hidden_size=64, **changes)
    assert head_axes(falcon, "query_key_value") == ("(head0=2 head1=4+1+1 out=8)", "in")
    mlp = build("llama", "LlamaMLP", "LlamaConfig")
    assert head_axes(mlp, "down_proj") is None


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
    config = getattr(transformers, f"{model}Config")(
        **TINY, **changes, attn_implementation="capture"
    )
    model = getattr(transformers, f"{model}Model")(config).eval()
    owner = model.get_submodule(attention)
    projection = owner.get_submodule(path)
    if projection.bias is not None:
        nn.init.normal_(projection.bias)
    x = torch.randn(1, 3, 32)
    extra = (
        {"attention_mask": None} if "attention_mask" in owner.forward.__code__.co_varnames else {}
    )
    owner(x, **arguments, **extra)
    layout = layouts(model)[f"{attention}.{path}.weight"]
    expected = maps(layout, projection.weight, projection.bias, x)
    assert len(expected) == 3
    for one, received in zip(expected, capture[-1], strict=True):
        torch.testing.assert_close(one, received)


def test_query_key_and_value_of_bloom():
    config = transformers.BloomConfig(**TINY | {"n_head": 4})
    owner = transformers.BloomModel(config).h[0].self_attention
    x = torch.randn(1, 3, 32)
    received = owner._reshape(owner.query_key_value(x))
    layout = Layout(f"{axes(owner)['query_key_value']} in")
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
    owner = transformers.FalconModel(config).h[0].self_attention
    x = torch.randn(1, 3, 32)
    received = owner._split_heads(owner.query_key_value(x))
    layout = Layout(f"{axes(owner)['query_key_value']} in")
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
    config = transformers.DeepseekV3Config(
        **TINY,
        kv_lora_rank=16,
        q_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=8,
        v_head_dim=10,
        rope_interleave=False,
        attn_implementation="capture",
    )
    model = transformers.DeepseekV3Model(config)
    owner, found, x = model.layers[0].self_attn, layouts(model), torch.randn(1, 3, 32)
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
    config = transformers.Qwen3NextConfig(
        **TINY,
        head_dim=8,
        num_key_value_heads=2,
        attn_implementation="capture",
        layer_types=["full_attention"],
    )
    model = transformers.Qwen3NextModel(config)
    owner, x = model.layers[0].self_attn, torch.randn(1, 3, 32)
    gated = received(owner.o_proj)
    owner(x, attention_mask=None, **ROTATIONS)
    layout = layouts(model)["layers.0.self_attn.q_proj.weight"]
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
    (operators,) = Layout(stored_layout(experts, "gate_up_proj")).to_operators(experts.gate_up_proj)
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
