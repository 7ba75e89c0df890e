"""What a step costs and how good it is: NormOpt next to AdamW and to other packages' Muon.

    python recipes/benchmark.py --against adamw,torch-muon,pytorch-optimizer

prints the machine, and for each model a table: the median time of a step, the median of its ratio
to the first of `--against` in the same round, the optimizer's state, the peak memory of a step
above that before it, the least efficiency of a step as a spectral oracle, and the step's share of a
training step. At the end it draws the ratios into `outputs/benchmark.png`. About ten minutes on an
idle CPU core; on a busy machine the times mean nothing. On a Hopper or Blackwell GPU:

    python recipes/benchmark.py --device cuda --models llama-1b --tokens 65536 \
        --against torch-muon,pytorch-optimizer,gram-newton-schulz,normopt:kernels

Models have random weights, gradients are Gaussian and the same for all, weight decay is 0.01. Other
packages' Muon gets the matrices that NormOpt gives a spectral norm, and AdamW gets the rest.

* The efficiency is ⟨G, D⟩ / (‖D‖ ‖G‖†), spectral and nuclear norm, of the first step D against the
  gradient G, for up to 12 matrices; the exact oracle has 1. NormOpt reads a fused matrix as its
  parts, the others as one. AdamW does not aim at it.
* Both packages hard-code bfloat16 for Muon's iteration, which CPUs without bfloat16 units do 40 to
  100 times slower. On CPUs it is made float32, and the row says so, unless `--as_shipped`.
* Memory is that of resident pages on CPUs (Linux only), a fragmented heap counts, and that of
  allocations on CUDA devices.
"""

import argparse
import copy
import ctypes
import platform
import re
import sys
import time
from contextlib import nullcontext
from functools import partial
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

from hf_normopt import PRESETS, Layout, NormOpt, Spectral, create_normopt_optimizer
from hf_normopt.tables import format_table

SETTINGS = {"lr": 1e-3, "weight_decay": 0.01}
SAMPLED = 12  # matrices whose efficiency is measured: an SVD in float64 takes long
LENGTH = 128  # tokens of a sequence


class Matrices(nn.Module):
    """Linear layers, and no forward."""

    def __init__(self, shapes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in shapes)


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


MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=768, n_layer=4, n_head=12)),
    "minilm": minilm,
    "llama-60m": llama,
    "lora-r16": lambda: Matrices([(1024, 16), (16, 1024)] * 96),
    "small": lambda: Matrices([(64, 64)] * 400),
}
DEFAULT_MODELS = ",".join(MODELS)
MODELS["llama-1b"] = llama_1b  # for GPUs


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
    try:
        from pytorch_optimizer import Muon
        from pytorch_optimizer.optimizer.muon import base
    except ImportError as error:
        sys.exit(f"{error}. For 4.1 or later: pip install pytorch-optimizer")
    groups = [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]
    function = "zero_power_via_newton_schulz_5"
    in_float32 = partial(getattr(base, function), dtype=torch.float32)
    optimizer = Muon([{**group, **SETTINGS} for group in groups if group["params"]])
    return [optimizer], patch.object(base, function, in_float32)


def gram_newton_schulz(model, matrices, rest):
    try:
        from gram_newton_schulz import Muon
    except ImportError as error:
        sys.exit(f'{error}. On Hopper and Blackwell GPUs: pip install "hf_normopt[kernels]"')
    optimizers = [Muon(matrices, ns_use_kernels=matrices[0].is_cuda, **SETTINGS)]
    if rest:
        optimizers.append(torch.optim.AdamW(rest, fused=True, **SETTINGS))
    return optimizers, None


OPTIMIZERS = {"adamw": adamw, "torch-muon": torch_muon, "pytorch-optimizer": pytorch_optimizer}
OPTIMIZERS |= {"gram-newton-schulz": gram_newton_schulz, "normopt": normopt}
OPTIMIZERS["normopt:kernels"] = partial(normopt, norm_linear="rms->rms(gram_newton_schulz)")
OPTIMIZERS |= {f"normopt:{preset}": partial(normopt, preset=preset) for preset in PRESETS}


class Competitor:
    """An optimizer with its own copy of the model, whose weights are 0: the first step is exact."""

    def __init__(self, name, model, spectral, as_shipped):
        model = copy.deepcopy(model)
        self.params = dict(model.named_parameters())
        for p in self.params.values():
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
    if isinstance(model, BertModel):
        model(input_ids=ids).last_hidden_state.square().mean().backward()
    else:
        model(input_ids=ids, labels=ids).loss.backward()


def spectral_layouts(model):
    """The matrices to which NormOpt gives a spectral norm, and how it reads them."""
    optimizer = create_normopt_optimizer(model, **SETTINGS)
    return {
        name: Layout(layout)
        for group in optimizer.param_groups
        if isinstance(optimizer.rule_of(group).norm, Spectral)
        for name, layout in zip(group["param_names"], group["layouts"], strict=True)
    }


def benchmark(name, args):
    """Print the table of a model; return the ratio of each optimizer to the baseline."""
    torch.manual_seed(0)
    model = MODELS[name]().to(args.device)
    spectral = spectral_layouts(model)
    gradients = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    as_shipped = args.as_shipped or args.device == "cuda"
    names = dict.fromkeys([*args.against, "normopt"])
    competitors = [Competitor(each, model, spectral, as_shipped) for each in names]
    clock = partial(milliseconds, device=args.device)
    memory = partial(transient_bytes, device=args.device)
    has_forward = isinstance(model, PreTrainedModel)
    train = lambda: None
    if has_forward:
        shape = (max(1, args.tokens // LENGTH), min(LENGTH, args.tokens))
        ids = torch.randint(model.config.vocab_size, shape, device=args.device)
        train = partial(forward_and_backward, model, ids)

    efficiencies, transients = [], []
    for each in competitors:  # two steps of each, which are the warm-up too
        each.measured(clock, gradients)
        efficiencies.append(each.efficiency(gradients))
        transients.append(each.measured(memory, gradients))
    train()
    rounds = [
        (clock(train), *(each.measured(clock, gradients) for each in competitors))
        for _ in range(args.rounds)
    ]

    training, *steps = map(median, zip(*rounds, strict=True))
    ratios = [median(times[i] / times[1] for times in rounds) for i in range(1, len(rounds[0]))]
    parameters = sum(g.numel() for g in gradients.values())
    columns = {
        "optimizer": [each.label for each in competitors],
        "step, ms": [f"{step:.1f}" for step in steps],
        f"times {args.against[0]}": [f"{ratio:.2f}" for ratio in ratios],
        "state bytes/parameter": [f"{each.state_bytes() / parameters:.1f}" for each in competitors],
        "transient MiB": [f"{transient / 2**20:.1f}" for transient in transients],
        "efficiency": [f"{efficiency:.3f}" for efficiency in efficiencies],
    }
    matrices = sum(gradients[key].numel() for key in spectral)
    print(f"\n{name}: {parameters:,} parameters, {matrices:,} in {len(spectral)} spectral matrices")
    if has_forward:
        print(f"forward and backward of {ids.numel()} tokens: {training:.1f} ms")
        columns["share of training"] = [f"{step / (step + training):.1%}" for step in steps]
    print(format_table(list(columns), list(zip(*columns.values(), strict=True))), flush=True)
    return dict(zip(columns["optimizer"], ratios, strict=True))


def draw(ratios, baseline, path):
    """Bars from 1 to each ratio, grouped by model."""
    from matplotlib.figure import Figure

    labels = list(next(iter(ratios.values())))
    width = 0.8 / len(labels)
    figure = Figure(figsize=(3 + 1.8 * len(ratios), 4), layout="constrained")
    axes = figure.subplots()
    for i, label in enumerate(labels):
        places = [group + width * (i - (len(labels) - 1) / 2) for group in range(len(ratios))]
        values = [row[label] for row in ratios.values()]
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
    parser.add_argument("--models", default=DEFAULT_MODELS, help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--against", default="adamw,torch-muon", help=f"of {', '.join(OPTIMIZERS)}; baseline first"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a training step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--as_shipped", action="store_true", help="Muon in bfloat16 on CPUs too")
    parser.add_argument("--plot", default="outputs/benchmark.png", help="path of the picture")
    args = parser.parse_args()
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
