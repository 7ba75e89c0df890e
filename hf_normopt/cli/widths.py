"""One architecture at several widths and depths, from its config alone: `Family`.

A width stands for a factor: everything in the config that is a width (hidden and intermediate
sizes, ranks) or a number of heads is multiplied by it, so that a head keeps its size. All else
stays; large vocabularies and inputs are the same small ones at every width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn

from ..roles.skeletons import skeleton

# The names that configs of transformers have for these, with any prefix.
_WIDTH = re.compile(
    r"(hidden_sizes?|intermediate_size|embedding_size|ffn_hidden_size|pooler_output_size|"
    r"classifier_proj_size|lora_rank|d_model|d_ff|d_inner|n_embd|n_inner|ffn_dim|embed_dims?|"
    r"emb_dim|hidden_dim|inner_dim|mlp_dim|projection_dim|proj_dim|codevector_dim|conv_dim|"
    r"lru_width|time_step_rank)$|^(dim|num_filters)$"
)
_HEADS = re.compile(r"(attention_heads|num_heads|n_heads?|num_value_heads)$")
_SOME_HEADS = re.compile(r"(key_value_heads|n_head_kv|key_heads|embedding_groups|^n_groups)$|loss")
_HEAD_SIZE = re.compile(r"(head_dim|d_kv|kv_channels|head_size)$")
_DEPTH = re.compile(r"(num_hidden_layers|n_layers?|encoder_layers|decoder_layers)$|^num_layers$")
_OF_STAGES = ("stage_names", "out_features", "out_indices")  # a config makes them of its depth
_BASE = ("d_model", "n_embd", "dim", "embed_dim", "emb_dim", "hidden_size", "hidden_sizes")

_LEAST = 64  # of the widest part of the narrowest model: below, slopes are not yet asymptotic
_WIDEST_HEAD = 128
_VOCABULARY = 1024
_PATCHES = 4  # on a side of an image, of models with one size of patches
_SOUND = 32


@dataclass(frozen=True)
class Family:
    """A class of transformers with a config, to be built at any width and depth.

    Args:
        model_class: a class of models.
        config: its config.
    """

    model_class: type[nn.Module]
    config: Any

    @cached_property
    def base(self) -> int:
        """The width of the config itself: that of its first stage, if it has several."""
        for config in _parts(self.config.to_dict()):
            for name in _BASE:
                value = config.get(name)
                if isinstance(value, (list, tuple)) and value:
                    value = value[0]
                if isinstance(value, int) and value > 0:
                    return value
        raise ValueError(
            f"The config of {self.model_class.__name__} has no width under a known name: one of "
            f"{', '.join(_BASE)}."
        )

    @cached_property
    def unit(self) -> int:
        """The least width whose heads have the size of the config's; all widths are multiples."""
        parts = list(_parts(self.config.to_dict()))
        heads = [n for part in parts for n in _numbers(part, _HEADS)]
        if not heads:
            return 8
        unit, rest = divmod(self.base, math.gcd(*heads))
        if rest == 0 and unit <= _WIDEST_HEAD:
            return unit
        if any(name for part in parts for name in part if _HEAD_SIZE.search(name)):
            return 64
        if rest:
            raise ValueError(
                f"The heads of {self.model_class.__name__} do not divide its width {self.base}."
            )
        return unit

    def widths(self, count: int = 4) -> list[int]:
        """Widths to compare, each twice the one before."""
        stages = [*_numbers(self.config.to_dict(), re.compile(r"^(hidden_sizes|num_heads)$"))]
        growth = max(1, max(stages) // stages[0]) if stages else 1
        first = self.unit * max(1, math.ceil(_LEAST / growth / self.unit))
        return [first * 2**i for i in range(count)]

    def scaled(self, width: int, depth: int | None = None) -> Any:
        """The config at another width and depth.

        Args:
            width: a multiple of [`unit`].
            depth: layers of each stack; None: as many as the config has.

        Raises:
            ValueError: if a head would not keep its size.
        """
        if width <= 0 or width % self.unit:
            raise ValueError(
                f"Width {width}: the heads of {self.model_class.__name__} keep their size at "
                f"multiples of {self.unit}."
            )
        values = _scaled(self.config.to_dict(), self.base, self.unit, width // self.unit, depth)
        if values.get("loss_type") is None:
            values.pop("loss_type", None)  # None given is told in a warning
        return type(self.config).from_dict(values)

    def build(self, width: int, depth: int | None = None, seed: int = 0) -> nn.Module:
        """The model with the weights that its class begins with, in float32.

        Raises:
            ValueError: if the class cannot be built from the scaled config.
        """
        config = self.scaled(width, depth)
        torch.manual_seed(seed)
        try:
            model = self.model_class(config).float()
        except Exception as error:  # foreign code raises anything
            raise ValueError(
                f"{self.model_class.__name__} cannot be built at width {width}. "
                f"{type(error).__name__}: {error}"
            ) from error
        empty = [name for name, p in model.named_parameters() if not p.numel()]
        if empty:  # a part that is a fraction of the width
            raise ValueError(
                f"{self.model_class.__name__} has nothing in {empty[0]} at width {width}; larger "
                "--widths have."
            )
        return model


def family(name: str, *, trust_remote_code: bool = False) -> Family:
    """The family of a model.

    Args:
        name: a folder with a `config.json`, this file, a model id on the Hub, or a class of
            transformers such as `GPT2LMHeadModel`, which is taken with its default config.
        trust_remote_code: whether to run modelling code that comes with the config.

    Raises:
        OSError, ImportError: see [`skeleton`].
        ValueError: for an adapter, or what [`skeleton`] refuses.
    """
    known: Any = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(known, type) and (config_class := getattr(known, "config_class", None)):
        return Family(known, config_class())
    model = skeleton(name, trust_remote_code=trust_remote_code)
    if hasattr(model, "peft_config"):
        raise ValueError(f"{name} is an adapter; pass the model that it adapts.")
    return Family(type(model), model.config)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config as a dict and those inside it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping) and "model_type" in value:
            yield from _parts(value)


def _numbers(config: Mapping[str, Any], names: re.Pattern[str]) -> Iterator[int]:
    for name, value in config.items():
        if names.search(name) and not _SOME_HEADS.search(name):
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(number, int) and number > 0:
                    yield number


def _scaled(
    config: Mapping[str, Any], base: int, unit: int, times: int, depth: int | None
) -> dict[str, Any]:
    def width(value: int) -> int:
        exact, rest = divmod(value * unit, base)
        return times * (exact if not rest else max(8, 8 * round(value * unit / base / 8)))

    def heads(value: int) -> int:
        return times * max(1, round(value * unit / base))

    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and "model_type" in value:
            values[name] = _scaled(value, base, unit, times, depth)
        elif _HEAD_SIZE.search(name):
            values[name] = value
        elif _HEADS.search(name) or _SOME_HEADS.search(name):
            values[name] = _mapped(heads, value)
        elif _WIDTH.search(name):
            values[name] = _mapped(width, value)
        else:
            values[name] = value
    if not any(isinstance(value, Mapping) and "model_type" in value for value in config.values()):
        _limit_inplace(values)
    return values if depth is None else _at_depth(values, depth)


def _mapped(scale: Any, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_mapped(scale, item) for item in value]
    return scale(value) if isinstance(value, int) and value > 0 else value


def _at_depth(values: dict[str, Any], depth: int) -> dict[str, Any]:
    layers = [value for name, value in values.items() if _DEPTH.search(name)]
    stages = values.get("depths")
    for name in _OF_STAGES:
        values.pop(name, None)
    for name, value in values.items():
        if _DEPTH.search(name) and isinstance(value, int) and not stages:
            values[name] = depth
        elif isinstance(value, (list, tuple)) and len(value) in layers and not stages:
            values[name] = (list(value) * depth)[:depth]  # what each layer is
    if isinstance(stages, (list, tuple)):
        values["depths"] = [min(depth, n) for n in stages]
    return values


def _limit_inplace(values: dict[str, Any]) -> None:
    """Small images, short sounds, few tokens: fewer places than the least width, and less work."""
    image, patch = values.get("image_size"), values.get("patch_size")
    if isinstance(image, int) and isinstance(patch, int) and "depths" not in values:
        values["image_size"] = min(image, _PATCHES * patch)
    if isinstance(positions := values.get("max_source_positions"), int):
        values["max_source_positions"] = min(positions, _SOUND)
    _limit_vocabulary_inplace(values)


def _limit_vocabulary_inplace(values: dict[str, Any]) -> None:
    """Special tokens become the last."""
    size = values.get("vocab_size")
    if not isinstance(size, int) or size <= _VOCABULARY:
        return
    values["vocab_size"] = _VOCABULARY
    special = {
        token
        for name, value in values.items()
        if name.endswith("token_id")
        for token in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(token, int) and token >= _VOCABULARY
    }
    new = {token: _VOCABULARY - 1 - i for i, token in enumerate(sorted(special))}
    for name, value in values.items():
        if name.endswith("token_id"):
            many = isinstance(value, (list, tuple))
            values[name] = [new.get(t, t) for t in value] if many else new.get(value, value)
