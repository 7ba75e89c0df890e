"""A process of a Trainer, for test_sharding: folder, batch size, model, what goes wrong."""

import os
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from hf_normopt import NormOpt
from hf_normopt.optim.sharding import gathered
from tests.test_optimizer import llama


class Fault(TrainerCallback):
    def __init__(self, what):
        self.what = what

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step != 1 or args.process_index != 1:
            return
        if self.what == "raise":
            raise ValueError("rank 1 has had enough")
        if self.what == "die":
            os._exit(9)


def made(kind, folder, world):
    """The same model in each process; sharded ones are loaded, as transformers does it."""
    torch.manual_seed(0)
    if kind == "experts":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4))
    else:
        model = llama()
    if kind == "lora":
        return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False))
    if kind == "llama" or world == 1:
        return model
    path = f"{folder}/model{os.environ['RANK']}"
    model.save_pretrained(path)
    expert_parallel = {"ep_size": world} if kind == "experts" else {}
    config = DistributedConfig(fsdp_size=world, **expert_parallel)
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=config)


def train(folder, batch_size, kind, fault="none"):
    world = int(os.environ["WORLD_SIZE"])
    model = made(kind, folder, world)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (32, 12), generator=generator).tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=int(batch_size),
        learning_rate=1e-2,
        optim="normopt",
        optim_args="situation=neutral",  # one is made, the other loaded
        report_to=[],
        save_strategy="no",
        logging_steps=2,
    )
    trainer = Trainer(model, args, train_dataset=data, callbacks=[Fault(fault)])
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, NormOpt)
    is_sharded = any(isinstance(p, DTensor) for p in trainer.model.parameters())
    assert is_sharded == (world > 1 and kind in ("fsdp", "experts"))
    assert is_sharded or (optimizer._ranks is not None) == (world > 1)
    weights = {name: gathered(p) for name, p in trainer.model.state_dict().items()}
    if args.process_index == 0:
        torch.save(weights, f"{folder}/weights.pt")


def rank_of(rank, world, port, *args):
    """Train in a process that was forked, with what a launcher sets."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train(*args)


if __name__ == "__main__":
    train(*sys.argv[1:])
