import re
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from packaging import version
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hf_normopt import Layout, classify
from hf_normopt.roles import KINDS, ROLES
from hf_normopt.roles.graph import canonical_name
from hf_normopt.roles.observe import observe
from tests.role_models import BASES, MORE, build, classes

FOLDER = Path(__file__).parent / "roles"
CLASSES = [
    (architecture, name) for architecture in (*BASES, *MORE) for name in classes(architecture)
]


def fold(name):
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def table(model):
    """The lines of a golden table for a model."""
    prefix = f"{model.base_model_prefix}."
    lines = {}
    for spec in classify(model):
        tied = [
            fold(name.removeprefix(prefix)) for name in (spec.tied_to or "").split(", ") if name
        ]
        role = f"{spec.role}/{spec.kind}" if spec.kind else spec.role
        cells = [
            fold(spec.name.removeprefix(prefix)),
            role,
            str(spec.layout),
            *[", ".join(tied)][: len(tied)],
        ]
        lines[" | ".join(cells).strip()] = None
    return list(lines)


def golden(architecture):
    sections = {}
    for line in (FOLDER / f"{architecture}.txt").read_text().splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), [])
        elif line.strip():
            section.append(line.strip())
    return sections


@pytest.mark.skipif(
    version.parse(tf.__version__) < version.parse("5.23"),
    reason="the tables name modules as 5.23 does",
)
@pytest.mark.parametrize(("architecture", "class_name"), CLASSES, ids=lambda x: x)
def test_golden_table(architecture, class_name):
    sections = golden(architecture)
    found = set(table(build(class_name, architecture)))
    if class_name == classes(architecture)[0]:
        assert found == set(sections["base"])
        return
    added = sections[class_name]
    changed = {line.split(" | ")[0] for line in added}
    kept = {line for line in sections["base"] if line.split(" | ")[0] not in changed}
    assert found - kept == set(added)
    assert (
        not {line.split(" | ")[0] for line in found}
        - {line.split(" | ")[0] for line in kept}
        - changed
    )


@pytest.mark.parametrize("architecture", BASES)
def test_every_trainable_parameter_has_one_row_and_a_layout_that_fits(architecture):
    model = build(BASES[architecture], architecture)
    specs = classify(model)
    assert [s.name for s in specs] == [n for n, p in model.named_parameters() if p.requires_grad]
    params = dict(model.named_parameters())
    for spec in specs:
        assert spec.role in ROLES
        assert spec.reason
        assert spec.role != "other"
        stored = params[spec.name]
        pieces = spec.layout.to_operators(stored)
        assert spec.layout.from_operators(pieces, spec.shape).shape == stored.shape
        assert len(spec.shape) > 1 or spec.role not in ("linear", "conv")
        owner = model.get_submodule(spec.name.rpartition(".")[0])
        if isinstance(owner, nn.Linear) and spec.name.endswith("weight"):
            (piece, *_) = pieces
            parts = piece.shape[:-2].numel()
            assert (parts * piece.shape[-2], piece.shape[-1]) == (
                owner.out_features,
                owner.in_features,
            )


def test_lora_on_llama():
    config = LoraConfig(
        target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=False
    )
    model = get_peft_model(build("LlamaForCausalLM", "llama"), config)
    rows = {fold(s.name): (s.role, s.kind, str(s.layout)) for s in classify(model)}
    assert rows == {
        "base_model.model.model.embed_tokens.lora_embedding_A.default": (
            "embedding",
            "",
            "out in",
        ),
        "base_model.model.model.embed_tokens.lora_embedding_B.default": (
            "linear",
            "adapter_b",
            "out in",
        ),
        "base_model.model.model.layers.*.self_attn.q_proj.lora_A.default.weight": (
            "linear",
            "adapter_a",
            "out in",
        ),
        "base_model.model.model.layers.*.self_attn.q_proj.lora_B.default.weight": (
            "linear",
            "adapter_b",
            "out in",
        ),
        "base_model.model.lm_head.modules_to_save.default.weight": ("head", "", "out in"),
    }


@pytest.mark.parametrize(
    ("class_name", "architecture", "head"),
    [
        ("BertForSequenceClassification", "bert", "classifier.modules_to_save.default.weight"),
        (
            "RobertaForSequenceClassification",
            "roberta",
            "classifier.modules_to_save.default.out_proj.weight",
        ),
    ],
)
def test_lora_on_an_encoder_keeps_the_role_of_the_saved_head(class_name, architecture, head):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], use_dora=True)
    model = get_peft_model(build(class_name, architecture), config)
    rows = {
        fold(s.name).removeprefix("base_model.model."): (s.role, s.kind) for s in classify(model)
    }
    stem = f"{architecture}.encoder.layer.*.attention.self.query"
    assert rows.pop(head) == ("head", "")
    assert rows.pop(head.replace("weight", "bias")) == ("bias", "")
    assert rows.pop(f"{stem}.lora_A.default.weight") == ("linear", "adapter_a")
    assert rows.pop(f"{stem}.lora_B.default.weight") == ("linear", "adapter_b")
    assert rows.pop(f"{stem}.lora_magnitude_vector.default.weight") == ("norm", "")
    inner = {
        ("linear", ""),
        ("bias", ""),
        ("linear", "adapter_a"),
        ("linear", "adapter_b"),
        ("norm", ""),
    }
    assert set(rows.values()) <= inner


def test_frozen_parameters_have_no_row():
    model = build("BertModel", "bert")
    model.embeddings.requires_grad_(False)
    assert not [s for s in classify(model) if s.name.startswith("embeddings")]


def test_tied_tensor_is_an_embedding_and_says_so():
    (spec,) = [s for s in classify(build("GPT2LMHeadModel", "gpt2")) if s.tied_to]
    assert (spec.role, spec.tied_to) == ("embedding", "lm_head.weight")
    assert "the head" in spec.reason


def test_tied_tensor_whose_first_name_is_the_heads():
    model = nn.Module()
    model.head = nn.Linear(4, 10, bias=False)
    model.table = nn.Embedding(10, 4)
    model.table.weight = model.head.weight
    (spec,) = classify(model)
    assert (spec.name, spec.role, spec.tied_to, str(spec.layout)) == (
        "head.weight",
        "embedding",
        "table.weight",
        "in out",
    )


def test_gains_that_are_used_as_one_plus_weight_say_so():
    reasons = {s.name: s.reason for s in classify(build("Gemma3Model", "gemma3"))}
    assert "1 + weight" in reasons["language_model.norm.weight"]
    assert not [n for n, r in reasons.items() if "1 + weight" in r and n.startswith("vision_tower")]


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.spectrum = nn.Parameter(torch.zeros(4, 5))
        self.gate = nn.Parameter(torch.zeros(()))
        self.gamma = nn.Parameter(torch.ones(4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.lstm = nn.LSTM(3, 4)
        self.gru = nn.GRU(3, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.last = nn.Linear(4, 2)


def test_plain_modules():
    rows = {s.name: (s.role, str(s.layout)) for s in classify(Unknown())}
    assert rows["spectrum"] == ("other", "out0 out1")
    assert rows["gate"] == ("scalar", "")
    assert rows["gamma"] == ("norm", "out")
    assert rows["cls_token"] == ("embedding", "in0 in1 out")
    assert rows["lstm.weight_ih_l0"] == ("linear", "(gate=4 out) in")
    assert rows["lstm.bias_hh_l0"] == ("bias", "(gate=4 out)")
    assert rows["gru.weight_hh_l0"] == ("linear", "(gate=3 out) in")
    assert rows["attention.in_proj_weight"] == ("linear", "(part=3 out) in")
    assert rows["attention.out_proj.weight"] == ("linear", "out in")
    assert rows["up.weight"] == ("conv", "(group=2 in) out tap=3 tap=3")
    assert rows["blocks.0.weight"] == ("linear", "out in")
    assert rows["last.weight"] == ("head", "out in")


def test_unknown_parameters_have_a_reason():
    (spec,) = [s for s in classify(Unknown()) if s.role == "other"]
    assert "no matcher knows spectrum of Unknown" in spec.reason


def test_overrides_correct_the_role_and_keep_the_layout_of_a_known_module():
    rows = {
        s.name: s
        for s in classify(Unknown(), {"spectrum": "embedding", r"blocks\.0\.weight": "router"})
    }
    assert (rows["spectrum"].role, str(rows["spectrum"].layout)) == ("embedding", "in out")
    blocks = rows["blocks.0.weight"]
    assert (blocks.role, blocks.kind, str(blocks.layout)) == ("linear", "router", "out in")
    assert "override" in blocks.reason


def test_overrides_reach_a_tied_tensor_by_any_of_its_names():
    for pattern in ("wte", "lm_head"):
        (spec,) = [
            s for s in classify(build("GPT2LMHeadModel", "gpt2"), {pattern: "head"}) if s.tied_to
        ]
        assert (spec.role, str(spec.layout)) == ("head", "out in")  # (vocabulary, width)


def test_overrides_that_match_nothing_or_name_no_role():
    with pytest.raises(ValueError, match=r"'spectrun' matches none of .* such as spectrum"):
        classify(Unknown(), {"spectrun": "embedding"})
    with pytest.raises(ValueError, match=r"Unknown role 'heads'.*Did you mean 'head'"):
        classify(Unknown(), {"last": "heads"})
    with pytest.raises(ValueError, match="no regular expression"):
        classify(Unknown(), {"(": "head"})


def test_names_without_wrappers():
    assert canonical_name("module.model.a.weight") == "model.a.weight"
    assert canonical_name("_orig_mod.a._fsdp_wrapped_module.weight") == "a.weight"
    assert canonical_name("_orig_mod.module.a._checkpoint_wrapped_module.weight") == "a.weight"
    assert canonical_name("a.module.weight") == "a.module.weight"


def roles(model):
    return [(s.role, s.kind, str(s.layout)) for s in classify(model)]


def test_wrapped_models_are_classified_as_what_they_wrap():
    def plain():
        return build("LlamaForSequenceClassification", "llama")

    def tuned():
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
        model = get_peft_model(plain(), config)
        return model.requires_grad_(True)  # the base too, where a wrong prefix would show

    for make in (plain, tuned):
        expected = roles(make())
        assert sum(role == "head" for role, *_ in expected) == (1 if make is plain else 2)
        assert roles(nn.DataParallel(make())) == expected
        assert roles(torch.compile(make())) == expected
        assert roles(torch.compile(nn.DataParallel(make()))) == expected


def test_a_model_inside_another_module_keeps_its_head():
    class WithValueHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.value_head = nn.Linear(4096, 1)
            self.pretrained = build("LlamaForCausalLM", "llama")

    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = build("BertModel", "bert")

    found = {s.name: s.role for s in classify(WithValueHead())}
    assert {name for name, role in found.items() if role == "head"} == {
        "value_head.weight",
        "pretrained.lm_head.weight",
    }
    assert "head" not in {s.role for s in classify(Embedder())}


def test_a_users_own_task_class_has_all_of_its_heads():
    """Two heads side by side, and a layer before one of them."""

    class TwoTasks(tf.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = tf.BertModel(config)
            self.inner = nn.Linear(config.hidden_size, 48)
            self.topic = nn.Linear(48, 3)
            self.tone = nn.Linear(config.hidden_size, 5)

        def forward(self, input_ids, labels=None):
            pooled = self.bert(input_ids).pooler_output
            topic = self.topic(torch.tanh(self.inner(pooled)))
            return {"logits": (topic, self.tone(pooled))}

    with torch.device("meta"):
        model = TwoTasks(tf.BertConfig(num_hidden_layers=1))
    heads = [s.name for s in classify(model) if s.role == "head"]
    assert heads == ["topic.weight", "tone.weight"]


def test_a_task_model_without_its_head():
    config = tf.ViTConfig(num_hidden_layers=1, num_labels=0)
    with torch.device("meta"):
        model = tf.ViTForImageClassification(config)
    assert "head" not in {s.role for s in classify(model)}


@pytest.mark.parametrize(
    ("class_name", "head"),
    [
        ("Qwen3OmniMoeCode2Wav", "decoder.6.conv.weight"),  # codes of each quantizer
        ("RfDetrForObjectDetection", "class_embed.weight"),  # images that have enough patches
    ],
)
def test_uncommon_inputs_are_made_from_the_config(class_name, head):
    cls = getattr(tf, class_name)
    with torch.device("meta"):
        model = cls(cls.config_class())
    assert not observe(model).failure
    assert {s.name: s.role for s in classify(model)}[head] == "head"


def test_heads_as_operators_of_their_own():
    """Queries, grouped keys and values, and the map after them; fused ones too."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        llama = tf.LlamaModel(tf.LlamaConfig(**sizes, hidden_size=32, head_dim=8))
        gpt2 = tf.GPT2Model(tf.GPT2Config(n_layer=1, n_embd=32, n_head=4))
    rows = {s.name.split(".")[-2]: s for s in classify(llama, heads=True)}
    assert str(rows["q_proj"].layout) == "(head=4 out) in"
    assert str(rows["k_proj"].layout) == str(rows["v_proj"].layout) == "(head=2 out) in"
    assert str(rows["o_proj"].layout) == "out (head=4 in)"
    assert str(rows["up_proj"].layout) == "out in"
    assert "heads of LlamaAttention" in rows["q_proj"].reason
    fused = next(s for s in classify(gpt2, heads=True) if s.name == "h.0.attn.c_attn.weight")
    (operators,) = fused.layout.to_operators(torch.empty(fused.shape))
    assert operators.shape == (3, 4, 8, 32)


def test_prompt_encoders_have_no_head():
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tf.LlamaForCausalLM(TINY_LLAMA), config)
    assert "head" not in {s.role for s in classify(model)}
    model = get_peft_model(
        tf.LlamaForCausalLM(TINY_LLAMA),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    model.requires_grad_(True)
    heads = [s.name for s in classify(model) if s.role == "head"]
    assert heads == ["base_model.lm_head.weight"]


TINY_LLAMA = tf.LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
)


def test_biases_of_lora_and_copies_of_fused_maps():
    config = LoraConfig(
        target_modules=["c_proj"], lora_bias=True, modules_to_save=["c_attn"], fan_in_fan_out=True
    )
    model = get_peft_model(build("GPT2Model", "gpt2"), config)
    found = {fold(s.name).removeprefix("base_model.model."): s for s in classify(model)}
    bias = found["h.*.mlp.c_proj.lora_B.default.bias"]
    assert (bias.role, str(bias.layout)) == ("bias", "out")
    saved = found["h.*.attn.c_attn.modules_to_save.default.weight"]
    assert (saved.role, str(saved.layout)) == ("linear", "in (part=3 out)")


def test_lora_on_stacked_experts_computes_their_updates():
    """B is stored (out, rank * experts): its operators times A's are the experts' deltas."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **heads, num_local_experts=3))
    config = LoraConfig(target_parameters=["mlp.experts.down_proj"], r=2, lora_alpha=2)
    model = get_peft_model(model, config)
    params = dict(model.named_parameters())
    factors = {}
    for spec in classify(model):
        params[spec.name].data.normal_()
        (factors[spec.kind],) = spec.layout.to_operators(params[spec.name].data)
    owner = next(m for m in model.modules() if hasattr(m, "get_delta_factors"))
    delta = owner.get_delta_weight("default")
    torch.testing.assert_close(factors["adapter_b"] @ factors["adapter_a"], delta)


def test_vectors_of_matrix_modules_are_no_matrices():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

    class Marked(nn.Embedding):
        def __init__(self):
            super().__init__(5, 4)
            self.end_embedding = nn.Parameter(torch.zeros(4))

    rows = {s.name: (s.role, str(s.layout)) for s in classify(nn.Sequential(Scaled(), Marked()))}
    assert rows["0.scale"] == ("norm", "out")
    assert rows["1.end_embedding"] == ("embedding", "out")


def test_every_kind_refines_a_role():
    assert set(KINDS.values()) <= set(ROLES)


def test_nothing_is_allocated():
    """A model of a trillion parameters."""
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**6)
    assert [s.role for s in classify(model)] == ["head", "bias"]


def test_every_architecture_of_the_issue_has_a_table():
    assert {path.stem for path in FOLDER.glob("*.txt")} == {*BASES, *MORE}
    assert len({*BASES, *MORE}) >= 60


def test_layouts_are_text():
    for spec in classify(tf.GPT2Model(tf.GPT2Config(n_layer=1, n_embd=12, n_head=2, vocab_size=5))):
        assert Layout(str(spec.layout)) == spec.layout


if __name__ == "__main__":
    base, *tasks = classes(sys.argv[1])
    known = table(build(base, sys.argv[1]))
    print("[base]", *known, sep="\n")
    for task in tasks:
        lines = table(build(task, sys.argv[1]))
        print(f"\n[{task}]", *[line for line in lines if line not in known], sep="\n")
