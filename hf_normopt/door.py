"""What transformers hands out for `optim="normopt"`: a class, called as torch's optimizers are.

Trainers of the ecosystem ask `Trainer.get_optimizer_cls_and_kwargs` for a class and its keyword
arguments, and call it with groups of their own: LoRA+, sentence-transformers, `create_optimizer` of
a subclass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from .arguments import optimizer_from_arguments
from .groups import read_groups
from .optimizer import NormOpt

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

    class OfModel(NormOpt):
        def __new__(  # type: ignore[misc]  # a plain NormOpt, which can be pickled
            cls,
            params: Any = None,
            *,
            model: nn.Module | None = model,
            optimizer_dict: Any = None,
            **options: Any,
        ) -> NormOpt:
            given = optimizer_dict if params is None or isinstance(params, nn.Module) else params
            chosen = params if isinstance(params, nn.Module) else model
            if chosen is None or (params is None and given is None):
                raise TypeError(_NEEDS_MODEL)
            options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **options}
            if given is not None:
                options["params"] = list(_unusual(given, chosen, options["weight_decay"]))
            return optimizer_from_arguments(chosen, args, **options)

    OfModel.__name__ = OfModel.__qualname__ = NormOpt.__name__
    OfModel.__module__, OfModel.__doc__ = NormOpt.__module__, NormOpt.__doc__
    return OfModel


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
