"""Models without weights: built on the meta device from a config alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

# The class that an adapter was made for, by peft's TaskType; of a base model without a head
# the config says nothing about it.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def skeleton(name: str, *, trust_remote_code: bool = False) -> nn.Module:
    """A model on the meta device, from its config alone.

    Args:
        name: a folder with `config.json` or `adapter_config.json`, one of these files, or a model
            id on the Hub.
        trust_remote_code: whether to run modelling code that comes with the config.

    Raises:
        OSError: if there is no such config.
        ValueError: if transformers has no class for it, or the class cannot be built from it.
        ImportError: if the model needs a library that is not installed.
    """
    local = Path(name).expanduser()
    if local.exists():
        name = str(local.parent if local.name in ("adapter_config.json", "config.json") else local)
    elif name.startswith((".", "/", "~")):
        raise OSError(f"There is no file or folder {name}.")
    if local.name != "config.json" and not Path(name).is_file() and find_adapter_config_file(name):
        return _adapted(name, trust_remote_code)
    return _base(name, trust_remote_code)


def _adapted(name: str, trust_remote_code: bool) -> nn.Module:
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError:
        raise ImportError(f"{name} is a PEFT adapter; to see it, pip install peft.") from None
    adapter = PeftConfig.from_pretrained(name)
    adapter.inference_mode = False
    base = adapter.base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter_config.json of {name} names no base_model_name_or_path.")
    try:
        model = _base(base, trust_remote_code, _AUTO_CLASSES.get(adapter.task_type))
    except OSError as error:
        raise OSError(f"{name} adapts {base}, whose config cannot be read. {error}") from error
    with _readable(f"{name} cannot be put on {base}"), torch.device("meta"):
        return get_peft_model(model, adapter)


def _base(name: str, trust_remote_code: bool, auto_class: str | None = None) -> nn.Module:
    with _readable(f"The config of {name} cannot be used"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    architectures = config.architectures or []
    if auto_class is None and trust_remote_code:
        remote = getattr(config, "auto_map", None) or {}
        auto_class = next(
            (
                key
                for key, place in remote.items()
                if str(place).rpartition(".")[2] in architectures
            ),
            None,
        )
    known = [cls for cls in (getattr(transformers, a, None) for a in architectures) if cls]
    if architectures and not known and auto_class is None:
        raise ValueError(
            f"The config of {name} is for {', '.join(architectures)}, which transformers "
            f"{transformers.__version__} does not have. Install the version that has it, pass "
            "--trust_remote_code if its code comes with the config, or call "
            "hf_normopt.classify(model) in Python."
        )
    with _readable(f"No model can be built from the config of {name}"), torch.device("meta"):
        if known and auto_class is None:
            return known[0](config)
        auto = getattr(transformers, auto_class or "AutoModel")
        return auto.from_config(config, trust_remote_code=trust_remote_code)


@contextmanager
def _readable(complaint: str) -> Iterator[None]:
    """Whatever foreign code raises becomes one complaint that a person can read."""
    try:
        yield
    except (ImportError, OSError):
        raise
    except Exception as error:
        # transformers goes on with a list of every model type that it knows
        said = str(error).partition("\nModel type should be one of")[0]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        way_out = (
            " Only a model of transformers can be built from its config; for any other, call "
            "hf_normopt.classify(model) in Python."
        )
        raise ValueError(
            f"{complaint}. {kind}{said}{way_out if 'model_type' in said else ''}"
        ) from error
