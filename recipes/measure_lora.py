"""Which step an adapter gets: AdamW, each factor by itself, or the product by one of several rules.

    python recipes/measure_lora.py intents --ranks 4 16 64

trains LoRA on one of three tasks, with tuned rates and paired seeds as `compare.py` does, and
prints a table for each rank:

* `intents`: MiniLM and a new head, 77 intents of bank customers, 80 steps of 16;
* `answers`: a Llama of 3 layers, first pretrained on Shakespeare's bytes, on worked answers, 150
  steps of 16 x 64 bytes;
* `clothes`: a small ViT, first pretrained on five classes of Fashion-MNIST, on the other five, 150
  steps of 32.

Rules, all with momentum 0.95 (Nesterov), warm-up and linear decay, no weight decay, α = 16 at every
rank, and the same rule for a new head and biases:

* `adamw`: betas 0.9 and 0.999;
* `factors`: rms -> rms for A and for B;
* `halves`: half of the length for D_A and for D_B each, so that all singular values of both halves
  are equal (LoRA-Muon);
* `renormalised`: B's half is lengthened, at the most twice, until the whole has the asked norm;
* `product`: what the package does, the whole change over the tangent space, see
  `hf_normopt/norms/product.py`;
* `NAME+metric`: the same under ‖P^(1/2) D Q^(1/2)‖, where P and Q are fourth roots of the
  momentum's row and column energies over their means, within 1/2 and 2.
"""

import argparse
import functools
import gzip
import io
import itertools
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import torch
from arena.plan import Plan
from arena.runs import ROOT, Results, Task, compare
from compare import report
from peft import LoraConfig, get_peft_model
from PIL import Image
from text_classification import bundled_minilm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_normopt import create_normopt_optimizer, orthogonalize
from hf_normopt.cards.run_record import commit_of_script
from hf_normopt.norms.product import GUARD, Pair, SpectralProduct, _inverse_root

DATA = Path(__file__).parent / "data"
ALPHA, WARMUP, LENGTH = 16, 0.1, 64


@dataclass(frozen=True, kw_only=True)
class Halves(SpectralProduct):
    """Each of D_A and D_B has half of the length."""

    def factor_lmos(self, pair, size, reach):
        half = size / self.unit(pair.b.shape[-2], pair.a.shape[-1]) / 2
        root_a = _inverse_root(pair.a)
        delta = reach * half / (pair.scale.double() * GUARD)
        root_b = _inverse_root(pair.b.mT, delta.square() * (root_a @ root_a.mT))
        step = half / pair.scale
        root_a, root_b = root_a.to(pair.m_b.dtype), (root_b * step).to(pair.m_a.dtype)
        d_a = root_b @ orthogonalize(root_b.mT @ pair.m_a)
        return d_a, orthogonalize(pair.m_b @ root_a) @ (root_a * step).mT


@dataclass(frozen=True, kw_only=True)
class Renormalised(Halves):
    """B's half is lengthened until the whole change has the asked norm."""

    def factor_lmos(self, pair, size, reach):
        d_a, d_b = super().factor_lmos(pair, size, reach)
        left = torch.cat([d_b, pair.b], -1).double()
        right = torch.cat([pair.a, d_a], -2).double() * pair.scale
        cores = torch.linalg.qr(left)[1] @ torch.linalg.qr(right.mT)[1].mT
        norm = torch.linalg.matrix_norm(cores, 2)[..., None, None]
        asked = size / self.unit(pair.b.shape[-2], pair.a.shape[-1])
        factor = torch.where(norm > 0, asked / norm, 1).clamp(1, 2)
        return d_a, d_b * factor.to(d_b.dtype)


def metric(momentum, dim):
    """The metric of one side, from the energies of the momentum's rows or columns."""
    energy = momentum.square().mean(dim, keepdim=True)
    mean = energy.mean((-2, -1), keepdim=True)
    return torch.where(mean > 0, energy / mean, 1).pow(0.25).clamp(0.5, 2)


def under_metric(kind):
    """The same rule under the metric."""

    @dataclass(frozen=True, kw_only=True)
    class UnderMetric(kind):
        def factor_lmos(self, pair, size, reach):
            p, q = metric(pair.m_b, -1).sqrt(), metric(pair.m_a, -2).sqrt()
            pair = Pair(pair.a * q, pair.b * p, pair.scale, pair.m_a / q, pair.m_b / p)
            d_a, d_b = super().factor_lmos(pair, size, reach)
            return d_a / q, d_b / p

    return UnderMetric


NORMS = {"product": SpectralProduct, "halves": Halves, "renormalised": Renormalised}
NORMS |= {f"{name}+metric": under_metric(kind) for name, kind in NORMS.items()}


def optimizer(model, name, rate):
    """The optimizer of a contender, `NAME` or `NAME:lr_head=10`."""
    name, _, options = name.partition(":")
    changes = dict(word.split("=") for word in options.split(",") if word)
    if name == "adamw":
        return create_normopt_optimizer(model, lr=rate, preset="adam", **changes)
    if name == "factors":
        changes["norm_product"] = "rms->rms"
    elif name != "product":
        changes["norm_product"] = NORMS[name](input="rms", output="rms")
    return create_normopt_optimizer(model, lr=rate, situation="neutral", **changes)


def lines(path):
    return datasets.load_dataset("json", data_files=str(path), split="train")


def kept(file, make):
    """A model's weights from a file, or made and written."""
    file = ROOT / "outputs" / "measure_lora" / file
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make().state_dict(), file)
    return torch.load(file)


def pretrained(model, batches, rate=1e-3):
    """The model after a run on all batches."""
    steps = len(batches)
    made = create_normopt_optimizer(model, lr=rate)
    for step, batch in enumerate(batches):
        for group in made.param_groups:
            group["lr"] = rate * (1 - step / steps)
        model(**batch).loss.backward()
        made.step()
        made.zero_grad()
    return model


class Intents:
    """MiniLM with a new head, on 77 intents."""

    steps, batch, targets, saved = 80, 16, ["query", "key", "value", "dense"], ["classifier"]
    rates: ClassVar = {"factors": 1e-3}
    usual_rate = 4e-3

    def __init__(self):
        files = {s: str(DATA / "banking77" / f"{s}.csv.gz") for s in ("train", "validation")}
        data = datasets.load_dataset("csv", data_files=files)
        tokenizer = AutoTokenizer.from_pretrained(bundled_minilm())

        def encoded(rows):
            made = tokenizer(
                rows["text"], truncation=True, max_length=32, padding=True, return_tensors="pt"
            )
            return {**made, "labels": torch.tensor(rows["label"])}

        self.rows = encoded(data["train"][:])
        self.held_out = encoded(data["validation"][:])

    def model(self):
        return AutoModelForSequenceClassification.from_pretrained(
            bundled_minilm(), num_labels=77, dtype="float32"
        )


class Answers:
    """A byte Llama that has read Shakespeare, on worked answers."""

    steps, batch, targets, saved = 150, 16, "all-linear", None
    rates: ClassVar = {"adamw": 8e-3, "factors": 2e-3}
    usual_rate = 1.6e-2

    def __init__(self):
        text = lines(DATA / "gsm8k" / "train.jsonl.gz")
        held = lines(DATA / "gsm8k" / "validation.jsonl.gz")
        self.rows, self.held_out = (
            self.rows_of("\n".join(f"{r['question']}\n{r['answer']}" for r in part).encode())
            for part in (text, held)
        )
        self.held_out = {key: value[:500] for key, value in self.held_out.items()}

    @staticmethod
    def rows_of(text):
        ids = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).reshape(-1, LENGTH)
        return {"input_ids": ids, "labels": ids}

    @staticmethod
    def fresh():
        sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))

    def model(self):
        def make():
            torch.manual_seed(0)
            text = gzip.decompress((DATA / "tinyshakespeare" / "train.txt.gz").read_bytes())
            rows = self.rows_of(text)
            order = torch.randperm(len(rows["labels"]))[: 600 * 16].split(16)
            return pretrained(self.fresh(), [take(rows, index) for index in order])

        model = self.fresh()
        model.load_state_dict(kept("llama.pt", make))
        return model


class Clothes:
    """A small ViT that knows five kinds of clothes, on five others."""

    steps, batch, targets, saved = 150, 32, "all-linear", ["classifier"]
    rates: ClassVar = {"factors": 1e-3}
    usual_rate = 4e-3

    def __init__(self):
        parts = {}
        for split in ("train", "validation"):
            data = datasets.load_dataset(
                "parquet", data_files=str(DATA / "fashion_mnist" / f"{split}.parquet")
            )["train"].cast_column("image", datasets.Image(decode=False))
            images = [np.asarray(Image.open(io.BytesIO(r["bytes"]))) for r in data["image"]]
            pixels = torch.tensor(np.stack(images)).float()[:, None] / 127.5 - 1
            labels = torch.tensor(data["label"])
            parts[split] = {"pixel_values": pixels, "labels": labels}
        self.first = self.half(parts["train"], labels_below=True)
        self.rows = self.half(parts["train"], labels_below=False)
        self.held_out = self.half(parts["validation"], labels_below=False)

    @staticmethod
    def half(part, labels_below):
        index = (part["labels"] < 5) == labels_below
        return {"pixel_values": part["pixel_values"][index], "labels": part["labels"][index] % 5}

    @staticmethod
    def fresh():
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
        config = ViTConfig(
            image_size=28,
            patch_size=7,
            num_channels=1,
            num_attention_heads=4,
            num_labels=5,
            **sizes,
        )
        return ViTForImageClassification(config)

    def model(self):
        def make():
            torch.manual_seed(0)
            count = len(self.first["labels"])
            order = [torch.randperm(count).split(32) for _ in range(4)]
            batches = [take(self.first, index) for index in itertools.chain(*order)]
            return pretrained(self.fresh(), batches)

        state = kept("vit.pt", make)
        model = self.fresh()
        own = model.state_dict()  # with a new head
        model.load_state_dict({k: own[k] if "classifier" in k else v for k, v in state.items()})
        return model


def take(data, index):
    return {key: value[index] for key, value in data.items()}


TASKS = {"intents": Intents, "answers": Answers, "clothes": Clothes}


@torch.no_grad()
def measured(model, data):
    """The loss on held-out data."""
    model.eval()
    total = 0.0
    for index in torch.arange(len(data["labels"])).split(100):
        total += model(**take(data, index)).loss.item() * len(index)
    return total / len(data["labels"])


def trained(task, run, rank):
    """A run: its loss on held-out data, which is infinite or nan where training diverged."""
    torch.manual_seed(run.seed)
    config = LoraConfig(
        r=rank, lora_alpha=ALPHA, target_modules=task.targets, modules_to_save=task.saved
    )
    model = get_peft_model(task.model(), config).train()
    made = optimizer(model, run.contender, run.rate)
    trainable = [p for p in model.parameters() if p.requires_grad]
    draws = torch.Generator().manual_seed(run.seed)
    begin, stepping = time.process_time(), 0.0
    for step in range(task.steps):
        share = min((step + 1) / (WARMUP * task.steps), (1 - step / task.steps) / (1 - WARMUP))
        for group in made.param_groups:
            group["lr"] = run.rate * share
        index = torch.randint(len(task.rows["labels"]), (task.batch,), generator=draws)
        batch = take(task.rows, index)
        if "attention_mask" in batch:  # no longer than its longest text
            longest = int(batch["attention_mask"].sum(1).max())
            batch = {k: v[:, :longest] if v.ndim > 1 else v for k, v in batch.items()}
        loss = model(**batch).loss
        if not torch.isfinite(loss):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        since = time.process_time()
        made.step()
        stepping += time.process_time() - since
        made.zero_grad()
    seconds = time.process_time() - begin
    return {"loss": measured(model, task.held_out), "seconds": seconds, "stepping": stepping}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("task", choices=TASKS)
    add("--ranks", type=int, nargs="+", default=[4, 16, 64])
    add("--rules", nargs="+", default=["adamw", "factors", "product"])
    add("--tune", type=int, nargs="+", default=[0], help="seeds that choose the rate")
    add("--fresh", type=int, nargs="*", default=[10, 11, 12, 13, 14], help="seeds of the report")
    add("--file", type=Path, default=ROOT / "outputs/measure_lora/runs.jsonl", help="of results")
    add("--coarse", action="store_true", help="only rates a factor of 2 apart")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task, results = TASKS[args.task](), Results(args.file)
    commit = commit_of_script() or ""

    def make(_, run, results, rank):
        found = trained(task, run, rank)
        return {
            "steps": task.steps,
            "metrics": {"loss": found["loss"]},
            "cpu_seconds": found["seconds"],
            "step_seconds": found["stepping"],
            "curve": [],
            "recipe": "measure_lora",
            "argv": [args.task, "--ranks", str(rank)],
            "commit": commit,
            "hardware": f"CPU ({platform.machine()}), 1 process, 1 thread",
        }

    for rank in args.ranks:
        name = f"LoRA {args.task}, rank {rank}"
        starts = {
            rule: task.rates.get(rule.partition(":")[0], task.usual_rate) for rule in args.rules
        }
        plan = Plan(name, starts, tuple(args.tune), tuple(args.fresh), fine=not args.coarse)
        compare(
            plan, Task(name, "measure_lora"), results, "loss", functools.partial(make, rank=rank)
        )
        print(f"{name}\n\n{report(results, name)}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
