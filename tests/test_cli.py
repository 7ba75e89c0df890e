import builtins
import json
import re
import subprocess
import sys

import pytest
from peft import LoraConfig
from transformers import (
    BertConfig,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    T5Config,
)

from hf_normopt.cli import outline, picture
from hf_normopt.cli.commands import main
from hf_normopt.roles import ROLES
from hf_normopt.tables import fold_names


def saved(config, folder, **changes):
    config.update(changes)
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path):
    return saved(LlamaConfig(num_hidden_layers=22, architectures=["LlamaForCausalLM"]), tmp_path)


@pytest.fixture
def mamba(tmp_path):
    """A model whose state-space parameters fit no role."""
    config = MambaConfig(hidden_size=32, num_hidden_layers=4, vocab_size=100)
    return saved(config, tmp_path / "mamba", architectures=["MambaForCausalLM"])


def run(capsys, *argv):
    status = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_inspect_folds_repeated_layers(capsys, llama):
    status, out, _ = run(capsys, "inspect", llama)
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "model.layers.*.mlp.up_proj (x22) linear rms->rms 11008 x 4096 out in" in lines
    assert "lm_head head rms->linf 32000 x 4096 out in" in lines
    assert "linear rms->rms 154 4,452,253,696" in lines


def test_inspect_keeps_layers_apart_that_differ(capsys, tmp_path):
    config = DeepseekV3Config(num_hidden_layers=70, architectures=["DeepseekV3ForCausalLM"])
    _, out, _ = run(capsys, "inspect", saved(config, tmp_path))
    labels = [re.split(r"  +", line)[0] for line in out.splitlines()]
    assert labels.index("model.layers.*.self_attn.o_proj (x70)") < labels.index(
        "model.layers.*.mlp.gate_proj (x3: 0-2)"
    )
    assert "model.layers.*.mlp.experts.down_proj (x67: 3-69)" in labels


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a.0.w", "a.1.w", "b"], ["a.*.w (x2)", "b"]),
        (["a.0.w", "a.1.w", "a.1.v"], ["a.*.w (x2)", "a.1.v"]),
        (
            [f"a.{i}.{'vw'[i % 3 == 0]}" for i in range(12)],
            ["a.*.w (x4: 0..9)", "a.*.v (x8: 1..11)"],
        ),
        ([f"a.{i}.b.{j}" for i in range(2) for j in range(3)], ["a.*.b.* (x6)"]),
        (["experts.expert_0.w", "experts.expert_1.w"], ["experts.*.w (x2)"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.0.b.* (x2)", "a.1.b.0"]),
    ],
)
def test_folded_names(names, labels):
    folded = fold_names(names)
    assert [label for label, _ in folded] == labels
    assert sorted(at for _, positions in folded for at in positions) == list(range(len(names)))
    for label, positions in folded:
        assert all(re.search(label.partition(" (")[0], names[at]) for at in positions)


def test_folded_names_share_a_key():
    assert fold_names(["a.0", "a.1", "a.2"], [1, 2, 1]) == [("a.* (x2: 0,2)", [0, 2]), ("a.1", [1])]


def test_inspect_takes_a_config_file_and_another_preset(capsys, llama):
    status, out, _ = run(capsys, "inspect", llama / "config.json", "--preset", "muon", "--why")
    assert status == 0
    assert "l2->l2 (muon)" in out
    header, _, first, *_ = out.splitlines()
    reason = header.index("reason")
    assert "Embedding" in first[reason:]


def test_inspect_as_json(capsys, tmp_path):
    """The fields and types that docs/inspect.md promises."""
    saved(GPT2Config(n_layer=1, architectures=["GPT2LMHeadModel"]), tmp_path)
    report = json.loads(run(capsys, "inspect", tmp_path, "--format", "json")[1])
    parameters, totals = report.pop("parameters"), report.pop("totals")
    assert report == {
        "format_version": 1,
        "model": str(tmp_path),
        "class": "GPT2LMHeadModel",
        "preset": "normopt",
    }
    types = {
        "name": str,
        "shape": list,
        "role": str,
        "kind": str,
        "layout": str,
        "reason": str,
        "tied_to": list,
        "product": type(None),
        "norm": str,
        "rule": str,
    }
    for parameter in parameters:
        assert {field: type(value) for field, value in parameter.items()} == types
        assert parameter["role"] in ROLES
    assert parameters[0]["name"] == "transformer.wte.weight"
    assert parameters[0]["tied_to"] == ["lm_head.weight"]
    assert list(totals) == [role for role in ROLES if role in totals]
    assert sum(total["tensors"] for total in totals.values()) == len(parameters)
    assert totals["embedding"] == {
        "norms": ["l1->rms"],
        "tensors": 2,
        "parameters": (50257 + 1024) * 768,
    }


def test_inspect_tells_the_cost(capsys, llama):
    _, out, _ = run(capsys, "inspect", llama, "--cost", "--tokens", "1000")
    lines = out[out.index("operators ") :].splitlines()
    shares = re.match(
        r"oracle: (.*) GFLOP a step; .* 1,000 tokens: (.*) GFLOP; .*: (.*)%", lines[-1]
    )
    work, training, share = (float(number.replace(",", "")) for number in shares.groups())
    rows = [line.split() for line in lines if re.match(r" *\d+ +\d+ x", line)]
    assert [" ".join(row[:4]) for row in rows] == [
        "88 4096 x 4096",
        "44 11008 x 4096",
        "22 4096 x 11008",
    ]
    assert work == pytest.approx(sum(float(row[-1].replace(",", "")) for row in rows), rel=1e-6)
    parameters = 22 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert training == pytest.approx(6 * parameters * 1000 / 1e9, abs=1)
    assert share == pytest.approx(100 * work / (work + training), abs=0.1)
    _, out, _ = run(capsys, "inspect", llama, "--cost", "--device", "cuda")
    assert "float16, 6 steps" in out
    assert re.search(r"on cuda, by its data sheet: a step takes [\d,]+\.\d ms", out)


def test_inspect_as_markdown(capsys, llama):
    _, out, _ = run(capsys, "inspect", llama, "--format", "markdown")
    assert out.splitlines()[0].startswith("| parameter")
    assert set(out.splitlines()[1]) == set("|-:")


def test_inspect_shows_all_names_of_a_tied_tensor(capsys, tmp_path):
    config = T5Config(num_layers=1, architectures=["T5ForConditionalGeneration"])
    _, out, _ = run(capsys, "inspect", saved(config, tmp_path))
    names = "shared = encoder.embed_tokens = decoder.embed_tokens = lm_head "
    assert re.search(rf"{names} +embedding +l1->rms ", out)
    _, out, _ = run(capsys, "inspect", tmp_path, "--preset", "modular")
    assert re.search(rf"{names} +embedding/tied +tied rms->linf ", out)


@pytest.mark.parametrize("given", ["", "adapter_config.json"])
def test_inspect_of_an_adapter(capsys, tmp_path, given):
    base = saved(
        LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"]), tmp_path / "base"
    )
    LoraConfig(base_model_name_or_path=str(base), target_modules=["q_proj"]).save_pretrained(
        tmp_path / "a"
    )
    status, out, _ = run(capsys, "inspect", tmp_path / "a" / given)
    assert status == 0
    assert re.search(
        r"q_proj\.lora\.default \(x2\) +linear/product +product rms->rms .*scale 1", out
    )
    assert "embed_tokens" not in out


def test_the_task_of_an_adapter_decides_the_class_of_its_base(capsys, tmp_path):
    base = saved(BertConfig(num_hidden_layers=1), tmp_path / "base")
    LoraConfig(
        base_model_name_or_path=str(base), target_modules=["query"], task_type="SEQ_CLS"
    ).save_pretrained(tmp_path / "a")
    _, out, _ = run(capsys, "inspect", tmp_path / "a")
    assert re.search(r"classifier\.modules_to_save\.default +head", out)


def test_inspect_of_a_model_that_brings_its_code(capsys, tmp_path):
    (tmp_path / "modeling_own.py").write_text(
        "from torch import nn\n"
        "from transformers import PreTrainedConfig, PreTrainedModel\n"
        "class OwnConfig(PreTrainedConfig):\n"
        "    model_type = 'own'\n"
        "class OwnForCausalLM(PreTrainedModel):\n"
        "    config_class = OwnConfig\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.table = nn.Embedding(10, 4)\n"
        "        self.post_init()\n"
    )
    auto_map = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, err = run(capsys, "inspect", tmp_path)
    assert (status, out) == (2, "")
    assert "trust_remote_code" in err
    for given in (tmp_path, tmp_path / "config.json"):
        status, out, _ = run(capsys, "inspect", given, "--trust_remote_code")
        assert status == 0
        assert "table" in out


def test_inspect_with_overrides(capsys, llama):
    _, out, _ = run(capsys, "inspect", llama, "--roles", "head:layers.0.mlp.up_proj")
    assert re.search(r"model\.layers\.0\.mlp\.up_proj +head", out)
    assert "model.layers.*.mlp.up_proj (x21: 1-21)" in out


def test_other_is_named_with_its_reason(capsys, mamba):
    status, out, err = run(capsys, "inspect", mamba)
    assert (status, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("other: ")]
    assert "backbone.layers.*.mixer.A_log (x4): " in line


def test_strict_fails_on_other_and_its_advice_helps(capsys, mamba, llama):
    assert run(capsys, "inspect", llama, "--strict")[0] == 0
    status, out, err = run(capsys, "inspect", mamba, "--strict")
    assert status == 1
    assert "backbone.layers.*.mixer.A_log (x4)" in out
    advice = re.search(r'--roles "(.*)"', err)[1].replace("ROLE", "norm")
    status, out, err = run(capsys, "inspect", mamba, "--strict", "--roles", advice)
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no/such/model"], "no/such/model"),
        (["./nowhere"], "There is no file or folder ./nowhere"),
        (["MODEL", "--roles", "head:nothing"], "matches none"),
        (["MODEL", "--roles", "head:mlp.upproj"], "mlp.up_proj"),
        (["MODEL", "--roles", "hed:lm_head"], "Did you mean 'head'?"),
        (["MODEL", "--roles", "nothing"], "expected role:REGEX"),
        (["MODEL", "--plot", "model.svg"], "a file .html or .png"),
        (["MODEL", "--plot", "/no/such/folder/a.html"], "no folder /no/such/folder"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(capsys, llama, argv, message):
    status, out, err = run(
        capsys, "inspect", *[str(llama) if word == "MODEL" else word for word in argv]
    )
    assert (status, out) == (2, "")
    assert err.startswith("hf-normopt inspect: ")
    assert message in err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForWeather"]}, "is for LlamaForWeather"),
        ({"num_classes": 10}, "call hf_normopt.classify(model) in Python"),
        ({"model_type": "llamma"}, "llamma"),
        ({"model_type": "rag"}, "rag"),
        ({"model_type": "llama", "num_attention_heads": 0}, "cannot be used. ZeroDivisionError"),
    ],
)
def test_configs_that_cannot_be_built(capsys, tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, err = run(capsys, "inspect", tmp_path)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err) < 1000


def test_an_adapter_whose_base_is_missing(capsys, tmp_path):
    lora = LoraConfig(base_model_name_or_path="/no/such/base", target_modules=["q_proj"])
    lora.save_pretrained(tmp_path)
    status, _, err = run(capsys, "inspect", tmp_path)
    assert status == 2
    assert "adapts /no/such/base, whose config cannot be read" in err


def test_picture_as_html(capsys, tmp_path, llama):
    file = tmp_path / "model.html"
    status, out, _ = run(capsys, "inspect", llama, "--plot", file, "--roles", "other:lm_head")
    assert status == 0
    assert "model.layers.*.mlp.up_proj (x22)" in out
    html = file.read_text()
    assert "layers ×22" in html
    assert html.count(">down_proj<") == 1
    assert html.count("<details open>") == html.count("</details>") == 2
    assert "&lt;" not in re.sub(r'title="[^"]*"', "", html)
    assert not re.search(r"<script|https?://|src=", html)
    assert re.search(r'class="box other" style="width: \d+px">131M\?<', html)


def test_picture_folds_runs_of_layers_and_opens_what_differs(tmp_path, capsys):
    config = DeepseekV3Config(num_hidden_layers=7, architectures=["DeepseekV3ForCausalLM"])
    saved(config, tmp_path)
    run(capsys, "inspect", tmp_path, "--plot", tmp_path / "model.html")
    names = re.findall(r"<summary>(.*?)<span", (tmp_path / "model.html").read_text())
    assert names == ["model", "layers.0-2 ×3", "layers.3-6 ×4", "mlp"]


def test_picture_shows_every_tensor_once(tmp_path, capsys):
    config = T5Config(num_layers=2, architectures=["T5ForConditionalGeneration"])
    saved(config, tmp_path)
    _, out, _ = run(capsys, "inspect", tmp_path, "--plot", tmp_path / "t5.html", "--format", "json")
    shown = re.findall(r'title="(\S+)', (tmp_path / "t5.html").read_text())
    assert shown == [parameter["name"] for parameter in json.loads(out)["parameters"]]


def test_picture_as_png(capsys, tmp_path, llama, pictures):
    file = tmp_path / "model.png"
    assert run(capsys, "inspect", llama, "--plot", file)[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 10_000


def test_a_picture_has_a_colour_for_each_role():
    assert list(outline.COLOURS) == list(ROLES)
    assert len({colour for colour, _ in outline.COLOURS.values()}) == len(ROLES)


@pytest.mark.parametrize("name", ["model.html", "model.png"])
def test_a_picture_of_nothing(tmp_path, name, pictures):
    picture.save_picture(tmp_path / name, "nothing to train", [], [])
    assert (tmp_path / name).stat().st_size


def test_a_png_without_matplotlib_names_the_ways_out(capsys, llama, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    status, _, err = run(capsys, "inspect", llama, "--plot", "model.png")
    assert status == 2
    assert "pip install hf_normopt[recipes]" in err
    assert ".html" in err


def test_presets(capsys):
    status, out, _ = run(capsys, "presets")
    assert status == 0
    assert "muon" in out
    assert json.loads(run(capsys, "presets", "--format", "json")[1])[0]["name"] == "normopt"


@pytest.mark.slow
def test_module_is_the_command(llama):
    command = [sys.executable, "-m", "hf_normopt", "inspect", str(llama)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "lm_head" in done.stdout
