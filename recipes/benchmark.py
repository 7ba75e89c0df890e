"""What a step costs and how good it is: NormOpt next to AdamW and to other packages' Muon.

    python recipes/benchmark.py --against adamw,torch-muon,pytorch-optimizer

prints the machine, and for each model a table: the median time of a step, the median of its ratio
to the first of `--against` in the same round, the optimizer's state, the peak memory of a step
above that before it, the least efficiency of a step as a spectral oracle, and the step's share of a
training step. At the end it draws the ratios into `outputs/benchmark.png`. About ten minutes on an
idle CPU core; on a busy machine the times mean nothing. On a GPU, with nothing else to say:

    python recipes/benchmark.py --device cuda

takes GPT-2, a Llama of 1 B, four layers of one of 7 B, and the LoRA factors of the latter, against
all of the other packages that are installed, ends within ten minutes, and prints what the data
sheet predicts (`hf-normopt inspect --cost`) beside what was measured. One optimizer is there at a
time, the forward and backward pass is in bfloat16 (autocast), measured for the first number of
`--tokens`, and so many times as long for the others, as accumulated gradients are.

Models have random weights, gradients are Gaussian and the same for all, weight decay is 0.01. Other
packages' Muon gets the matrices that NormOpt gives a spectral norm, and AdamW gets the rest.

* LoRA's factors A and B are those of adapters: NormOpt steps B A as one operator, and others step
  each factor.
* The efficiency is ⟨G, D⟩ / (‖D‖ ‖G‖†), spectral and nuclear norm, of the first step D against the
  gradient G, for up to 12 matrices; the exact oracle has 1. NormOpt reads a fused matrix as its
  parts, the others as one. AdamW does not aim at it. Steps of B A have none: no gradient of it is
  there to compare with.
* A package that is missing, or fails, has a row that says so.
* Both packages hard-code bfloat16 for Muon's iteration, which CPUs without bfloat16 units do 40 to
  100 times slower. On CPUs it is made float32, and the row says so, unless `--as_shipped`.
* Memory is that of resident pages on CPUs (Linux only), a fragmented heap counts, and that of
  allocations on CUDA devices.
"""

import argparse
import copy
import ctypes
import gc
import platform
import re
import sys
import time
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_normopt import PRESETS, Layout, NormOpt, Spectral, classify, create_normopt_optimizer
from hf_normopt.cli.cost import predict, told
from hf_normopt.optim.rules import policy_key
from hf_normopt.tables import format_table

SETTINGS = {"lr": 1e-3, "weight_decay": 0.01}
SAMPLED = 12  # matrices whose efficiency is measured: an SVD in float64 takes long
LENGTH = 128  # tokens of a sequence


class Matrices(nn.Module):
    """Linear layers, and no forward."""

    def __init__(self, shapes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in shapes)


class Adapter(nn.Module):
    """What LoRA holds of one layer: B A is stepped as one operator, each factor by others."""

    def __init__(self, rank, width):
        super().__init__()
        self.lora_alpha = rank
        self.scaling = 1.0
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = nn.Linear(rank, width, bias=False)


def adapters(rank, width, count):
    return nn.ModuleList(Adapter(rank, width) for _ in range(count))


def minilm():
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    return BertModel(BertConfig(**sizes, num_attention_heads=12), add_pooling_layer=False)


def llama():
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, vocab_size=32000))


def llama_1b():
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=128256))


def llama_7b():
    """Four of 32 layers; with a vocabulary that weighs as little as beside all of them."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, vocab_size=4096))


MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=768, n_layer=4, n_head=12)),
    "minilm": minilm,
    "llama-60m": llama,
    "lora-r16": partial(adapters, 16, 1024, 96),
    "small": lambda: Matrices([(64, 64)] * 400),
}
DEFAULT_MODELS = ",".join(MODELS)
ON_GPUS = {
    "gpt2-124m": lambda: GPT2LMHeadModel(GPT2Config()),
    "llama-1b": llama_1b,
    "llama-7b": llama_7b,
    "lora-7b": partial(adapters, 16, 4096, 128),
}
MODELS |= ON_GPUS
DEFAULTS = {  # by device: models, against, tokens
    "cpu": (DEFAULT_MODELS, "adamw,torch-muon", "1024"),
    "cuda": (
        ",".join(ON_GPUS),
        "torch-muon,adamw,pytorch-optimizer,gram-newton-schulz,dion,normopt:float32",
        "8192,65536,524288",
    ),
}
PACKAGES = {"pytorch-optimizer": "pytorch_optimizer", "gram-newton-schulz": "gram_newton_schulz"}
PACKAGES["dion"] = "dion"


# Each returns optimizers that step together, and the patch that makes their iteration float32.
def normopt(model, matrices, rest, **options):
    return [create_normopt_optimizer(model, **options, **SETTINGS)], None


def adamw(model, matrices, rest):
    return [torch.optim.AdamW([*matrices, *rest], fused=True, **SETTINGS)], None


def torch_muon(model, matrices, rest):
    optimizers = [torch.optim.Muon(matrices, **SETTINGS)]
    if rest:
        optimizers.append(torch.optim.AdamW(rest, fused=True, **SETTINGS))
    # The iteration works in place on the copy that `grad.bfloat16()` makes; nothing else calls it.
    return optimizers, patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone)


def pytorch_optimizer(model, matrices, rest):
    from pytorch_optimizer import Muon
    from pytorch_optimizer.optimizer.muon import base

    groups = [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]
    function = "zero_power_via_newton_schulz_5"
    in_float32 = partial(getattr(base, function), dtype=torch.float32)
    optimizer = Muon([{**group, **SETTINGS} for group in groups if group["params"]])
    return [optimizer], patch.object(base, function, in_float32)


def gram_newton_schulz(model, matrices, rest):
    from gram_newton_schulz import Muon

    optimizers = [Muon(matrices, ns_use_kernels=has_kernels(matrices), **SETTINGS)]
    if rest:
        optimizers.append(torch.optim.AdamW(rest, fused=True, **SETTINGS))
    return optimizers, None


def has_kernels(matrices):
    return matrices[0].is_cuda and torch.cuda.get_device_capability()[0] >= 9


def dion(model, matrices, rest):
    from dion import Muon

    groups = [{"params": matrices}, {"params": rest, "algorithm": "adamw"}]
    return [Muon([group for group in groups if group["params"]], **SETTINGS)], None


OPTIMIZERS = {"adamw": adamw, "torch-muon": torch_muon, "pytorch-optimizer": pytorch_optimizer}
OPTIMIZERS |= {"gram-newton-schulz": gram_newton_schulz, "dion": dion, "normopt": normopt}
OPTIMIZERS["normopt:float32"] = partial(normopt, norm_linear="rms->rms(float32)")
OPTIMIZERS |= {f"normopt:{preset}": partial(normopt, preset=preset) for preset in PRESETS}


class Competitor:
    """An optimizer with its own copy of the model.

    Its weights are 0, so that the first step is exact, but for the factors of adapters: the step of
    one depends on the other.
    """

    def __init__(self, name, model, spectral, as_shipped):
        model = copy.deepcopy(model)
        self.params = dict(model.named_parameters())
        self.has_adapters = any(isinstance(module, Adapter) for module in model.modules())
        for p in () if self.has_adapters else self.params.values():
            nn.init.zeros_(p)
        matrices = [self.params[key] for key in spectral]
        rest = [p for key, p in self.params.items() if key not in spectral]
        self.optimizers, in_float32 = OPTIMIZERS[name](model, matrices, rest)
        is_patched = in_float32 is not None and not as_shipped
        self.precision = in_float32 if is_patched else nullcontext()
        self.label = f"{name} (iteration in float32)" if is_patched else name
        reads_parts = isinstance(self.optimizers[0], NormOpt)
        self.layouts = spectral if reads_parts else dict.fromkeys(spectral, Layout("out in"))

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def measured(self, measure, gradients):
        """What `measure` tells of one step, on fresh gradients: some optimizers change them."""
        for name, p in self.params.items():
            p.grad = gradients[name].clone()
        with self.precision:
            result = measure(self.step)
        for p in self.params.values():
            p.grad = None
        return result

    def state_bytes(self):
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return sum(t.nbytes for state in states for t in state.values() if torch.is_tensor(t))

    def efficiency(self, gradients):
        """The least of some matrices after the first step, when each is minus its step."""
        if self.has_adapters:
            return float("nan")
        names = list(self.layouts)
        count = min(SAMPLED, len(names))
        efficiencies = []
        for name in {names[i * (len(names) - 1) // max(1, count - 1)] for i in range(count)}:
            read = self.layouts[name].to_operators
            for g, w in zip(read(gradients[name]), read(self.params[name].data), strict=True):
                g, d = g.double(), -w.double()
                bound = torch.linalg.matrix_norm(g, "nuc") * torch.linalg.matrix_norm(d, 2)
                efficiencies.append(((g * d).sum((-2, -1)) / bound).flatten())
        return torch.cat(efficiencies).min().item()


def milliseconds(call, device):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return 1e3 * (time.perf_counter() - start)


def transient_bytes(call, device):
    """Peak memory during a call above that before it; NaN where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        call()
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # else freed pages would be taken again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, see man proc
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def resident_bytes(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def forward_and_backward(model, ids):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
        if isinstance(model, BertModel):
            loss = model(input_ids=ids).last_hidden_state.square().mean()
        else:
            loss = model(input_ids=ids, labels=ids).loss
    loss.backward()


def spectral_layouts(model):
    """The matrices to which NormOpt gives a spectral norm, and how it reads them."""
    optimizer = create_normopt_optimizer(model, **SETTINGS)
    return {
        name: Layout(layout)
        for group in optimizer.param_groups
        if isinstance(optimizer.rule_of(group).norm, Spectral)
        for name, layout in zip(group["param_names"], group["layouts"], strict=True)
    }


class Results:
    """What was measured of each optimizer, by its label."""

    def __init__(self):
        self.times, self.state, self.transient, self.efficiency = {}, {}, {}, {}
        self.failed = {}


def measure(names, model, spectral, gradients, args, results):
    """Two steps of each optimizer, which are the warm-up too; then rounds of one step of each."""
    clock = partial(milliseconds, device=args.device)
    memory = partial(transient_bytes, device=args.device)
    competitors = []
    for name in names:
        try:
            each = Competitor(name, model, spectral, args.as_shipped or args.device == "cuda")
            each.measured(clock, gradients)
            results.efficiency[each.label] = each.efficiency(gradients)
            results.transient[each.label] = each.measured(memory, gradients)
        except Exception as error:  # a package that is missing or of another version, or no memory
            results.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        results.state[each.label] = each.state_bytes()
        results.times[each.label] = []
        competitors.append(each)
    for i in range(args.rounds):
        if i and time.perf_counter() > args.end:
            break
        for each in competitors:
            results.times[each.label].append(each.measured(clock, gradients))


def training_times(model, args):
    """Milliseconds of forward and backward pass, by the number of tokens."""
    if not isinstance(model, PreTrainedModel):
        return {}
    first = args.tokens[0]
    length = min(2048 if args.device == "cuda" else LENGTH, first)
    length = min(length, model.config.max_position_embeddings)
    ids = torch.randint(model.config.vocab_size, (max(1, first // length), length))
    train = partial(forward_and_backward, model, ids.to(args.device))
    train()
    found = median(milliseconds(train, args.device) for _ in range(min(3, args.rounds)))
    model.zero_grad()
    return {tokens: found * tokens / first for tokens in args.tokens}


def benchmark(name, args):
    """Print the table of a model; return the ratio of each optimizer to the baseline."""
    torch.manual_seed(0)
    model = MODELS[name]().to(args.device)
    spectral = spectral_layouts(model)
    gradients = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    training = training_times(model, args)
    names = list(dict.fromkeys([*args.against, "normopt"]))
    results = Results()
    # On a GPU one after the other: times hardly vary, and memory is short.
    for together in [[each] for each in names] if args.device == "cuda" else [names]:
        measure(together, model, spectral, gradients, args, results)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()

    parameters = sum(g.numel() for g in gradients.values())
    matrices = sum(gradients[key].numel() for key in spectral)
    print(f"\n{name}: {parameters:,} parameters, {matrices:,} in {len(spectral)} spectral matrices")
    for tokens, duration in training.items():
        print(f"forward and backward of {tokens:,} tokens: {duration:.1f} ms")
    ratios = print_results(results, training, parameters)
    if args.device == "cuda":
        print_prediction(model, results, args)
    return ratios


def print_results(results, training, parameters):
    """The table; return the ratios of the steps' times to those of the first."""
    labels = list(results.times)
    steps = [median(times) for times in results.times.values()]
    first = next(iter(results.times.values()), [])
    ratios = [
        median(time / other for time, other in zip(times, first, strict=False))
        for times in results.times.values()
    ]
    columns = {
        "optimizer": labels,
        "step, ms": [f"{step:.1f}" for step in steps],
        f"times {labels[0] if labels else ''}": [f"{ratio:.2f}" for ratio in ratios],
        "state bytes/parameter": [f"{results.state[key] / parameters:.1f}" for key in labels],
        "transient MiB": [f"{results.transient[key] / 2**20:.1f}" for key in labels],
        "efficiency": [f"{results.efficiency[key]:.3f}" for key in labels],
    }
    for tokens, duration in training.items():
        shares = [f"{step / (step + duration):.1%}" for step in steps]
        columns[f"share at {tokens:,}" if len(training) > 1 else "share of training"] = shares
    print(format_table(list(columns), list(zip(*columns.values(), strict=True))))
    for name, reason in results.failed.items():
        print(f"{name}: not measured: {reason}")
    sys.stdout.flush()
    return dict(zip(labels, ratios, strict=True))


def print_prediction(model, results, args):
    """What `hf-normopt inspect --cost` says, beside the measurement."""
    policy = PRESETS["normopt"].policy
    specs = classify(model)
    rules = [policy[policy_key(policy, spec.role, spec.kind)] for spec in specs]
    found = predict(specs, rules, args.tokens[0], args.device)
    if found is not None and "normopt" in results.times:
        ratio = 1e3 * found.step / median(results.times["normopt"])
        print(f"{told(found, torch.cuda.get_device_name())} Predicted over measured: {ratio:.2f}.")


def draw(ratios, baseline, path):
    """Bars from 1 to each ratio, grouped by model."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for row in ratios.values() for label in row))
    width = 0.8 / max(1, len(labels))
    figure = Figure(figsize=(3 + 1.8 * len(ratios), 4), layout="constrained")
    axes = figure.subplots()
    for i, label in enumerate(labels):
        places = [group + width * (i - (len(labels) - 1) / 2) for group in range(len(ratios))]
        values = [row.get(label, 1.0) for row in ratios.values()]
        bars = axes.bar(places, [value - 1 for value in values], width, 1, label=label)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=7)
    axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(ratios)), list(ratios))
    axes.set_ylabel(f"time of a step, times {baseline}")
    figure.legend(loc="outside right upper", frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def hardware(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, threads: {torch.get_num_threads()}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--against", help=f"of {', '.join(OPTIMIZERS)}; baseline first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", help="of a training step, for example 8192,65536")
    parser.add_argument("--minutes", type=float, default=9, help="then no further round begins")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=list(DEFAULTS), default="cpu")
    parser.add_argument("--as_shipped", action="store_true", help="Muon in bfloat16 on CPUs too")
    parser.add_argument("--plot", default="outputs/benchmark.png", help="path of the picture")
    args = parser.parse_args()
    models, against, tokens = DEFAULTS[args.device]
    if args.against is None:
        known = [name for name in against.split(",") if find_spec(PACKAGES.get(name, "torch"))]
        args.against = ",".join(known)
    args.models = args.models or models
    args.tokens = [int(number) for number in (args.tokens or tokens).split(",")]
    args.end = time.perf_counter() + 60 * args.minutes if args.device == "cuda" else float("inf")
    for option, known in (("models", MODELS), ("against", OPTIMIZERS)):
        names = getattr(args, option).split(",")
        if unknown := [name for name in names if name not in known]:
            parser.error(f"--{option}: found {unknown}, expected some of {', '.join(known)}")
        setattr(args, option, names)
    torch.set_num_threads(args.threads)
    print(f"{hardware(args.device)}; torch {torch.__version__}; rounds: {args.rounds}")
    draw({name: benchmark(name, args) for name in args.models}, args.against[0], args.plot)


if __name__ == "__main__":
    main()
