"""Roles and layouts of modules in no release: seen when they run, whatever they are called."""

import pytest
import torch

import tests.unseen_domains  # registers its cases
import tests.unseen_fields
import tests.unseen_makes
import tests.unseen_more
import tests.unseen_practice  # noqa: F401
from hf_normopt import classify
from tests.unseen_modules import CASES


def wrong(cls, expected, inputs=None):
    """The parameters that are found to be something else."""
    torch.manual_seed(0)
    found = {s.name: (s.role, f"{s.role} | {s.layout}") for s in classify(cls(), inputs=inputs)}
    choices = {
        name: want if isinstance(want, tuple) else (want,) for name, want in expected.items()
    }
    return {name: found[name] for name, right in choices.items() if not {*right} & {*found[name]}}


@pytest.mark.parametrize(
    ("cls", "expected", "inputs"), CASES, ids=lambda x: getattr(x, "__name__", "")
)
def test_with_inputs(cls, expected, inputs):
    assert wrong(cls, expected, inputs) == {}


def test_without_inputs():
    """They are made from the signature and the modules' sizes."""
    failures = {cls.__name__: bad for cls, expected, _ in CASES if (bad := wrong(cls, expected))}
    assert len(failures) <= 0.15 * len(CASES), failures


def test_inputs_of_another_kind_are_refused():
    cls = CASES[0][0]
    with pytest.raises(TypeError, match="mapping of keyword arguments"):
        classify(cls(), inputs=3)


def test_inputs_by_keyword():
    cls, expected, inputs = next(c for c in CASES if c[0].__name__ == "LossOnly")
    assert wrong(cls, expected, dict(zip(("input_ids", "labels"), inputs, strict=True))) == {}
