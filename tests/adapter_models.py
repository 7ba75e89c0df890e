"""Small models under every method that PEFT has: `build(name)` makes one of [`CASES`]."""

import copy
import warnings

import peft
import transformers as tf
from torch import nn

TEXT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


class Plain(nn.Module):
    """Targets that no transformers model has all of; `widened` is a matrix that is not square."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.wave = nn.Conv1d(16, 8, 3)
        self.image = nn.Conv2d(8, 12, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.volume = nn.Conv3d(8, 12, 3)
        self.widened = nn.Linear(16, 24)
        self.last = nn.Linear(24, 6)

    def forward(self, x):
        return self.last(self.widened(self.table(x)))


BASES = {
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**TEXT, intermediate_size=24, num_key_value_heads=1)
    ),
    "score": lambda: tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**TEXT, intermediate_size=24, num_key_value_heads=1, pad_token_id=0)
    ),
    "tied": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**TEXT, intermediate_size=24, tie_word_embeddings=True)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)
    ),
    "bert": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(**TEXT, intermediate_size=24, num_labels=3)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=16,
            patch_size=4,
            num_labels=3,
        )
    ),
    "resnet": lambda: tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
    "convnext": lambda: tf.ConvNextForImageClassification(
        tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**TEXT, intermediate_size=24, num_key_value_heads=1, num_local_experts=3)
    ),
    "plain": Plain,
}

# What a method is tried on: a target of each kind that many of them share.
Q, FC = ["q_proj"], ["q_proj", "up_proj", "down_proj"]
ALL = ["q_proj", "up_proj", "lm_head"]
KERNELS = ["image", "widened"]
WAVES = ["wave", "image", "widened"]

CASES = {
    # LoRA and its variants
    "lora": ("llama", peft.LoraConfig(r=2, target_modules=[*ALL, "embed_tokens"])),
    "lora bias": ("bert", peft.LoraConfig(r=2, target_modules=["query"], lora_bias=True)),
    "lora all biases": ("bert", peft.LoraConfig(r=2, target_modules=["query"], bias="all")),
    "lora conv1d": ("gpt2", peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)),
    "lora kernels": (
        "plain",
        peft.LoraConfig(
            r=4, target_modules=["attention", "wave", "image", "grouped", "volume", "last"]
        ),
    ),
    "lora patches": (
        "convnext",
        peft.LoraConfig(r=8, target_modules=["patch_embeddings", "pwconv1", "classifier"]),
    ),
    "lora experts": (
        "mixtral",
        peft.LoraConfig(
            r=2, target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
        ),
    ),
    "lora dora": (
        "llama",
        peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], use_dora=True),
    ),
    "lora dora kernels": (
        "plain",
        peft.LoraConfig(r=2, target_modules=["wave", "image", "volume"], use_dora=True),
    ),
    "lora rslora": ("llama", peft.LoraConfig(r=2, target_modules=Q, use_rslora=True)),
    "lora pissa": ("llama", peft.LoraConfig(r=2, target_modules=Q, init_lora_weights="pissa")),
    "lora olora": ("llama", peft.LoraConfig(r=2, target_modules=Q, init_lora_weights="olora")),
    "lora eva": (
        "llama",
        peft.LoraConfig(
            r=2, target_modules=Q, init_lora_weights="eva", eva_config=peft.EvaConfig()
        ),
    ),
    "lora orthogonal": (
        "llama",
        peft.LoraConfig(r=2, target_modules=Q, init_lora_weights="orthogonal"),
    ),
    "lora mica": ("llama", peft.LoraConfig(r=2, target_modules=Q, init_lora_weights="mica")),
    "lora activated": (
        "llama",
        peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=Q, alora_invocation_tokens=[1]),
    ),
    "lora kasa": (
        "llama",
        peft.LoraConfig(r=2, target_modules=Q, kasa_config=peft.tuners.lora.config.KasaConfig()),
    ),
    "lora monteclora": (
        "llama",
        peft.LoraConfig(
            r=2, target_modules=Q, monteclora_config=peft.tuners.lora.config.MontecloraConfig()
        ),
    ),
    "lora velora": (
        "llama",
        peft.LoraConfig(
            r=2,
            target_modules=Q,
            velora_config=peft.tuners.lora.config.VeloraConfig(num_groups=4),
        ),
    ),
    "lora blocks": (
        "llama",
        peft.LoraConfig(
            r=4,
            target_modules=["q_proj", "o_proj"],
            use_bdlora=peft.tuners.lora.config.BdLoraConfig(
                target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2
            ),
        ),
    ),
    "lora tied": (
        "tied",
        peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    ),
    # what LoRA's neighbours make of it
    "adalora": ("llama", peft.AdaLoraConfig(init_r=2, target_modules=ALL, total_step=10)),
    "adalora kernels": (
        "plain",
        peft.AdaLoraConfig(init_r=2, target_modules=KERNELS, total_step=10),
    ),
    "adamss": (
        "bert",
        peft.AdamssConfig(r=4, num_subspaces=2, subspace_rank=2, target_modules=["query"]),
    ),
    "deft": ("llama", peft.DeftConfig(r=2, target_modules=Q)),
    "deft qr": (
        "gpt2",
        peft.DeftConfig(
            r=2, target_modules=["c_fc"], decomposition_method="qr", fan_in_fan_out=True
        ),
    ),
    "delora": ("llama", peft.DeloraConfig(r=2, target_modules=ALL)),
    "glora": ("bert", peft.GloraConfig(r=2, target_modules=["query"])),
    "glora vector": (
        "bert",
        peft.GloraConfig(
            target_modules=["query"], config_A_B="vector", config_C="vector", config_D_E="vector"
        ),
    ),
    "glora constant": ("bert", peft.GloraConfig(target_modules=["query"], config_A_B="constant")),
    "gralora": ("llama", peft.GraloraConfig(r=4, hybrid_r=2, target_modules=["q_proj", "up_proj"])),
    "hira": ("llama", peft.HiraConfig(r=2, target_modules=[*ALL, "embed_tokens"])),
    "hira kernels": ("plain", peft.HiraConfig(r=2, target_modules=[*WAVES, "volume"])),
    "lily": (
        "llama",
        peft.LilyConfig(r=2, num_B=3, stride_A=2, target_modules=["q_proj", "up_proj"]),
    ),
    "loha": ("llama", peft.LoHaConfig(r=2, target_modules=ALL)),
    "loha kernels": ("plain", peft.LoHaConfig(r=2, target_modules=WAVES)),
    "loha effective": (
        "plain",
        peft.LoHaConfig(r=2, target_modules=WAVES, use_effective_conv2d=True),
    ),
    "lokr": ("llama", peft.LoKrConfig(r=1, target_modules=ALL)),
    "lokr both": ("llama", peft.LoKrConfig(r=1, target_modules=ALL, decompose_both=True)),
    "lokr full": ("llama", peft.LoKrConfig(r=8, target_modules=ALL, decompose_factor=4)),
    "lokr kernels": ("plain", peft.LoKrConfig(r=1, target_modules=KERNELS)),
    "lokr effective": (
        "plain",
        peft.LoKrConfig(r=1, target_modules=WAVES, use_effective_conv2d=True, decompose_both=True),
    ),
    "lokr full kernels": ("plain", peft.LoKrConfig(r=8, target_modules=WAVES)),
    "miss": ("llama", peft.MissConfig(r=4, target_modules=FC)),
    "miss bat": ("llama", peft.MissConfig(r=4, target_modules=FC, init_weights="bat")),
    "miss mini": ("llama", peft.MissConfig(r=4, mini_r=2, target_modules=FC, init_weights="mini")),
    "osf": ("llama", peft.OSFConfig(effective_rank=4, target_modules=FC)),
    "peanut": ("llama", peft.PeanutConfig(r=2, depth=1, target_modules=["q_proj", "up_proj"])),
    "poly": (
        "t5",
        peft.PolyConfig(r=2, n_tasks=3, n_skills=2, n_splits=4, target_modules=["q", "wi"]),
    ),
    "pvera": ("llama", peft.PveraConfig(r=4, target_modules=Q)),
    "randlora": ("llama", peft.RandLoraConfig(r=4, target_modules=FC)),
    "supertuning": (
        "llama",
        peft.SupertuningConfig(r=2, lora_alpha=2, sparsity=0.9, target_modules=Q),
    ),
    "tinylora": ("llama", peft.TinyLoraConfig(r=2, u=4, target_modules=["q_proj", "embed_tokens"])),
    "unilora": ("llama", peft.UniLoraConfig(r=2, theta_d_length=8, target_modules=Q)),
    "vblora": ("llama", peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, target_modules=FC)),
    "vera": ("gpt2", peft.VeraConfig(r=4, target_modules=["c_fc"], fan_in_fan_out=True)),
    # rotations, spectra, sparse weights
    "boft": ("llama", peft.BOFTConfig(boft_block_size=4, target_modules=Q)),
    "boft kernels": ("plain", peft.BOFTConfig(boft_block_size=4, target_modules=KERNELS)),
    "c3a": ("llama", peft.C3AConfig(block_size=8, target_modules=["q_proj", "up_proj"])),
    "fourierft": ("llama", peft.FourierFTConfig(n_frequency=10, target_modules=Q)),
    "frod": ("llama", peft.FrodConfig(target_modules=Q, progressbar=False)),
    "hra": ("llama", peft.HRAConfig(r=2, target_modules=Q)),
    "hra kernels": ("plain", peft.HRAConfig(r=2, target_modules=KERNELS)),
    "oft": ("llama", peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "embed_tokens"])),
    "oft shared": (
        "plain",
        peft.OFTConfig(oft_block_size=4, target_modules=KERNELS, coft=True, block_share=True),
    ),
    "psoft": ("llama", peft.PsoftConfig(r=4, target_modules=Q)),
    "psoft free": ("llama", peft.PsoftConfig(r=4, target_modules=Q, psoft_orth=False)),
    "road": ("llama", peft.RoadConfig(group_size=8, target_modules=Q)),
    "road 4": ("llama", peft.RoadConfig(variant="road_4", group_size=8, target_modules=Q)),
    "shira": ("llama", peft.ShiraConfig(r=2, target_modules=Q)),
    "waveft": ("llama", peft.WaveFTConfig(n_frequency=10, target_modules=Q)),
    # gains, biases, norms
    "beft": ("bert", peft.BeftConfig(target_modules=["query"])),
    "ia3": ("t5", peft.IA3Config(target_modules=["k", "wo"], feedforward_modules=["wo"])),
    "ia3 kernels": (
        "plain",
        peft.IA3Config(
            target_modules=["image", "volume", "widened"], feedforward_modules=["widened"]
        ),
    ),
    "ln tuning": ("bert", peft.LNTuningConfig(target_modules=["LayerNorm"])),
    "ln tuning head": (
        "llama",
        peft.LNTuningConfig(target_modules=["norm", "lm_head", "embed_tokens"]),
    ),
    # prompts
    "adaption prompt": (
        "llama",
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    ),
    "cartridge": ("llama", peft.CartridgeConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
    "cpt": (
        "llama",
        peft.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=[0, 1, 2, 3],
            cpt_mask=[1] * 4,
            cpt_tokens_type_mask=[1, 2, 3, 4],
        ),
    ),
    "multitask prompts": (
        "t5",
        peft.MultitaskPromptTuningConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_tasks=3, num_ranks=2
        ),
    ),
    "p-tuning": ("bert", peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=4)),
    "p-tuning lstm": (
        "llama",
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_reparameterization_type="LSTM"
        ),
    ),
    "prefix": ("llama", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "prefix projected": (
        "t5",
        peft.PrefixTuningConfig(
            task_type="SEQ_2_SEQ_LM",
            num_virtual_tokens=4,
            prefix_projection=True,
            encoder_hidden_size=8,
        ),
    ),
    "prompts": ("bert", peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)),
    # copies
    "shadow": ("score", peft.ShadowConfig(r=2, task_type="SEQ_CLS", shadow_hidden_size=8)),
    "tokens": (
        "llama",
        peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
    ),
    "tokens tied": ("tied", peft.LoraConfig(r=2, target_modules=Q, trainable_token_indices=[1, 2])),
    "tokens head": (
        "llama",
        peft.LoraConfig(
            r=2, target_modules=Q, trainable_token_indices={"embed_tokens": [1], "lm_head": [1]}
        ),
    ),
    "saved": (
        "llama",
        peft.LoraConfig(r=2, target_modules=Q, modules_to_save=["embed_tokens", "lm_head", "norm"]),
    ),
    "saved vit": (
        "vit",
        peft.LoHaConfig(
            r=2, target_modules=["query", "q_proj", "projection"], modules_to_save=["classifier"]
        ),
    ),
    "saved resnet": (
        "resnet",
        peft.LoKrConfig(r=1, target_modules=["convolution"], modules_to_save=["classifier"]),
    ),
}


def wrap(base, config):
    """PEFT's model, with the warnings of the tiny sizes silenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, copy.deepcopy(config))


def build(name):
    base, config = CASES[name]
    return wrap(BASES[base](), config)
