"""QLoRA on real 4-bit weights: the adapters step as on the same weights unpacked."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import hf_normopt

bitsandbytes = pytest.importorskip("bitsandbytes")

TEXT = [{"input_ids": torch.arange(i, i + 16) % 64} for i in range(64)]
ROWS = [{**row, "labels": row["input_ids"]} for row in TEXT]


def unpacked(model):
    """The same model with linear layers in float32."""
    plain = copy.deepcopy(model)
    for path, layer in list(plain.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                layer.weight.data, layer.weight.quant_state
            )
            linear = nn.Linear(*weight.shape[::-1], bias=False)
            linear.weight.data.copy_(weight)
            plain.set_submodule(path, linear)
    plain.is_quantized = plain.is_loaded_in_4bit = False
    del plain.hf_quantizer, plain.config.quantization_config
    return plain


def trained(model, folder):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(**options))
    args = TrainingArguments(
        folder, optim="normopt", learning_rate=5e-3, max_steps=8, per_device_train_batch_size=8,
        use_cpu=True, report_to="none", save_strategy="no", max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=ROWS)
    trainer.train()
    return trainer


def test_adapters_on_four_bits_step_as_on_the_same_weights_unpacked(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        device_map="cpu",
    )
    packed = model.model.layers[0].mlp.up_proj.weight
    assert packed.shape != (128, 64)
    assert not packed.is_floating_point()
    plain = trained(unpacked(model), tmp_path / "plain")
    quantized = trained(model, tmp_path / "quantized")

    kinds = {group["kind"] for group in quantized.optimizer.param_groups}
    assert kinds == {"product"}
    specs = {spec.name: spec.role for spec in hf_normopt.classify(quantized.model)}
    assert set(specs.values()) == {"linear"}
    moved = dict(quantized.model.named_parameters())
    expected = {n: p for n, p in plain.model.named_parameters() if p.requires_grad}
    assert expected.keys() == specs.keys()
    for name, p in expected.items():
        torch.testing.assert_close(moved[name], p, rtol=1e-3, atol=1e-4)
        if "lora_B" in name:
            assert p.abs().max() > 1e-3
