"""TRL's trainers: the doors that each accepts give one training run."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.trainer_utils import set_seed
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_normopt import NormOptFactory, NormOptMixin, create_normopt_optimizer

from .test_doors import COMMAND, PYTHON, flags, in_shell, trained
from .test_trainer import equal, inner, weights

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # trl 1.16 has it on by default, under names that transformers 5.23 wants no more
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"w{i}" for i in range(28))]
OPTIONS = {"lr_head": 2.0, "momentum": 0.9, "schedule_head": "constant", "situation": "neutral"}
TEXT = ",".join(f"{key}={value}" for key, value in OPTIONS.items())
LR, DECAY = 1e-3, 0.1


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    inside = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inside,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return made


def llama(cls=LlamaForCausalLM, **changes):
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **changes,
    )
    return cls(config)


def reward_model():
    return llama(LlamaForSequenceClassification, num_labels=1)


def texts(start, n=12):
    return [" ".join(f"w{(start + i + j) % 28}" for j in range(4)) for i in range(n)]


def prefers_even_words(completions, **kwargs):
    return [sum(int(w[1:]) % 2 == 0 for w in c.split() if w[1:].isdigit()) for c in completions]


PAIRS = {"chosen": texts(4), "rejected": texts(9)}


@dataclass(frozen=True)
class Kind:
    """A trainer, its configuration and its data."""

    trainer: type
    config: type
    data: dict
    model: object = llama
    options: dict = field(default_factory=dict)
    more: object = dict
    takes_factory: bool = False

    def args(self, folder, **changes):
        common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 3, "seed": 1}
        batch = {"per_device_train_batch_size": 2, "save_strategy": "no", "warmup_steps": 1}
        rates = {"learning_rate": LR, "weight_decay": DECAY}
        together = {**common, **batch, **rates, **self.options, **changes}
        return self.config(output_dir=str(folder), **together)

    def make(self, folder, *, mixed=False, model=None, optim=None, **others):
        """A trainer of this kind; `optim=None` leaves the configuration's default."""
        cls = type(f"Mixed{self.trainer.__name__}", (NormOptMixin, self.trainer), {})
        named = ({"optim": optim} if optim else {}) | {"optim_args": TEXT}
        return (cls if mixed else self.trainer)(
            model or self.model(),
            args=self.args(folder, **named),
            train_dataset=Dataset.from_dict(self.data),
            processing_class=tokenizer(),
            **self.more(),
            **others,
        )


KINDS = {
    "sft": Kind(SFTTrainer, SFTConfig, {"text": texts(4)}, takes_factory=True),
    "dpo": Kind(
        DPOTrainer,
        DPOConfig,
        {"prompt": texts(0), **PAIRS},
        more=lambda: {"ref_model": llama()},
    ),
    "grpo": Kind(
        GRPOTrainer,
        GRPOConfig,
        {"prompt": texts(0)},
        options={"num_generations": 2, "max_completion_length": 6},
        more=lambda: {"reward_funcs": prefers_even_words},
    ),
    "reward": Kind(RewardTrainer, RewardConfig, PAIRS, reward_model, takes_factory=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_doors_give_one_run_bit_for_bit(name, tmp_path):
    kind, builder = KINDS[name], {"lr": LR, "weight_decay": DECAY, **OPTIONS}
    run = trained(kind.make(tmp_path, optim="normopt"))
    assert not equal(run, weights(kind.model()))
    for optim in ("normopt", None):
        assert equal(trained(kind.make(tmp_path, optim=optim, mixed=True)), run)
    model = kind.model()
    optimizers = (create_normopt_optimizer(model, **builder), None)
    assert equal(trained(kind.make(tmp_path, model=model, optimizers=optimizers)), run)
    factory = {"optimizer_cls_and_kwargs": (NormOptFactory, builder)}
    if kind.takes_factory:
        assert equal(trained(kind.make(tmp_path, **factory)), run)
    else:
        with pytest.raises(TypeError, match="optimizer_cls_and_kwargs"):
            kind.make(tmp_path, **factory)


def test_generation_has_rewards_to_learn_from(tmp_path):
    """Otherwise the test above would compare runs without gradients."""
    trainer = KINDS["grpo"].make(tmp_path, optim="normopt")
    trained(trainer)
    moved = [s["momentum_buffer"].norm() for s in inner(trainer).state.values()]
    assert min(moved) > 0


@pytest.mark.parametrize("optim", ["normopt", "normopt_scion"])
def test_lora_under_sft_has_the_roles_of_its_adapters(tmp_path, optim):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    kind = KINDS["sft"]

    def args():
        return kind.args(tmp_path, optim=optim, learning_rate=1e-4)

    runs = []
    for cls in (SFTTrainer, type("MixedSFTTrainer", (NormOptMixin, SFTTrainer), {})):
        trainer = cls(
            llama(),
            args=args(),
            train_dataset=Dataset.from_dict(kind.data),
            processing_class=tokenizer(),
            peft_config=lora,
        )
        runs.append(trained(trainer))
    assert equal(*runs)
    names = {g["role"]: g["param_names"] for g in inner(trainer).param_groups}
    assert set(names) == {"linear", "head"}
    assert all("lora_A" in name or "lora_B" in name for name in names["linear"])
    assert len(names["linear"]) == 4
    assert names["head"] == ["base_model.model.lm_head.modules_to_save.default.weight"]


@pytest.mark.slow
def test_the_command_of_trl_gives_the_same_run(tmp_path):
    """It starts trl/scripts/sft.py, which knows nothing of the package, in another process."""
    kind, folder = KINDS["sft"], tmp_path / "model"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (tmp_path / "data").mkdir()
    Dataset.from_dict(kind.data).to_json(tmp_path / "data" / "train.jsonl")
    args = {
        "model_name_or_path": folder,
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "optim": "normopt",
        "optim_args": TEXT,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "warmup_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 1,
    }
    trl = str(Path(COMMAND).parent / "trl")
    done = in_shell([PYTHON, "-m", "hf_normopt", "run", trl, "sft", *flags(args)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "NormOpt, preset" in done.stdout
    found = weights(LlamaForCausalLM.from_pretrained(tmp_path / "out"))
    assert equal(found, trained(kind.make(tmp_path, optim="normopt")))
