"""A process of a Trainer under DDP, for test_sharding: folder, batch size, what goes wrong."""

import os
import sys

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_normopt import NormOpt
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


def main():
    folder, batch_size, fault = sys.argv[1:]
    torch.manual_seed(0)
    model = llama()
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
        report_to=[],
        save_strategy="no",
        logging_steps=2,
    )
    trainer = Trainer(model, args, train_dataset=data, callbacks=[Fault(fault)])
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, NormOpt)
    assert (optimizer._ranks is not None) == (args.world_size > 1)
    if args.process_index == 0:
        torch.save(trainer.model.state_dict(), f"{folder}/weights.pt")


if __name__ == "__main__":
    main()
