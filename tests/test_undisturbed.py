"""Observing a model changes nothing of it: a twin runs in its place."""

import functools
import logging
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from hf_normopt.roles.twin import twin, undisturbed

META = {"device": "meta"}


class Busy(nn.Module):
    """Counts, caches, prints, draws numbers, and refers to itself in many ways."""

    def __init__(self, width=4):
        super().__init__()
        self.table = nn.Embedding(7, width)
        self.mix = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 7)
        self.out.weight = self.table.weight
        self.register_buffer("where", torch.arange(5))
        self.register_buffer("cache", torch.zeros(2))
        self.calls, self.log = 0, []
        self.again = [self.mix]
        self.by_name = {"mix": self.mix.forward}
        self.partial = functools.partial(self.scaled, factor=2.0)
        self.closed = lambda x: self.mix(x)
        self.raw = [self.mix.weight]

    def scaled(self, x, factor):
        return x * factor

    def forward(self, ids):
        self.calls += 1
        self.log.append(len(ids))
        self.where += 1
        self.cache = torch.ones(3, device=self.cache.device)
        self.later = nn.Linear(1, 1, **META)
        print("here")
        warnings.warn("here", stacklevel=1)
        logging.getLogger("transformers").error("here")
        random.random(), np.random.rand(), torch.rand(1)
        x = self.table(ids)
        for f in (self.again[0], self.by_name["mix"], self.partial, self.closed):
            x = f(x)
        return self.out(self.norm((x @ self.raw[0]).flatten(0, 1)))


def state(value, seen):
    """Everything that a module holds, to be compared."""
    if isinstance(value, nn.Module):
        if id(value) in seen:
            return id(value)
        seen.add(id(value))
        return (id(value), {k: state(v, seen) for k, v in value.__dict__.items()})
    if isinstance(value, torch.Tensor):
        return (id(value), value._version, value.detach().clone().tolist(), value.requires_grad)
    if isinstance(value, dict):
        return (id(value), {k: state(v, seen) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return (id(value), [state(v, seen) for v in value])
    return value if isinstance(value, (int, float, str, bool)) else id(value)


def randoms():
    return (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())


def run(model, *args, **kwargs):
    with undisturbed(model) as copy:
        return copy, copy.module(*args, **kwargs)


def test_nothing_is_disturbed(capsys, caplog):
    model = Busy()
    called = []
    model.mix.register_forward_hook(lambda *a: called.append(a))
    model.register_forward_pre_hook(lambda *a: called.append(a))
    before, drawn = state(model, set()), randoms()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        copy, output = run(model, torch.zeros(2, 3, **META, dtype=torch.int64))
    assert output.is_meta
    assert output.shape == (6, 7)
    assert not output.requires_grad
    assert state(model, set()) == before
    assert randoms() == drawn
    assert not called
    assert not warned
    assert not caplog.records
    assert capsys.readouterr() == ("", "")
    assert copy.module.calls == 1
    assert copy.module.log == [2]
    assert sorted(copy.dropped) == ["", "mix"]
    assert logging.root.manager.disable == logging.NOTSET


def test_names_lead_back():
    model = Busy()
    copy = twin(model)
    names = {copy.names[id(p)]: p for p in copy.module.parameters()}
    assert list(names) == [n for n, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        twins = names[name]
        assert twins.is_meta
        assert twins.shape == parameter.shape
        assert twins.stride() == parameter.stride()
        assert twins.dtype == parameter.dtype
    assert copy.module.out.weight is copy.module.table.weight
    assert copy.module.raw[0] is copy.module.mix.weight
    assert copy.module.again[0] is copy.module.mix
    assert copy.paths[id(copy.module.norm)] == "norm"
    # integers steer the code: they keep their values
    assert copy.module.where.tolist() == [0, 1, 2, 3, 4]
    assert copy.module.where is not model.where
    assert copy.module.cache.is_meta


def test_strides_are_kept():
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.zeros(3, 4).T)
    assert twin(layer).module.weight.stride() == (1, 4)


@pytest.mark.parametrize("training", [True, False])
def test_mode(training):
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train(training)
    model[0].eval()
    assert not twin(model).module.training
    assert (model.training, model[0].training) == (training, False)


def made_by(function):
    layer = nn.Linear(4, 4)
    function(layer)
    return layer


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 2),
    ],
)
def test_weights_that_are_computed(wrap):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = made_by(wrap)
    before = state(model, set())
    _, output = run(model, torch.zeros(2, 4, **META))
    assert output.is_meta
    assert state(model, set()) == before


def test_weight_norm_by_hooks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = weight_norm(nn.Linear(4, 4))
    copy, output = run(model, torch.zeros(2, 4, **META))
    assert output.is_meta
    assert copy.dropped == []


def test_accelerate_hooks():
    hooks = pytest.importorskip("accelerate.hooks")
    model = Busy()
    seen = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    for module in list(model.modules()):
        hooks.add_hook_to_module(module, Hook())
    before = state(model, set())
    _, output = run(model, torch.zeros(2, 3, **META, dtype=torch.int64))
    assert output.is_meta
    assert not seen
    assert state(model, set()) == before


def test_forward_replaced_on_the_instance():
    model = Busy()
    old = model.forward
    model.forward = lambda ids: old(ids) + 1
    model.mix.forward = type(model.mix).forward.__get__(model.mix)
    _, output = run(model, torch.zeros(2, 3, **META, dtype=torch.int64))
    assert output.is_meta
    assert model.calls == 0


def test_hooks_of_the_model_itself_are_kept():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.a.register_forward_hook(self.keep)

        def keep(self, module, args, output):
            self.kept = output

        def forward(self, x):
            self.a(x)
            return self.b(self.kept)

    model = Kept()
    copy, output = run(model, torch.zeros(1, 2, **META))
    assert output.is_meta
    assert not hasattr(model, "kept")
    assert copy.dropped == []


def test_wrappers_are_taken_off():
    model = torch.compile(Busy(), backend="eager")
    copy, output = run(model, torch.zeros(2, 3, **META, dtype=torch.int64))
    assert output.is_meta
    assert type(copy.module) is Busy
    assert copy.names[id(copy.module.mix.weight)] == "_orig_mod.mix.weight"
    assert copy.module.calls == 1
    assert model._orig_mod.calls == 0


def test_recurrent_cells_and_scripts():
    _, (output, _) = run(nn.LSTM(3, 4), torch.zeros(5, 1, 3, **META))
    assert output.is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="TorchScript"):
        run(nn.Sequential(scripted), torch.zeros(1, 2, **META))


class Layer(nn.Module):
    def __init__(self, index, width, kind="full"):
        super().__init__()
        self.index, self.kind = index, kind
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.runs = []

    def forward(self, x, scale=1.0):
        self.runs.append(x.shape)
        return x + self.down(self.up(x).relu()) * scale


class Deep(nn.Module):
    def __init__(self, kinds="ffffff"):
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, 4, kind) for i, kind in enumerate(kinds))

    def forward(self, x):
        for i, layer in zip(range(len(self.layers)), self.layers, strict=True):
            assert layer.index == i
            x = layer(x)
        return x


def ran(copy):
    return [len(layer.runs) for layer in copy.module.layers]


def test_of_equal_layers_three_run():
    copy, output = run(Deep(), torch.zeros(2, 4, **META))
    assert output.shape == (2, 4)
    assert ran(copy) == [1, 1, 0, 0, 0, 1]
    assert copy.alike["layers.4.up.weight"] == "layers.1.up.weight"
    assert len(copy.alike) == 3 * 4
    with undisturbed(Deep(), repeated=True) as copy:
        copy.module(torch.zeros(2, 4, **META))
        assert ran(copy) == [1] * 6
        assert not copy.alike


def test_layers_of_another_kind_run():
    copy, _ = run(Deep("ffsfffsffs"), torch.zeros(2, 4, **META))
    assert ran(copy) == [1, 1, 1, 0, 0, 0, 1, 0, 1, 1]


def test_a_layer_that_is_called_otherwise_runs():
    class Shrinking(Deep):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x[1:])
            return x

    copy, _ = run(Shrinking(), torch.zeros(9, 4, **META))
    assert ran(copy) == [1] * 6
