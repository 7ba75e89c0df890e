"""Every model class that transformers exports and that builds from its default config.

`every/heads.txt` says which matrices of each class are heads. It was compared with labels made from
the modelling sources alone, without `classify`; where they differed, the source decided.
`python -m tests.test_every_class` prints it anew, to be compared before it is kept.

The test takes one class of every fourth modelling file; `EVERY_CLASS=1` takes all classes.
"""

import gc
import inspect
import os
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as tf
from packaging import version
from torch import nn

from hf_normopt import classify
from hf_normopt.roles import ROLES
from hf_normopt.tables import fold_names

TABLE = Path(__file__).parent / "every" / "heads.txt"
# Task classes whose output no matrix makes last: embeddings to compare, products of activations.
WITHOUT_HEAD = {
    "BrosSpadeELForTokenClassification",
    "ColModernVBertForRetrieval",
    "ColPaliForRetrieval",
    "ColQwen2ForRetrieval",
    "EfficientLoFTRForKeypointMatching",
    "NeoMMEForRetrieval",
    "UniSpeechForPreTraining",
    "UniSpeechSatForPreTraining",
    "VisualBertForRegionToPhraseAlignment",
    "Wav2Vec2ConformerForPreTraining",
    "Wav2Vec2ForPreTraining",
}


def classes():
    """The names and classes of all models that transformers exports."""
    for name in sorted(dir(tf)):
        if name.startswith("convert_"):
            continue  # scripts, which set transformers' log level
        try:
            cls = getattr(tf, name)
        except ImportError:
            continue
        if inspect.isclass(cls) and issubclass(cls, tf.PreTrainedModel) and cls.config_class:
            yield name, cls


def representatives():
    """One class of every fourth modelling file."""
    found = {}
    for name, cls in classes():
        found.setdefault(cls.__module__, []).append((name, cls))
    for i, module in enumerate(sorted(found)):
        if i % 4 == 0:
            yield found[module][i // 4 % len(found[module])]


def built(chosen):
    """Models on the meta device, one after the other."""
    for name, cls in chosen:
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")
                model = cls(cls.config_class())
        except Exception:  # a default config that builds no model raises anything
            continue
        if any(True for _ in model.parameters()):
            yield name, model


@cache
def inverts(layout, shape):
    stored = torch.empty(shape, device="meta")
    return layout.from_operators(layout.to_operators(stored), shape).shape == stored.shape


def complaints(name, model, specs):
    """What is wrong with a model's table."""
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    if [spec.name for spec in specs] != trainable:
        yield f"{name}: rows {len(specs)}, trainable parameters {len(trainable)}"
    modules = dict(model.named_modules())
    for spec in specs:
        if spec.role not in ROLES or not spec.reason:
            yield f"{name}: {spec}"
        if spec.role in ("linear", "conv") and len(spec.shape) < 2:
            yield f"{name}: a vector is no matrix: {spec}"
        if not inverts(spec.layout, spec.shape):
            yield f"{name}: layout does not invert: {spec}"
        path, _, leaf = spec.name.rpartition(".")
        owner = modules[path]
        if isinstance(owner, nn.Embedding) and spec.role != "embedding" and len(spec.shape) == 2:
            yield f"{name}: a table is an embedding: {spec}"
        if isinstance(owner, nn.Linear) and leaf == "weight" and spec.role in ("linear", "head"):
            operators = spec.layout.to_operators(torch.empty(spec.shape, device="meta"))
            fans = [(o.shape[:-2].numel() * o.shape[-2], o.shape[-1]) for o in operators]
            outs, ins = sum(out for out, _ in fans), {into for _, into in fans}
            # Inkling's sizes are tensors
            if outs != int(owner.out_features) or ins != {int(owner.in_features)}:
                yield f"{name}: {owner} is read as {fans}: {spec}"
    heads = {s.name for s in specs if s.role == "head" or "the head" in s.reason}
    if re.search(r"For[A-Z]|LMHead", name) and not heads and name not in WITHOUT_HEAD:
        yield f"{name} has no head"
    if heads and name in WITHOUT_HEAD:
        yield f"{name} has a head: {heads}"


def heads_of(specs):
    names = [s.name.removesuffix(".weight") for s in specs if s.role == "head"]
    return sorted(label for label, _ in fold_names(names))


@pytest.mark.slow
def test_every_class():
    """Every parameter has one row that fits, and the heads are those that readers found."""
    table = dict(map(split, TABLE.read_text().splitlines()))
    chosen = list(classes() if "EVERY_CLASS" in os.environ else representatives())
    found, heads = [], {}
    for name, model in built(chosen):
        specs = classify(model)
        found += complaints(name, model, specs)
        heads.update([split(f"{name}: {'; '.join(heads_of(specs))}")])
    # All of transformers stays imported. Later collections, of which each Trainer makes one, need
    # not walk through it.
    gc.collect()
    gc.freeze()
    assert len(heads) > (1500 if "EVERY_CLASS" in os.environ else 80)
    others = {}
    if version.parse(tf.__version__) >= version.parse("5.23"):  # the table names modules as it does
        assert heads.keys() <= table.keys()
        others = {name: text for name, text in heads.items() if text != table[name]}
    assert (found, others) == ([], {})


def split(line):
    """A class and its heads; how many layers have one is the config's business."""
    name, _, heads = line.partition(":")
    return name, re.sub(r" [(]x\d+[)]", "", heads).strip()


if __name__ == "__main__":
    for name, model in built(classes()):
        print(f"{name}: {'; '.join(heads_of(classify(model)))}".strip())
