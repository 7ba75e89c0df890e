"""What telemetry costs: the time of its measurements over the time of the steps between two logs.

    python recipes/measure_telemetry.py

Random batches on models of three shapes; two minutes on two CPU cores.
"""

import time
from statistics import median

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_normopt import create_normopt_optimizer
from hf_normopt.trainer.gauge import Gauge

LOGGING_STEPS = 10
LOGS = 6


def minilm() -> PreTrainedModel:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=12))


def llama() -> PreTrainedModel:
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, vocab_size=8000))


def tiny() -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, vocab_size=1000))


class Clock:
    """Time spent inside a function."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args):
        start = time.perf_counter()
        result = self.function(*args)
        self.seconds += time.perf_counter() - start
        return result


def measure(model: PreTrainedModel) -> tuple[float, list[float]]:
    """Seconds of a step without telemetry, and of the telemetry of each log."""
    optimizer, gauge = create_normopt_optimizer(model, lr=1e-3), Gauge()
    steps, costs = [], []
    for step in range(1, LOGS * LOGGING_STEPS + 1):
        logged = step % LOGGING_STEPS == 0
        observe, read = Clock(gauge.observe), Clock(gauge.read)
        optimizer.observer = observe if logged else None
        ids = torch.randint(0, 1000, (16, 32))
        is_classifier = isinstance(model, BertForSequenceClassification)
        labels = torch.randint(0, 2, (16,)) if is_classifier else ids
        start = time.perf_counter()
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        if logged:
            read(optimizer)
            costs.append(observe.seconds + read.seconds)
        else:
            steps.append(time.perf_counter() - start)
    return median(steps), costs


if __name__ == "__main__":
    torch.manual_seed(0)
    print("model   step, ms  telemetry, ms  share at logging_steps=10  first log, ms")
    for make in (minilm, llama, tiny):
        step, (first, *later) = measure(make())
        share = median(later) / (LOGGING_STEPS * step)
        print(
            f"{make.__name__:6}  {1e3 * step:8.1f}  {1e3 * median(later):13.1f}  {share:25.2%}  "
            f"{1e3 * first:13.1f}"
        )
