import json
import subprocess
import sys

import pytest
from peft import LoraConfig
from transformers import GPT2Config, LlamaConfig

from hf_normopt.cli import main
from hf_normopt.roles import ROLES


@pytest.fixture
def llama(tmp_path):
    LlamaConfig(num_hidden_layers=22, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path


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
    assert "linear rms->rms 154 4,452,253,696" in lines or any(
        line.startswith("linear rms->rms 154") for line in lines
    )


def test_inspect_takes_a_config_file_and_another_preset(capsys, llama):
    status, out, _ = run(capsys, "inspect", llama / "config.json", "--preset", "muon", "--why")
    assert status == 0
    assert "l2->l2 (muon)" in out
    assert "get_output_embeddings()" in out


def test_inspect_as_json(capsys, tmp_path):
    GPT2Config(n_layer=1, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    records = json.loads(run(capsys, "inspect", tmp_path, "--format", "json")[1])
    first = records[0]
    assert set(first) == {
        "name",
        "shape",
        "role",
        "kind",
        "layout",
        "reason",
        "tied_to",
        "norm",
        "rule",
    }
    assert (first["name"], first["role"], first["tied_to"]) == (
        "transformer.wte.weight",
        "embedding",
        "lm_head.weight",
    )
    assert all(record["role"] in ROLES for record in records)


def test_inspect_as_markdown(capsys, llama):
    _, out, _ = run(capsys, "inspect", llama, "--format", "markdown")
    assert out.splitlines()[0].startswith("| parameter")
    assert set(out.splitlines()[1]) == set("|-:")


def test_inspect_of_an_adapter(capsys, tmp_path):
    base = tmp_path / "base"
    LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"]).save_pretrained(base)
    LoraConfig(base_model_name_or_path=str(base), target_modules=["q_proj"]).save_pretrained(
        tmp_path / "a"
    )
    status, out, _ = run(capsys, "inspect", tmp_path / "a")
    assert status == 0
    assert "linear/adapter_a" in out
    assert "embed_tokens" not in out


def test_inspect_with_overrides(capsys, llama):
    _, out, _ = run(capsys, "inspect", llama, "--roles", "head:layers.0.mlp.up_proj")
    assert "model.layers.*.mlp.up_proj (x21)" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no/such/model"], "no/such/model"),
        (["./nowhere"], "There is no file or folder ./nowhere"),
        (["MODEL", "--roles", "head:nothing"], "matches none"),
        (["MODEL", "--roles", "nothing"], "expected role:REGEX"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(capsys, llama, argv, message):
    status, out, err = run(
        capsys, "inspect", *[str(llama) if word == "MODEL" else word for word in argv]
    )
    assert (status, out) == (2, "")
    assert err.startswith("hf-normopt inspect: ")
    assert message in err


def test_presets(capsys):
    status, out, _ = run(capsys, "presets")
    assert status == 0
    assert "muon" in out
    assert json.loads(run(capsys, "presets", "--format", "json")[1])[0]["name"] == "normopt"


def test_module_is_the_command(llama):
    command = [sys.executable, "-m", "hf_normopt", "inspect", str(llama)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "lm_head" in done.stdout
