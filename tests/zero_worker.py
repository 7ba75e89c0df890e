"""A process that trains with DeepSpeed through Trainer, for test_deepspeed."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.test_optimizer import llama

STEPS, SAVED = 4, 2


def arguments(folder, world, stage, **options):
    """Clipping that acts, accumulation, decay and a schedule; the same batches for every world.

    A row of the head lies across partitions, and its statistic too.
    """
    options.setdefault("optim_args", "statistic_head=0.9")
    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=STEPS,
        save_steps=SAVED,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="cosine",
        optim="normopt",
        report_to=[],
        logging_steps=1,
        deepspeed=None if stage is None else config,
        **options,
    )


def train(folder, world, stage, checkpoint, path):
    """Train a small Llama, as its file says; rank 0 writes weights and logs."""
    args = arguments(folder, world, stage, seed=1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # under zero.Init
    assert (stage == 3) == all(p.shape == (0,) for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(33, (48, 12), generator=generator).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, args, train_dataset=data)
    trainer.train(resume_from_checkpoint=checkpoint)
    weights = {name: whole(p, stage) for name, p in model.named_parameters()}
    if args.process_index == 0:
        logs = [row for row in trainer.state.log_history if "loss" in row]
        torch.save({"weights": weights, "logs": logs}, f"{folder}/run.pt")


def refuse(folder, world, stage):
    """What cannot be done is refused on every rank, before anything is trained."""
    args = arguments(folder, world, stage, optim_args="step_size=dual_norm")
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
    trainer = Trainer(llama(), args, train_dataset=rows)
    with pytest.raises(ValueError, match=r"ZeRO stage 2\. ZeRO steps one group after the other"):
        trainer.train()


def whole(p, stage):
    """The weights in full precision."""
    if stage is None:
        return p.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(p).clone()


def rank_of(rank, world, port, function, *args):
    """Call a function in a process that was forked, with what a launcher sets."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    import deepspeed.ops

    # It would be compiled, which takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    function(*args)
