"""The class that transformers gets for `optim="normopt"`, called as torch's optimizers are.

LoRA+, sentence-transformers and subclasses of `Trainer` ask
`Trainer.get_optimizer_cls_and_kwargs` for a class and its keyword arguments, and call it with
parameter groups of their own.
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

_usual_names: Any = Trainer.get_decay_parameter_names  # before anybody patches it

_NEEDS_MODEL = (
    "NormOpt finds the roles of parameters in their model. Call this class with a model, or ask "
    "Trainer.get_optimizer_cls_and_kwargs(args, model) with it, and call the class with parameters "
    "or groups of them. Other ways: create_normopt_optimizer(model, lr=...), where lr_adapter_b=16 "
    "does what LoRA+ does; NormOptFactory; NormOptMixin."
)


def optimizer_class(args: TrainingArguments, model: nn.Module | None) -> type[NormOpt]:
    """A class that makes the NormOpt of the training arguments when it is called.

    Call it with a model, or with parameters or groups of `model`. A group may have an `lr` and a
    `weight_decay` of its own. A weight decay that a plain Trainer would give counts as none: the
    rule of the role decides.

    Args:
        args: the training arguments.
        model: the model of the parameters; if it is None, the class takes only a model.
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
    """The optimizer for a model, or for parameters of `bound`; transformers names the arguments."""
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
    """Groups of one parameter, with a weight decay only if a plain Trainer would give another.

    So a trainer's own `get_decay_parameter_names` takes effect, while the usual one, which goes by
    names, does not override the rules of the roles.
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
    """Warn that a factory ignores a trainer's own `get_decay_parameter_names`.

    Args:
        trainer: a trainer with [`NormOptFactory`](hf_normopt.NormOptFactory).
        model: the model that it will pass to the factory.
    """
    changed = {*trainer.get_decay_parameter_names(model)} ^ {*_usual_names(None, model)}
    if changed:
        logger.warning(
            "get_decay_parameter_names has no effect: NormOptFactory gets the model alone, and %s "
            'decays by its role. Take optim="normopt", or an option such as decay_embedding=0.',
            some(changed),
        )
