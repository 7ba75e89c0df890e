"""What transformers hands out for `optim="normopt"`: a class, called as torch's optimizers are.

Trainers of the ecosystem ask `Trainer.get_optimizer_cls_and_kwargs` for a class and its keyword
arguments, and call it with groups of their own: LoRA+, sentence-transformers, `create_optimizer` of
a subclass.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from ..optim.checkpoints import some
from ..optim.groups import read_groups
from ..optim.optimizer import NormOpt
from .arguments import optimizer_from_arguments

logger = logging.getLogger(__name__)

_usual_names: Any = Trainer.get_decay_parameter_names  # before anybody changes it

_NEEDS_MODEL = (
    "NormOpt finds the roles of parameters in their model. Call this class with a model, or ask "
    "Trainer.get_optimizer_cls_and_kwargs(args, model) with it, and call the class with parameters "
    "or groups of them. Other ways: create_normopt_optimizer(model, lr=...), where lr_adapter_b=16 "
    "does what LoRA+ does; NormOptFactory; NormOptMixin."
)


def optimizer_class(args: TrainingArguments, model: nn.Module | None) -> type[NormOpt]:
    """A class whose call makes the NormOpt that training arguments ask for.

    It takes a model, or parameters or groups of `model`, whose roles are found in it. A group may
    have an `lr` and a `weight_decay` of its own; a weight decay that is what a plain Trainer would
    give asks for nothing, and the rule of the role decides.

    Args:
        args: the training arguments.
        model: whose parameters will be given; None: only a model is taken.
    """
    make = functools.partial(_made, args, model)

    class OfModel(NormOpt):
        def __new__(cls, *arguments: Any, **options: Any) -> NormOpt:  # type: ignore[misc]
            # a plain NormOpt, which can be pickled, unless it is a subclass, as PEFT makes them
            return make(*arguments, **options) if cls is OfModel else super().__new__(cls)

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.__setstate__(make(*arguments, **options).__getstate__())

    OfModel.__name__ = OfModel.__qualname__ = NormOpt.__name__
    OfModel.__module__, OfModel.__doc__ = NormOpt.__module__, NormOpt.__doc__
    return OfModel


def _made(
    args: TrainingArguments,
    bound: nn.Module | None,
    /,
    params: Any = None,
    lr: float | None = None,
    *,
    model: nn.Module | None = None,
    optimizer_dict: Any = None,
    **options: Any,
) -> NormOpt:
    """The optimizer for a model, or for parameters of one; the names are those of transformers."""
    is_model = isinstance(params, nn.Module)
    chosen = params if is_model else bound if model is None else model
    given = optimizer_dict if params is None or is_model else params
    if chosen is None or (params is model is given is None):
        raise TypeError(_NEEDS_MODEL)
    options = {"weight_decay": args.weight_decay, **options}
    options["lr"] = args.learning_rate if lr is None else lr
    if given is not None:
        options["params"] = list(_unusual(given, chosen, options["weight_decay"]))
    return optimizer_from_arguments(chosen, args, **options)


def _unusual(params: Any, model: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Groups that ask for a weight decay only where a plain Trainer would give another one.

    So a trainer's own `get_decay_parameter_names` has its say, and the usual one, which goes by
    names, does not stand above the rules of roles.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    decaying = set(_usual_names(None, model))
    for one in read_groups(params):
        name = names.get(id(one.param), "")
        usual = weight_decay if name in decaying else 0.0
        own = {"lr": one.lr, "weight_decay": one.weight_decay}
        if name and one.weight_decay == usual:
            del own["weight_decay"]
        yield {"params": [(name or one.name, one.param)], **own}


def warn_of_decay_names(trainer: Any, model: nn.Module) -> None:
    """Say that a trainer's own `get_decay_parameter_names` does not reach a factory.

    Args:
        trainer: which trains with [`NormOptFactory`](hf_normopt.NormOptFactory).
        model: what it will pass to the factory.
    """
    changed = {*trainer.get_decay_parameter_names(model)} ^ {*_usual_names(None, model)}
    if changed:
        logger.warning(
            "get_decay_parameter_names has no effect: NormOptFactory gets the model alone, and %s "
            'decays by its role. Take optim="normopt", or an option such as decay_embedding=0.',
            some(changed),
        )
