"""Weights for a run from scratch whose outputs do not depend on width: `init_by_fan_in_inplace`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..roles import classify


@torch.no_grad()
def init_by_fan_in_inplace(
    model: nn.Module, overrides: Mapping[str, str] | None = None, *, inputs: Any = None
) -> None:
    """Scale matrices, kernels and heads to a standard deviation of 1/√fan_in.

    For a model that is trained from scratch. transformers begins with one standard deviation for
    all shapes, mostly 0.02, with which outputs grow as √fan_in; so, they are as large as inputs at
    every width. Embeddings, gains and biases stay, and so does what is 0.

    Args:
        model: with the weights that its class begins with.
        overrides: role by regular expression, see [`classify`](hf_normopt.classify).
        inputs: one example of what `forward` takes, see [`classify`](hf_normopt.classify).

    Example:
        >>> model = AutoModelForCausalLM.from_config(config)  # doctest: +SKIP
        >>> init_by_fan_in_inplace(model)  # doctest: +SKIP
    """
    params = dict(model.named_parameters())
    for spec in classify(model, overrides, inputs=inputs):
        if spec.role in ("linear", "conv", "head"):
            param = params[spec.name]
            fan_in = spec.layout.to_operators(param)[0].shape[-1] * spec.layout.taps
            rms = float(torch.linalg.vector_norm(param)) / math.sqrt(param.numel())
            if rms > 0:
                param.mul_(1 / (rms * math.sqrt(fan_in)))
