"""What the arguments of `forward` hold, by their names: one function each, in `MAKERS`.

A `Case` is what these functions see: a model, its config, the arguments made before, and the
choices of one candidate (`VARIANTS`). To support an argument, add one entry to `MAKERS`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Case:
    """A model, what its `forward` takes, and the choices of one candidate."""

    def __init__(self, model: nn.Module, device: str, **choices: Any) -> None:
        self.model = model
        self.config = getattr(model, "config", None)
        self.device = device
        taken = _parameters(model)
        self.parameters = {p.name: p.default is p.empty for p in taken}
        self.by_keyword = {p.name for p in taken if p.kind is p.KEYWORD_ONLY}
        self.choices = choices
        self.length = choices.get("length", 8)
        one = "SequenceClassification" in type(model).__name__ and self.get("pad_token_id") is None
        self.rows = choices.get("rows", 1 if one else 2)
        self.values: dict[str, Any] = {}

    def get(self, *names: str, kind: str = "", default: Any = None) -> Any:
        """The first value that is not None under one of the names in the config.

        Parts of the config whose name contains `kind` come first, other parts last.
        """
        configs = list(_parts(self.config, kind)) if self.config is not None else []
        for name in names:
            for config in configs:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def floats(self, *shape: int) -> Tensor:
        """An empty tensor of this shape."""
        return torch.empty(tuple(int(n) for n in shape), device=self.device)

    def has(self, name: str) -> bool:
        """Whether `forward` takes an argument of this name."""
        return name in self.parameters

    # --------------------------------------------------------------- text

    def ids(self, *shape: int, kind: str = "text") -> Tensor:
        """Token numbers, without special ones but for the end of the text."""
        vocabulary = int(self.get("vocab_size", "n_vocab", "num_embeddings", kind=kind, default=20))
        special = set(_token_numbers(self.config))
        usual = [n for n in range(min(vocabulary, 200)) if n not in special] or [0]
        row = [usual[(i + len(usual) // 2) % len(usual)] for i in range(shape[-1])]
        end = self.get("eos_token_id", kind=kind)
        if isinstance(end, int) and 0 <= end < vocabulary:
            row[-1] = end
            if self.choices.get("separators"):
                row[2] = row[-2] = end
        return torch.tensor(row).expand(shape).clone()

    def shape(self) -> tuple[int, ...]:
        """Rows and length of the token numbers; of a sound's, with its codebooks."""
        books = int(self.get("num_codebooks", "num_channels", kind="decoder", default=1))
        where = None if self.has("pixel_values") else self.choices.get("codebooks")
        if where == "last":
            return (self.rows, self.length, books)
        return (self.rows * books if where == "rows" else self.rows, self.length)

    def token(self, kind: str) -> int | None:
        """The number that stands for a part of an image, video or sound in the text."""
        return self.get(
            f"{kind}_token_id", f"{kind}_token_index", f"{kind}_tok_id", f"{kind}_pad_token_id"
        )

    def tokens(self) -> Tensor:
        """Token numbers with as many places for images and sounds as these have features."""
        if "MultipleChoice" in type(self.model).__name__:
            return self.ids(self.rows, 2, self.length)
        ids = self.ids(*self.shape())
        if ids.ndim > 2:
            return ids
        for kind in ("image", "video", "audio"):
            token = self.token(kind)
            given = any(name in self.values for name in _GIVEN[kind])
            if token is None or not given:
                continue
            count = self.choices.get(f"{kind}_tokens") or self.places(kind)
            places = torch.full((self.rows, count), int(token))
            marks = [
                self.get(
                    f"vision_{edge}_token_id", f"{kind}_{edge}_token_id", f"bo{kind[0]}_token_id"
                )
                for edge in ("start", "end")
            ]
            before, after = (
                torch.full(
                    (self.rows, 1 if isinstance(m, int) else 0), m if isinstance(m, int) else 0
                )
                for m in marks
            )
            ids = torch.cat([ids[:, :2], before, places, after, ids[:, 2:]], 1)
        return ids

    def places(self, kind: str) -> int:
        """How many tokens stand for one image, video or sound: a first guess."""
        if "image_grid_thw" in self.values and kind == "image":
            merge = int(self.get("spatial_merge_size", "merge_size", kind="vision", default=1))
            return int(self.values["image_grid_thw"][0].prod()) // merge**2
        if kind == "image":
            size, patch = self.image_size(), self.patch_size()
            return int(
                self.get(
                    "image_seq_length",
                    "image_seq_len",
                    "mm_tokens_per_image",
                    "num_image_tokens",
                    "num_query_tokens",
                )
                or (size[0] // patch) * (size[1] // patch)
            )
        return 4

    # --------------------------------------------------------------- images

    def image_size(self) -> tuple[int, int]:
        """Height and width, as the config says; few patches if that is large."""
        if count := self.choices.get("patches"):
            return count * self.patch_size(), count * self.patch_size()
        size = self.get("image_size", "img_size", "input_size", kind="vision")
        if isinstance(size, Mapping):
            size = [size["height"], size["width"]] if "height" in size else [*size.values()]
        if isinstance(size, (list, tuple)):
            size = size if len(size) > 1 else (size[0], size[0])
            return int(size[-2]), int(size[-1])
        size = int(size or self.choices.get("side", 64))
        if size > 600 and not self.choices.get("large"):
            size = 8 * self.patch_size()
        return size, size

    def patch_size(self) -> int:
        """Side of a patch."""
        size = self.get("patch_size", "patch_sizes", kind="vision", default=16)
        if isinstance(size, (list, tuple)):
            size = size[-1]
        return int(size) if isinstance(size, int) else 16

    def channels(self) -> int:
        """Channels of an image."""
        return int(
            self.get(
                "num_channels",
                "in_channels",
                "in_chans",
                "image_channels",
                kind="vision",
                default=3,
            )
        )

    def grid(self) -> list[int]:
        """Patches of one image, by time, height and width."""
        merge = int(self.get("spatial_merge_size", "merge_size", kind="vision", default=1))
        side = 2 * merge
        return [1, side, side]

    def patches(self) -> Tensor:
        """Flat patches of all images, as the Qwen-VL families take them."""
        patch, time = (
            self.patch_size(),
            int(self.get("temporal_patch_size", kind="vision", default=1)),
        )
        count = self.rows * math.prod(self.grid())
        return self.floats(count, self.channels() * time * patch * patch)

    def pixel_values(self) -> Tensor:
        """Images, frames or flat patches, as the signature of `forward` tells."""
        height, width = self.image_size()
        if self.has("image_grid_thw") or self.has("grid_thw"):
            return self.patches()
        if self.has("image_grid_hw"):
            side = self.grid()[1]
            return self.floats(self.rows * side * side, self.channels() * self.patch_size() ** 2)
        if self.has("spatial_shapes") and self.has("pixel_attention_mask"):
            patch = self.patch_size()
            return self.floats(self.rows, 16, self.channels() * patch * patch)
        if self.choices.get("frames") or self.get("num_frames", "frames_per_clip"):
            frames = int(self.get("num_frames", "frames_per_clip", default=1))
            return self.floats(self.rows, frames, self.channels(), height, width)
        return self.floats(self.rows, self.channels(), height, width)

    # --------------------------------------------------------------- sound

    def sound(self) -> Tensor:
        """Samples (rows, time), or what a spectrogram is if the config has one.

        A sound lasts as long as its spectrogram, where a case gives it a channel.
        """
        if self.get("num_mel_bins") and self.get("max_length") and self.has("input_values"):
            return self.floats(
                self.rows, int(self.get("max_length")), int(self.get("num_mel_bins"))
            )
        if self.get("audio_channels"):
            return self.floats(self.rows, int(self.get("audio_channels")), 4800)
        if self.choices.get("channel"):
            frames = self.values["input_features"].shape[1] if self.has("input_features") else 64
            return self.floats(self.rows, 1, frames * int(self.get("hop_length", default=320)))
        return self.floats(self.rows, 16_000 if self.choices.get("large") else 4000)

    def spectrogram(self) -> Tensor:
        """Spectrograms, features before time unless the case says otherwise."""
        features = int(
            self.get(
                "num_mel_bins",
                "n_mels",
                "feature_projection_input_dim",
                "input_feat_per_channel",
                "input_dim",
                "feature_size",
                "num_mels",
                kind="audio",
                default=80,
            )
        )
        positions = self.get("max_source_positions", kind="audio")
        frames = 2 * int(positions) if positions and positions <= 3000 else 64
        if self.choices.get("features_last") == "channel":
            return self.floats(
                self.rows, 1, int(self.get("spec_size", kind="audio", default=frames)), features
            )
        if self.choices.get("features_last"):
            return self.floats(self.rows, frames, features)
        return self.floats(self.rows, features, frames)

    # --------------------------------------------------------------- the rest

    def width(self, kind: str = "") -> int:
        """Width of the activations."""
        return int(self.get("hidden_size", "d_model", "n_embd", "dim", kind=kind, default=16))


_GIVEN = {
    "image": ("pixel_values", "pixel_values_images", "image_patches", "images"),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "audio_values", "input_values", "audio_features"),
}


def _boxes(case: Case) -> Tensor:
    return torch.tensor([1, 2, 3, 4]).expand(*case.values["input_ids"].shape, 4).clone()


def _grid(case: Case) -> Tensor:
    return torch.tensor([case.grid()] * case.rows)


def _sizes(case: Case) -> Tensor:
    return torch.tensor([list(case.image_size())] * case.rows)


def _context(case: Case) -> int:
    lags = case.get("lags_sequence", default=[0])
    length = case.get("context_length", "seq_length", "prediction_length", default=32)
    return int(length) + max(lags)


def _series(case: Case, length: int) -> Tensor:
    size = case.get("input_size")
    if size == 1 or (case.get("patch_length") and not case.get("num_input_channels")):
        return case.floats(case.rows, length)
    return case.floats(case.rows, length, size or case.get("num_input_channels", default=1))


def _time_features(case: Case, length: int) -> Tensor:
    return case.floats(case.rows, length, case.get("num_time_features", default=0))


def _horizon(case: Case) -> int:
    return int(case.get("prediction_length", default=4))


def _kinds(case: Case) -> Tensor:
    """Which tokens stand for an image (1), a video (2) or a sound (3)."""
    ids = case.values["input_ids"]
    kinds = torch.zeros_like(ids)
    for number, kind in enumerate(("image", "video", "audio"), 1):
        if (token := case.token(kind)) is not None:
            kinds[ids == token] = number
    return kinds


def _videos(case: Case) -> Tensor | None:
    if case.has("pixel_values"):
        return None
    frames = int(case.get("num_frames", "frames_per_clip", default=2))
    return case.floats(case.rows, frames, case.channels(), *case.image_size())


def _hidden(case: Case) -> Tensor:
    if case.has("grid_thw") or case.has("image_grid_thw"):
        return case.patches()
    return case.floats(case.rows, case.length, case.width())


def _entities(case: Case, *shape: int) -> Tensor:
    return torch.ones(case.rows, 2, *shape, dtype=torch.int64)


# What the arguments of `forward` hold. Those in `ALWAYS` are given, the others if they have no
# default. The order matters: images come before the text that has places for them.
MAKERS: dict[str, Callable[[Case], Any]] = {
    "pixel_values": Case.pixel_values,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "image_grid_hw": lambda c: _grid(c)[:, 1:],
    "spatial_shapes": lambda c: torch.tensor([[4, 4]] * c.rows),
    "pixel_attention_mask": lambda c: torch.ones(c.rows, 16, dtype=torch.int64),
    "pixel_position_ids": lambda c: torch.zeros(c.rows, 16, 2, dtype=torch.int64),
    "image_sizes": _sizes,
    "aspect_ratio_ids": lambda c: torch.ones(c.rows, 1, dtype=torch.int64),
    "aspect_ratio_mask": lambda c: torch.ones(c.rows, 1, 4, dtype=torch.int64),
    "prompt_pixel_values": Case.pixel_values,
    "prompt_masks": Case.pixel_values,
    "pixel_values_videos": _videos,
    "flattened_patches": lambda c: c.floats(
        c.rows, 16, 2 + c.channels() * c.get("patch_size", kind="vision", default=16) ** 2
    ),
    "input_points": lambda c: torch.ones(c.rows, 1, 1, 2),
    "input_features": Case.spectrogram,
    "input_features_mask": lambda c: torch.ones(
        c.rows, max(c.values["input_features"].shape[1:]), dtype=torch.int64
    ),
    "input_values": Case.sound,
    "spectrogram": lambda c: c.floats(
        c.rows, 16, c.get("model_in_dim", "num_mel_bins", default=80)
    ),
    "input_ids": Case.tokens,
    "qformer_input_ids": lambda c: c.ids(c.rows, c.length, kind="qformer"),
    "mm_token_type_ids": _kinds,
    "bbox": _boxes,
    "decoder_input_ids": lambda c: c.ids(*c.shape(), kind="decoder"),
    "decoder_input_values": lambda c: c.floats(c.rows, c.length, c.get("num_mel_bins", default=80)),
    "past_values": lambda c: _series(c, _context(c)),
    "past_time_features": lambda c: _time_features(c, _context(c)),
    "past_observed_mask": lambda c: torch.ones(c.values["past_values"].shape, dtype=torch.bool),
    "past_values_padding": lambda c: torch.zeros(c.values["past_values"].shape, dtype=torch.int64),
    "freq": lambda c: torch.zeros(c.rows, 1, dtype=torch.int64),
    "future_values": lambda c: _series(c, _horizon(c)),
    "future_time_features": lambda c: _time_features(c, _horizon(c)),
    "attention_mask": lambda c: torch.ones(c.rows, c.length, dtype=torch.int64),
    "encoder_hidden_states": lambda c: c.floats(c.rows, c.length, c.width()),
    "hidden_states": _hidden,
    "inputs_embeds": lambda c: c.floats(c.rows, c.length, c.width()),
    "query_embeds": lambda c: c.floats(c.rows, c.length, c.width()),
    "inputs": lambda c: c.floats(c.rows, c.length, c.get("d_model", default=16)),
    "latents": lambda c: c.floats(c.rows, c.width(), c.length),
    "states": lambda c: c.floats(c.rows, 4, c.get("state_dim", default=4)),
    "actions": lambda c: c.floats(c.rows, 4, c.get("act_dim", default=4)),
    "rewards": lambda c: c.floats(c.rows, 4, 1),
    "returns_to_go": lambda c: c.floats(c.rows, 4, 1),
    "timesteps": lambda c: torch.arange(4).expand(c.rows, 4).clone(),
    "visual_embeds": lambda c: c.floats(c.rows, 4, c.get("visual_embedding_dim", default=16)),
    "visual_feats": lambda c: c.floats(c.rows, 4, c.get("visual_feat_dim", default=16)),
    "visual_pos": lambda c: c.floats(c.rows, 4, c.get("visual_pos_dim", default=4)),
    "entity_ids": _entities,
    "entity_start_positions": lambda c: torch.zeros(c.rows, 2, dtype=torch.int64),
    "entity_end_positions": lambda c: torch.ones(c.rows, 2, dtype=torch.int64),
    "entity_position_ids": lambda c: _entities(c, 4),
    "task_inputs": lambda c: c.ids(c.rows, int(c.get("task_seq_len", default=c.length))),
    "codebook_idx": lambda c: 1,
    "codes": lambda c: torch.zeros(
        c.rows, c.get("num_quantizers", "num_codebooks", default=1), c.length, dtype=torch.int64
    ),
    "use_cache": lambda c: False,
}
ALWAYS = set(MAKERS) - {
    "attention_mask",
    "codebook_idx",
    "codes",
    "encoder_hidden_states",
    "freq",
    "hidden_states",
    "input_features_mask",
    "inputs_embeds",
    "latents",
    "past_values_padding",
    "pixel_position_ids",
    "query_embeds",
}


def arguments(case: Case) -> dict[str, Any] | None:
    """Keyword arguments for `forward`; None if no argument has a known name."""
    for name, make in MAKERS.items():
        if case.has(name) and (name in ALWAYS or case.parameters[name]):
            value = make(case)
            if value is not None:
                case.values[name] = value
    if case.has("encoder_hidden_states") and case.get("add_cross_attention"):
        case.values.setdefault("encoder_hidden_states", MAKERS["encoder_hidden_states"](case))
    return case.values or None


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The arguments of `forward`, without those that gather any number of them."""
    try:
        signature = inspect.signature(type(model).forward)
    except (AttributeError, TypeError, ValueError):  # TorchScript
        return []
    found = list(signature.parameters.values())[1:]  # the first is the module
    return [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _parts(config: Any, kind: str = "") -> Iterator[Any]:
    """The config and those inside it."""
    parts = {
        key: value
        for key, value in vars(config).items()
        if hasattr(value, "to_dict") and hasattr(value, "model_type")
    }
    if kind:
        for key, part in parts.items():
            if kind in key:
                yield from _parts(part, kind)
    yield config
    for key, part in parts.items():
        if not kind or kind not in key:
            yield from _parts(part, kind)


def _token_numbers(config: Any) -> Iterator[int]:
    for part in _parts(config):
        for key, value in vars(part).items():
            if key.endswith(("token_id", "token_index", "_tok_id")):
                for number in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(number, int):
                        yield number
