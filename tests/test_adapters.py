"""What PEFT adds: all methods of peft 0.21 on small models, by a table read with their source.

`python -m tests.test_adapters > tests/adapters/peft.txt` writes the table anew: read what changed.
"""

import re
from pathlib import Path

import peft
import pytest
import torch
from packaging import version
from torch import nn
from transformers.pytorch_utils import Conv1D

if version.parse(peft.__version__) < version.parse("0.21.2"):
    pytest.skip("methods that are newer", allow_module_level=True)

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer

from hf_normopt import classify
from hf_normopt.roles.adapters import PARTS, is_adapter
from hf_normopt.roles.graph import place
from tests.adapter_models import BASES, CASES, build, wrap

TABLE = Path(__file__).parent / "adapters" / "peft.txt"
CONFIGS = {type(config).__name__ for _, config in CASES.values()}


def table(model):
    """The lines of a model's section: name, role, layout."""
    lines = {}
    for spec in classify(model):
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", spec.name).removeprefix("base_model.")
        role = f"{spec.role}/{spec.kind}" if spec.kind else spec.role
        lines[f"{name.removeprefix('model.')} | {role} | {spec.layout}"] = None
    return list(lines)


def sections():
    found = {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), [])
        elif line:
            section.append(line)
    return found


@pytest.mark.parametrize("case", CASES)
def test_table(case):
    model = build(case)
    assert table(model) == sections()[case]
    for spec in classify(model):
        stored = model.get_parameter(spec.name).detach()
        operators = spec.layout.to_operators(stored)
        assert torch.equal(spec.layout.from_operators(operators, spec.shape), stored)


def test_every_method_has_a_case_and_every_row_is_used():
    assert {config.__name__ for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()} - CONFIGS == {
        "XLoraConfig"  # needs saved adapters, has its own test
    }
    names = [line.split(" | ")[0] for lines in sections().values() for line in lines]
    for part in PARTS:
        assert any(re.search(rf"(^|\.)({part.name})(\.|$)", name) for name in names), part.name


@pytest.mark.parametrize("case", CASES)
def test_the_base_keeps_its_roles(case):
    base, config = CASES[case]
    plain = {spec.name: spec for spec in classify(BASES[base]())}
    wrapped = wrap(BASES[base](), config)
    for param in wrapped.parameters():
        param.requires_grad_(param.is_floating_point())
    for spec in classify(wrapped):
        name = place(spec.name).removeprefix("base_model.").removeprefix("model.")
        name = name.replace("self_attn.model.", "self_attn.")  # of Llama-Adapter
        for known in (name, f"model.{name}"):
            if known in plain:
                was = plain[known]
                assert (spec.role, spec.kind, spec.layout) == (was.role, was.kind, was.layout)


# What a layer adds to the matrix W of its base, up to a factor, from its parameters' operators.
PRODUCTS = {
    "lora": lambda p, w, layer: p["lora_B"] @ p["lora_A"],
    "lora bias": lambda p, w, layer: p["lora_B"] @ p["lora_A"],
    "lora conv1d": lambda p, w, layer: p["lora_B"] @ p["lora_A"],
    "lora kasa": lambda p, w, layer: p["lora_B"] @ (p["lora_diag"] * p["lora_A"]),
    "lora blocks": lambda p, w, layer: diagonal(p["lora_B"]) @ diagonal(p["lora_A"]),
    "adalora": lambda p, w, layer: p["lora_B"] @ (p["lora_E"] * p["lora_A"]),
    "adamss": lambda p, w, layer: adamss(p, layer),
    "deft": lambda p, w, layer: p["deft_P"] @ (p["deft_R"] - p["deft_P"].relu().T @ w),
    "delora": lambda p, w, layer: (
        (unit(p["delora_B"].T).T @ unit(p["delora_A"]))
        * (p["delora_lambda"] * layer.delora_w_norm["default"])
    ),
    "glora": lambda p, w, layer: (
        w * (p["glora_A.Xd"] @ p["glora_A.Xu"]) + p["glora_B.Xd"] @ p["glora_B.Xu"]
    ),
    "glora vector": lambda p, w, layer: w * p["glora_A.X"] + p["glora_B.X"],
    "gralora": lambda p, w, layer: (
        gralora(p["gralora_A"], p["gralora_B"]) + p["gralora_B_general"] @ p["gralora_A_general"]
    ),
    "hira": lambda p, w, layer: w * (p["hira_B"] @ p["hira_A"]),
    "ia3": lambda p, w, layer: w * ((p["ia3_l"].T if layer.is_feedforward else p["ia3_l"]) - 1),
    "lily": lambda p, w, layer: p["lily_B"].mean(0) @ p["lily_A"],
    "loha": lambda p, w, layer: (
        (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    ),
    "lokr": lambda p, w, layer: torch.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]),
    "lokr both": lambda p, w, layer: torch.kron(
        p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2_a"] @ p["lokr_w2_b"]
    ),
    "lokr full": lambda p, w, layer: torch.kron(p["lokr_w1"], p["lokr_w2"]),
    "miss": lambda p, w, layer: p["miss_block"].repeat(1, len(w.T) // 4),
    "miss mini": lambda p, w, layer: p["miss_block"].repeat(len(w) // 2, len(w.T) // 4),
    "miss bat": lambda p, w, layer: bat(p["miss_block"], w),
    "osf": lambda p, w, layer: (
        (p["osf_svd_params.U_low"] * p["osf_svd_params.S_low"].T) @ p["osf_svd_params.V_low"]
        - (layer._osf_U_low_init["default"] * layer._osf_S_low_init["default"])
        @ layer._osf_V_low_init["default"]
    ),
    "poly": lambda p, w, layer: (
        p["poly_lora_B"].mean(1).flatten(0, 1) @ torch.cat([*p["poly_lora_A"].mean(1)], dim=-1)
    ),
    "psoft free": lambda p, w, layer: (
        layer._psoft_B_cache["default"]
        @ (p["psoft_R.vector_b"] * p["psoft_R"] * p["psoft_R.vector_a"].T - torch.eye(4))
        @ layer._psoft_A_cache["default"]
    ),
    "supertuning": lambda p, w, layer: p["supertuning_lora_B"] @ p["supertuning_lora_A"],
    "vera": lambda p, w, layer: (
        (p["vera_lambda_b"] * layer.vera_B["default"][: len(w)])
        @ (p["vera_lambda_d"] * layer.vera_A["default"][:, : len(w.T)])
    ),
}
# The same for the kernels of convolutions, by taps.
KERNELS = {
    "lora kernels": lambda p: p["lora_B"] @ p["lora_A"],
    "hira kernels": lambda p: p["hira_B"] @ p["hira_A"],
    "loha effective": lambda p: (
        (p["hada_w1_a"] @ p["hada_t1"] @ p["hada_w1_b"])
        * (p["hada_w2_a"] @ p["hada_t2"] @ p["hada_w2_b"])
    ),
    "lokr effective": lambda p: torch.kron(
        p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2_a"] @ p["lokr_t2"] @ p["lokr_w2_b"]
    ),
    "lokr full kernels": lambda p: torch.kron(p["lokr_w1"], p["lokr_w2"].contiguous()),
}


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def diagonal(operators):
    return torch.block_diag(*operators) if operators.ndim > 2 else operators


def adamss(p, layer):
    """Each subspace has its outputs; the input passes a fixed matrix first, the bias is its end."""
    subspaces = range(layer.num_subspaces["default"])
    rows = torch.cat([p[f"adamss_B.{i}"] @ p[f"adamss_A.{i}"] for i in subspaces])
    delta = torch.zeros(layer.out_features, rows.shape[1])
    delta[layer.scatter_index["default"]] = rows
    return delta @ layer.adamss_newB["default"][:, :-1]


def gralora(a, b):
    """Block (j, n) of the matrix is the j-th piece of A_n's ranks under the n-th piece of B_j's."""
    k, rank = a.shape[:2]
    pieces_a = a.reshape(k, k, rank // k, -1)  # block, piece, rank, in
    pieces_b = b.reshape(k, -1, k, rank // k)  # block, out, piece, rank
    return torch.einsum("jonr, njri -> joni", pieces_b, pieces_a).flatten(0, 1).flatten(1)


def bat(m, w):
    """W M + M in blocks, M the same for all blocks of the input."""
    blocks = w.unflatten(0, (-1, 4)).unflatten(2, (-1, 4))  # out, 4, in, 4
    delta = torch.einsum("oaib, obc -> oaic", blocks, m) + m[:, :, None]
    return delta.flatten(2).flatten(0, 1)


def layers_and_operators(case):
    """Every layer of PEFT's, and the operators of its parameters, drawn at random."""
    model = build(case).eval()
    params = dict(model.named_parameters())
    specs = {}
    for spec in classify(model):
        if "router" in spec.name:  # undecided
            params[spec.name].data.zero_()
        elif spec.role not in ("other", "bias"):
            params[spec.name].data.normal_()
        specs |= dict.fromkeys([spec.name, *(spec.tied_to or "").split(", ")], spec)
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            operators = {}
            for name, param in layer.named_parameters(remove_duplicate=False):
                if f"{path}.{name}" in specs:
                    key = name.replace(".default", "").removesuffix(".weight")
                    (operators[key.replace("_embedding", "")],) = specs[
                        f"{path}.{name}"
                    ].layout.to_operators(param.detach())
            yield layer, operators


def assert_parallel(a, b):
    torch.testing.assert_close(a / a.norm(), b / b.norm(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", PRODUCTS)
def test_the_operators_multiply_as_the_layer_does(case):
    seen = 0
    for layer, operators in layers_and_operators(case):
        base = layer.get_base_layer()
        if isinstance(base, nn.Embedding):
            w, x = base.weight.T, torch.arange(base.num_embeddings)[None]
        else:
            w = base.weight if isinstance(base, nn.Linear) else base.weight.T
            x = torch.eye(w.shape[1])[None]
        task = {"task_ids": torch.zeros(2, dtype=torch.long)} if case == "poly" else {}
        both = layer(torch.cat([x, 0 * x]) if x.is_floating_point() else x, **task)
        delta = both[0] - base(x)[0]
        if x.is_floating_point():
            delta -= both[1] - base(0 * x)[0]  # what the adapter adds to the bias
        assert_parallel(PRODUCTS[case](operators, w, layer), delta.T)
        seen += 1
    assert seen


@torch.no_grad()
@pytest.mark.parametrize("case", KERNELS)
def test_the_operators_multiply_as_the_kernel_does(case):
    seen = 0
    for layer, operators in layers_and_operators(case):
        base = layer.get_base_layer()
        # peft's Kronecker product of a matrix and a kernel of one dimension mixes up their axes
        known = nn.Conv2d if "lokr" in case else nn.modules.conv._ConvNd
        if isinstance(base, known) and base.groups == 1:
            delta = layer.get_delta_weight("default").movedim((0, 1), (-2, -1))
            assert_parallel(KERNELS[case](operators).reshape(delta.shape), delta)
            seen += 1
    assert seen


@torch.no_grad()
def test_the_operators_multiply_as_the_experts_do():
    layers = list(layers_and_operators("lora experts"))
    for layer, operators in layers:
        product = operators["lora_B"] @ operators["lora_A"]
        torch.testing.assert_close(
            product * layer.scaling["default"], layer.get_delta_weight("default")
        )
    assert len(layers) == 4


HEADS = {
    "score": peft.LoHaConfig(r=2, target_modules=["q_proj", "score"]),
    "llama": peft.IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[]),
    "bert": peft.DeloraConfig(r=2, target_modules=["query", "classifier"]),
    "vit": peft.VeraConfig(r=2, target_modules=["q_proj", "classifier"]),
}


@pytest.mark.parametrize("base", HEADS)
def test_what_is_added_to_a_head_is_no_head(base):
    model = wrap(BASES[base](), HEADS[base])
    assert "head" not in {spec.role for spec in classify(model)}
    model.requires_grad_(True)
    (head,) = [spec.name for spec in classify(model) if spec.role == "head"]
    assert head.endswith("base_layer.weight")


def test_xlora(tmp_path):
    """Adapters that are mixed by a classifier, which is no head."""
    adapters = {}
    for name in ("one", "two"):
        build("lora rslora").save_pretrained(tmp_path / name)
        adapters[name] = str(tmp_path / name)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=16,
        xlora_depth=2,
        xlora_size=8,
        adapters=adapters,
    )
    base = BASES["llama"]()
    base.config.use_cache = False
    model = wrap(base, config)
    for name, param in model.named_parameters():
        param.requires_grad_(param.requires_grad or ".lora_A." in name or ".lora_B." in name)
    rows = dict(line.split(" | ", 1) for line in table(model))
    name = "lora_model.model.model.layers.*.self_attn.q_proj.lora"
    assert rows == {
        f"{name}_A.*.weight": "linear/adapter_a | out in",
        f"{name}_B.*.weight": "linear/adapter_b | out in",
        "internal_xlora_classifier.layers.*.weight": "linear | out in",
        "internal_xlora_classifier.layers.*.bias": "bias | out",
    }


def test_methods_that_are_mixed():
    model = BASES["llama"]()
    model = peft.PeftMixedModel(model, CASES["lora rslora"][1], "one")
    model.add_adapter("two", CASES["loha"][1])
    model.set_adapter(["one", "two"])
    roles = {
        spec.name.split(".")[-2]: spec.kind for spec in classify(model) if "lm_head" in spec.name
    }
    assert roles == {
        "hada_w1_a": "adapter_b",
        "hada_w1_b": "adapter_a",
        "hada_w2_a": "adapter_b",
        "hada_w2_b": "adapter_a",
    }


def test_adapters_that_transformers_adds():
    model = BASES["bert"]()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
    assert {(spec.role, spec.kind) for spec in classify(model)} == {
        ("linear", "adapter_a"),
        ("linear", "adapter_b"),
    }


class Nova(nn.Module, BaseTunerLayer):
    """A method that is in no release, with factors stored the other way round."""

    adapter_layer_names = ("nova_A", "nova_B", "nova_phase", "nova_core", "nova_net", "nova_norm")

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        for name, shape in {
            "nova_A": (self.in_features, 2),
            "nova_B": (2, self.out_features),
            "nova_phase": (7,),
            "nova_core": (2, 2),
            "nova_gate": (1,),
        }.items():
            setattr(self, name, nn.ParameterDict({"task_a": nn.Parameter(torch.ones(shape))}))
        self.nova_net = nn.ModuleDict({"task_a": nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))})
        self.nova_down = nn.ModuleDict({"task_a": nn.Linear(self.in_features, 2)})
        self.nova_up = nn.ModuleDict({"task_a": nn.Linear(2, self.out_features)})


@pytest.mark.parametrize("square", [False, True])
def test_a_method_that_no_row_knows(square):
    model = BASES["bert"]()
    layer = Nova(nn.Linear(16, 16 if square else 6))
    model.classifier = layer
    found = {
        spec.name.removeprefix("classifier."): (spec.role, spec.kind, str(spec.layout))
        for spec in classify(model)
        if spec.name.startswith("classifier.nova")
    }
    assert found == {
        "nova_A.task_a": ("linear", "adapter_a", "in out"),
        "nova_B.task_a": ("linear", "adapter_b", "in out"),
        "nova_phase.task_a": ("other", "", "out"),
        "nova_core.task_a": ("other", "", "out0 out1"),
        "nova_gate.task_a": ("scalar", "", "out"),
        "nova_net.task_a.0.weight": ("linear", "", "out in"),
        "nova_net.task_a.0.bias": ("bias", "", "out"),
        "nova_net.task_a.1.weight": ("norm", "", "out"),
        "nova_net.task_a.1.bias": ("bias", "", "out"),
        "nova_down.task_a.weight": ("linear", "adapter_a", "out in"),
        "nova_down.task_a.bias": ("bias", "", "out"),
        "nova_up.task_a.weight": ("linear", "adapter_b", "out in"),
        "nova_up.task_a.bias": ("bias", "", "out"),
    }
    (reason,) = [spec.reason for spec in classify(model) if "nova_phase" in spec.name]
    assert "no row" in reason
    assert "nova_phase" in reason
    modules = dict(model.named_modules())
    assert is_adapter("classifier.nova_up.task_a", modules)
    assert not is_adapter("classifier.base_layer", modules)
    assert not is_adapter("bert.pooler.dense", modules)
    wrapped = dict(build("lora").named_modules())
    assert not any(is_adapter(name, wrapped) for name in ("", "base_model", "base_model.model"))


def test_lora_by_hand():
    """Without PEFT, in both ways of storing it."""

    class ByHand(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.linear = nn.Linear(16, 6).requires_grad_(False)
            self.lora_A = nn.Parameter(torch.ones(a))
            self.lora_B = nn.Parameter(torch.ones(b))

    for shapes, layout in {((2, 16), (6, 2)): "out in", ((16, 2), (2, 6)): "in out"}.items():
        found = [(spec.kind, str(spec.layout)) for spec in classify(ByHand(*shapes))]
        assert found == [("adapter_a", layout), ("adapter_b", layout)]


@pytest.mark.parametrize("case", ["lora", "loha", "saved", "tokens head", "p-tuning", "shadow"])
def test_quantised_weights_are_seen_as_what_they_were(case):
    """Packed, as bitsandbytes does: neither data nor shape are those of the matrix."""
    model = build(case)
    expected = classify(model)
    packed = 0
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, (nn.Linear, Conv1D)) and not weight.requires_grad:
            data = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
            module._parameters["weight"] = nn.Parameter(data, requires_grad=False)
            packed += 1
    assert packed
    assert classify(model) == expected


if __name__ == "__main__":
    for case in CASES:
        print(f"[{case}]", *table(build(case)), "", sep="\n")
