"""Exponents over width: known ones are found, configs scale, and the commands say what they saw."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
import transformers as tf
from torch import nn

from hf_normopt import PRESETS, classify, create_normopt_optimizer, init_by_fan_in_inplace
from hf_normopt.cli.commands import main
from hf_normopt.cli.coordinates import example_batch, measure
from hf_normopt.cli.scale_rate import norm_of_ones, rate_factors
from hf_normopt.cli.slopes import Spread, exponent, parameter_slopes, verdict
from hf_normopt.cli.trials import Choice, Trial
from hf_normopt.cli.verdicts import conclusion
from hf_normopt.cli.widths import Family, family
from recipes import width_sweep
from tests.test_norms import NORMS

POLICY = PRESETS["normopt"].policy
WIDTHS = (64, 128, 256)
SMALL = {"vocab_size": 64, "num_hidden_layers": 2}
LLAMA = tf.LlamaConfig(
    **SMALL, hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=4
)


class Chain(nn.Module):
    """Three maps without nonlinearities, whose exponents follow by hand; weights of one size."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle = nn.Linear(16, width, bias=False), nn.Linear(width, width, False)
        self.last = nn.Linear(width, 64, bias=False)
        for param in self.parameters():
            nn.init.normal_(param, std=0.02)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def chain_slopes(make, steps=1):
    found = {}
    for width in WIDTHS:
        model = Chain(width)
        x, target = (
            torch.randn(1, n, generator=torch.Generator().manual_seed(1)) for n in (16, 64)
        )
        specs = classify(model, inputs=(x,))
        loss = lambda model=model, x=x, target=target: (model(x) - target).square().sum()
        found[width] = measure(model, loss, make(model), specs, POLICY, steps)
    return {one.name.removesuffix(".weight"): one for one in parameter_slopes(found)}


MAKERS = {
    # the gradient of a map is δ xᵀ: its step on x is lr |δ| |x|², with |δ| from the maps above
    "sgd": (lambda m: torch.optim.SGD(m.parameters(), lr=1e-3), (0.5, 1.0, 1.5)),
    # entries of the size of the rate, all of one sign with x's: fan_in of them
    "adamw": (lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0), (0, 1, 1)),
    "modular": (lambda m: create_normopt_optimizer(m, lr=1e-2, preset="modular"), (0, 0, 0)),
    # √max(in, out) √(in / out) for a matrix, and its fan_in for the head
    "normopt": (lambda m: create_normopt_optimizer(m, lr=1e-3), (0, 0.5, 1)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_exponents_are_those_of_theory(name):
    make, expected = MAKERS[name]
    slopes = chain_slopes(make)
    for layer, own in zip(("first", "middle", "last"), expected, strict=True):
        assert slopes[layer].own == pytest.approx(own, abs=0.1), layer
        start = {"first": 0.0, "middle": 0.5, "last": 1.0}[layer]
        assert slopes[layer].initial == pytest.approx(start, abs=0.2), "whatever the optimizer"


def test_size_is_in_the_norm_of_the_role():
    slopes = chain_slopes(MAKERS["adamw"][0])
    assert slopes["middle"].size == pytest.approx(1, abs=0.02)  # √(in/out) √(in out), at rank 1
    slopes = chain_slopes(MAKERS["modular"][0])
    assert all(one.size == pytest.approx(0, abs=0.02) for one in slopes.values())


def test_own_is_the_part_of_one_parameter():
    """ΔW x alone: with one map trained, the others have no part."""
    model = Chain(64)
    x = torch.randn(2, 16)
    before = model.middle.weight.detach().clone()
    optimizer = torch.optim.SGD([model.middle.weight], lr=0.1)
    found = measure(model, lambda: model(x).square().sum(), optimizer, classify(model), POLICY, 1)
    own = {reading.name: reading.own for reading in found.readings if reading.step == 0}
    with torch.no_grad():
        inner = model.first(x)
    expected = (inner @ (model.middle.weight.detach() - before).T).square().mean().sqrt()
    assert own["middle.weight"] == pytest.approx(
        float(expected / inner.square().mean().sqrt()), rel=1e-3
    )
    assert own["first.weight"] == own["last.weight"] == 0
    assert len(found.losses) == 2
    assert found.losses[1] < found.losses[0]


@pytest.mark.parametrize(
    "name",
    [
        *("MixtralForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "RobertaModel"),
        *("T5ForConditionalGeneration", "ViTForImageClassification", "Dinov2Model"),
        *("SwinForImageClassification", "ResNetForImageClassification", "Wav2Vec2ForCTC"),
        *("WhisperForConditionalGeneration", "Qwen3ForCausalLM", "CLIPModel"),
    ],
)
def test_a_config_of_each_kind_scales(name):
    models = family(name)
    widths = models.widths(2)
    assert widths[1] == 2 * widths[0]
    with torch.device("meta"):
        narrow, wide = (
            dict(models.model_class(models.scaled(w, 2)).named_parameters()) for w in widths
        )
    assert narrow.keys() == wide.keys()
    for key, small in narrow.items():
        ratios = [b / a for a, b in zip(small.shape, wide[key].shape, strict=True)]
        assert set(ratios) <= {1, 2}, key
        if small.ndim == 2:
            assert 2 in ratios, key


def test_a_config_at_its_own_width_is_itself():
    for config in (tf.LlamaConfig(vocab_size=100), tf.BertConfig(vocab_size=100), tf.T5Config()):
        models = Family(tf.LlamaForCausalLM, config)
        given, found = config.to_dict(), models.scaled(models.base).to_dict()
        different = {key for key in given if given[key] != found[key]}
        assert different <= {"vocab_size", "num_key_value_heads"}


def test_heads_keep_their_size_and_layers_their_kinds():
    config = tf.Gemma3TextConfig(**SMALL, hidden_size=128, num_attention_heads=4, head_dim=32)
    config = Family(tf.Gemma3ForCausalLM, config).scaled(64, 5)
    assert (config.num_attention_heads, config.head_dim) == (2, 32)
    assert len(config.layer_types) == config.num_hidden_layers == 5
    with pytest.raises(ValueError, match="multiples of 32"):
        Family(tf.Gemma3ForCausalLM, config).scaled(48)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_width_at_which_a_part_is_empty_is_told():
    models = family("RegNetForImageClassification")  # a sixteenth of a stage is squeezed
    with pytest.raises(ValueError, match="at width 8; larger --widths have"):
        models.build(8, 1)


def test_special_tokens_stay_in_a_smaller_vocabulary():
    config = tf.LlamaConfig(vocab_size=50_000, pad_token_id=49_999, eos_token_id=[2, 40_000])
    config = Family(tf.LlamaForCausalLM, config).scaled(128, 2)
    assert config.pad_token_id != config.eos_token_id[1]
    assert config.eos_token_id[0] == 2
    assert max(config.pad_token_id, *config.eos_token_id) < config.vocab_size <= 1024


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("BertModel", None),
        ("BertForMaskedLM", (2, 8)),
        ("ViTForImageClassification", (2,)),
        ("T5ForConditionalGeneration", (2, 8)),
        ("Wav2Vec2ForCTC", (2, 4)),
    ],
)
def test_a_batch_has_the_labels_that_the_model_takes(name, labels):
    models = family(name)
    batch, loss = example_batch(models.build(models.unit, 1).eval())
    assert tuple(batch["labels"].shape) == labels if labels else "labels" not in batch
    value = loss()
    value.backward()
    assert math.isfinite(value.item())
    assert value.item() == loss().item()


def test_the_two_causes_are_told_apart():
    """Under `modular` only the initialisation depends on width, and `init` removes it."""
    models = Family(tf.LlamaForCausalLM, LLAMA)
    for fan_in, start in ((False, 0.5), (True, 0.0)):
        trial = Trial(models, Choice("normopt_modular"), fan_in=fan_in)
        slopes = parameter_slopes({w: trial.run(w, 1, 0.01) for w in WIDTHS})
        linear = {one.name: one for one in slopes if one.role in ("linear", "head")}
        assert len(linear) == 8
        assert linear["lm_head.weight"].initial == pytest.approx(start, abs=0.15)
        assert all(abs(one.size) < 0.02 for one in slopes)
        assert all(abs(one.own) < (0.15 if fan_in else 0.35) for one in slopes)


def test_weights_begin_with_outputs_of_the_size_of_inputs():
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=128, n_layer=1, n_head=2))
    table = model.transformer.wte.weight.detach().clone()
    init_by_fan_in_inplace(model)
    block = model.transformer.h[0]
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(
        512**-0.5, rel=0.02
    )  # stored (in, out)
    assert block.attn.c_attn.weight.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert torch.equal(model.transformer.wte.weight, table)


@pytest.mark.parametrize(
    ("spread", "words"),
    [
        (Spread(3, 0.02, -0.1, "a"), "does not depend on width"),
        (Spread(3, 0.5, 0.52, "a"), "grows as width^0.5: 2 times from 64 to 256"),
        (Spread(3, -1.0, -1.0, "a"), "shrinks as width^-1.0: 4 times less from 64 to 256"),
        (
            Spread(3, 0.0, 1.0, "a.weight"),
            "does not depend on width; a grows as width^1.0: 4 times from 64 to 256",
        ),
    ],
)
def test_a_verdict_is_plain(spread, words):
    assert verdict(spread, (64, 128, 256)) == words


def test_an_exponent_needs_numbers():
    assert exponent([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert exponent([1, 2], [1.0, None]) is exponent([1, 2], [0.0, 1.0]) is None
    assert exponent([1, 2], [1.0, math.inf]) is exponent([1], [1.0]) is None


def test_an_optimizer_of_transformers_by_its_name():
    model = nn.Linear(4, 4)
    optimizer = Choice("adamw_torch", {}).make(model, 0.1, None)
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.1, 0.0)
    assert type(Choice("sgd").make(model, 0.1, None)) is torch.optim.SGD


@pytest.fixture
def llama(tmp_path):
    LLAMA.architectures = ["LlamaForCausalLM"]
    LLAMA.save_pretrained(tmp_path)
    return tmp_path


def check(capsys, *argv):
    status = main(["coord-check", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_report_as_json(capsys, llama, tmp_path):
    picture = tmp_path / "curves.png"
    words = ("--widths", 32, 64, "--depths", 1, 2, "--steps", 2, "--json", "--picture", picture)
    status, out, _ = check(capsys, llama, *words)
    report = json.loads(out)
    assert status == 0
    assert report["format_version"] == 1
    assert (report["class"], report["optimizer"]) == ("LlamaForCausalLM", "normopt")
    assert (report["widths"], report["depths"], report["initialisation"]) == (
        [32, 64],
        [1, 2],
        "own",
    )
    low, high = report["rates"]
    assert high == 4 * low
    assert len(report["runs"]) == 6  # two widths and one more depth, at two rates
    reading = report["runs"][0]["readings"][0]
    assert set(reading) == {"name", "role", "step", "output", "change", "own", "size"}
    assert {row["over"] for row in report["parameters"]} == {"width", "depth"}
    assert {row["quantity"] for row in report["roles"]} == {"initial", "own", "change", "size"}
    head = next(row for row in report["roles"] if (row["role"], row["quantity"]) == ("head", "own"))
    assert re.match(r"grows as width\^1\.\d: \d\.?\d? times from 32 to 64", head["verdict"])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_report_as_text(llama):
    command = [sys.executable, "-m", "hf_normopt", "coord-check", str(llama), "--preset", "modular"]
    done = subprocess.run(
        [*command, "--widths", "64", "256", "--depths", "1", "--init"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [re.sub(r"\s+", " ", line) for line in done.stdout.splitlines()]
    assert any(re.match(r"model.layers.0.mlp.up_proj linear [+-]0.", line) for line in lines)
    assert "Initialisation: outputs do not depend on width before any step." in done.stdout
    assert "Steps: their effect does not depend on width, so a learning rate holds." in done.stdout
    assert "width 64, depth 1, rate 0.01: loss" in done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--widths", 64), "two or more"),
        (("--widths", 40, 72), "multiples of 16"),
        (("--picture", "a.jpg"), ".png"),
        (("--optim", "no_such"), "no_such"),
        (("--optim_args", "lr_hed=2"), "lr_head"),
        (("--steps", 0), "from 1"),
    ],
)
def test_what_cannot_be_used_is_said(capsys, llama, argv, words):
    status, _, err = check(capsys, llama, *argv)
    assert status == 2
    assert words in err


def test_an_adapter_is_refused(capsys, llama, tmp_path):
    from peft import LoraConfig

    adapter = tmp_path / "adapter"
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    config.base_model_name_or_path = str(llama)
    config.save_pretrained(adapter)
    assert "is an adapter" in check(capsys, adapter)[2]


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_the_norm_of_ones(norm):
    assert norm_of_ones(norm, 6, 4) == pytest.approx(float(norm.norm(torch.ones(6, 4))), rel=1e-5)


def specs_at(width, **changes):
    with torch.device("meta"):
        config = {**LLAMA.to_dict(), "hidden_size": width, "intermediate_size": 3 * width}
        config |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), width // 16)
        return classify(tf.LlamaForCausalLM(tf.LlamaConfig(**{**config, **changes})))


@pytest.mark.parametrize(
    ("preset", "linear", "head"),
    [("normopt", 0.5, 0.25), ("adam", 0.25, 0.25), ("modular", 1, 1), ("muon", 1, 0.25)],
)
def test_rates_for_four_times_the_width(preset, linear, head):
    factors = rate_factors(PRESETS[preset].policy, specs_at(64), specs_at(256))
    assert factors["linear"] == pytest.approx(linear)
    assert factors["head"] == pytest.approx(head)
    assert factors["embedding"] == factors["norm"] == 1


@pytest.mark.parametrize(("preset", "tied"), [("modular", 1), ("normopt", 0.25), ("scion", 0.25)])
def test_a_tied_table_is_scaled_as_a_head(preset, tied):
    small, large = (specs_at(w, tie_word_embeddings=True) for w in (64, 256))
    factors = rate_factors(PRESETS[preset].policy, small, large)
    assert factors["tied"] == pytest.approx(tied)
    assert not {"embedding", "head"} & factors.keys()


def test_a_tied_table_moves_its_logits_by_the_rate_and_says_so(capsys, tmp_path):
    config = tf.LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    words = (tmp_path, "--widths", 64, 256, "--depths", 1, "--init", "--preset", "modular")
    status, out, _ = check(capsys, *words, "--json")
    report = json.loads(out)
    own = {row["name"]: row["own"] for row in report["parameters"]}
    assert status == 0
    assert own["lm_head.weight"] == pytest.approx(0, abs=0.15)
    assert own["model.embed_tokens.weight"] == pytest.approx(-1, abs=0.15)
    steps = conclusion(report).splitlines()[1]
    assert "does not depend on width" in steps
    assert "The table that is the head too moves as the head may" in steps


def test_scale_rate_says_what_to_pass(capsys, llama, tmp_path):
    wide = tf.LlamaConfig(**{**LLAMA.to_dict(), "hidden_size": 256, "intermediate_size": 768})
    wide.save_pretrained(tmp_path / "wide")
    words = ("--from", llama, "--to", tmp_path / "wide", "--rate", "1e-3", "--preset", "adam")
    assert main(["scale-rate", *map(str, words)]) == 0
    out = capsys.readouterr().out
    assert 'learning_rate=0.00025, optim_args="lr_embedding=4,lr_norm=4"' in out
    assert main(["scale-rate", *map(str, words), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["learning_rate"] == pytest.approx(0.00025)
    assert report["optim_args"] == {"lr_embedding": 4, "lr_norm": 4}


def test_a_conclusion_names_both_causes():
    row = {"over": "width", "rate": 0.1, "parameters": 2, "verdict": ""}
    far = {"median": 0.5, "worst": 0.6, "worst_name": "a.weight"}
    near = {"median": 0.0, "worst": 0.3, "worst_name": "b.weight"}
    rows = [
        {"quantity": "initial", "role": "linear", **far},
        {"quantity": "own", "role": "head", **near},
    ]
    report = {"rates": [0.1], "initialisation": "own", "roles": [{**row, **more} for more in rows]}
    initial, steps = conclusion(report).splitlines()
    assert "depend on width before any step (linear +0.50), whatever the optimizer" in initial
    assert steps.endswith("so a learning rate holds. Farthest from their role: b +0.30.")
    report["roles"][1] |= {"median": 1.0, "worst": 1.0}
    assert "depends on width (head +1.00)" in conclusion(report).splitlines()[1]


def test_the_best_rate_lies_between_the_rates():
    parabola = lambda rate: (math.log(rate) - math.log(0.03)) ** 2
    rates = [0.01, 0.025, 0.06, 0.15]
    found, edge = width_sweep.best({rate: parabola(rate) for rate in rates})
    assert found == pytest.approx(0.03)
    assert not edge
    assert width_sweep.best({rate: -rate for rate in rates}) == (0.15, True)


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    file = tmp_path / "sweep.jsonl"
    words = ["--widths", "32", "--depths", "1", "--seeds", "0", "--steps", "2", "--batch", "2"]
    words += ["--optimizers", "adamw", "--output", str(file), "--rates", "0.01"]
    for more in ([], ["0.1"]):
        monkeypatch.setattr(sys, "argv", ["width_sweep.py", *words, *more])
        width_sweep.main()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["rate"] for row in rows] == [0.01, 0.1]
    assert "| 32 | 1 |" in capsys.readouterr().out
