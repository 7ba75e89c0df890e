"""What a step does to each role, measured in the role's own norm.

| quantity          | of one parameter                              | of a role, by Prop. 7        |
| ----------------- | --------------------------------------------- | ---------------------------- |
| `weight_norm`     | ‖W‖ before the step                           | max over its parameters      |
| `relative_update` | ‖ΔW‖ / ‖W‖, without the weight decay          | max ‖ΔW‖ / max ‖W‖           |
| `dual_norm`       | ‖G‖† of the gradient                          | sum over its parameters      |
| `certificate`     | ⟨M, D⟩ / (‖D‖ ‖M‖†) of momentum and direction | of one parameter, in turn    |

By Hölder's inequality the certificate is at most 1, and equals 1 only if the direction is an LMO of
the momentum. The norm of a spectral direction is taken as 1, which is true to 0.7 %, so a
certificate may read 1.007. With a statistic (Adam's, Shampoo's) it is less.

Norms in closed form take one pass over the tensor. Singular values cost more: in a large model, one
matrix in [`PERIOD`] is measured per step, in turn. For the others the Frobenius norm is measured,
times the last known ratio of the two norms, which changes slowly. Only `read` waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..norms.operators import Spectral
from ..norms.orthogonalize import POLYNOMIALS
from ..optim.moves import Move
from ..optim.optimizer import NormOpt
from ..optim.products import ProductMove
from ..optim.sharding import gathered

PERIOD = 24
LARGE = 1e8  # multiplications for all Gram matrices above which matrices are measured in turn


class Gauge:
    """Measures the moves of one step at a time; set `NormOpt.observer` to `observe`."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[int, str], Tensor] = {}
        self._sizes: dict[str, int] = {}  # parameters of each role, in the last step
        self._work = 0.0
        self._steps = 0
        self.start()

    def start(self) -> None:
        """Forget what was observed since the last `read`."""
        self._values: dict[str, dict[str, list[Tensor]]] = {}
        self._rates: dict[str, float | Tensor] = {}
        self._step_sizes: dict[str, float | Tensor] = {}
        self._matrices = 0

    def observe(self, move: Move, eta: Tensor | float) -> None:
        """Measure a move before it is made."""
        label = move.group["label"]
        self._rates[label] = move.group["lr"] * move.group["multiplier"]
        self._step_sizes[label] = move.group["lr"] * eta
        if isinstance(move, ProductMove):
            measured = _of_product(move, self._rates[label] * eta)
            self._note(label, measured)
            return
        values = self._values.setdefault(label, {})
        position = len(values.get("weight_norm", ()))
        weight, grad = gathered(move.param).to(move.smooth.dtype), gathered(move.grad)
        direction = move.direction
        claimed = _size_of_lmo(move)
        size = self._measure(move, _size, direction, "direction") if claimed is None else claimed
        measured = {
            "weight_norm": self._measure(move, _size, weight, "weight"),
            "dual_norm": self._measure(move, _dual, grad, "gradient"),
            "update": size * self._rates[label] * eta,
        }
        if position == self._steps % self._sizes.get(label, 1):
            bound = _size(move, direction) if claimed is None else claimed
            bound = bound * _dual(move, move.smooth)
            inner = torch.linalg.vecdot(move.smooth.flatten(), direction.flatten())
            measured["certificate"] = torch.where(bound > 0, inner / bound, 1)
        self._note(label, measured)
        if isinstance(move.rule.norm, Spectral):
            self._matrices += 1
            if self._steps == 0:
                shapes = [tuple(operator.shape) for operator in move.layout.to_operators(weight)]
                self._work += sum(math.prod(shape) * min(shape[-2:]) for shape in shapes)

    def _note(self, label: str, measured: Mapping[str, Tensor]) -> None:
        values = self._values.setdefault(label, {})
        for quantity, value in measured.items():
            values.setdefault(quantity, []).append(value)

    def read(self, optimizer: NormOpt) -> dict[str, float]:
        """The measurements, by `quantity/role`; clears them.

        `lr/role` includes the role's multiplier and schedule. `step_size` (the learning rate times
        η) and `cos_theta` (of escape velocity) belong to the network, or to each role if η does.
        """
        if not self._values:
            return {}
        found: dict[str, float | Tensor] = {f"lr/{k}": rate for k, rate in self._rates.items()}
        per_role = optimizer.step_size.per_role
        for group in optimizer.param_groups if per_role else optimizer.param_groups[:1]:
            label = group["label"]
            suffix = f"/{label}" if per_role else ""
            if label in self._step_sizes:
                found[f"step_size{suffix}"] = self._step_sizes[label]
            if "cosine" in group["memory"]:
                found[f"cos_theta{suffix}"] = group["memory"]["cosine"]
        for label, values in self._values.items():
            size, update = (torch.stack(values[key]).max() for key in ("weight_norm", "update"))
            found[f"weight_norm/{label}"] = size
            found[f"relative_update/{label}"] = update / size
            found[f"dual_norm/{label}"] = torch.stack(values["dual_norm"]).sum()
            if "certificate" in values:  # a role may have fewer gradients than the last time
                found[f"certificate/{label}"] = values["certificate"][0]
            self._sizes[label] = len(values["weight_norm"])
        self._steps += 1
        self.start()
        numbers = [float(value) for value in found.values()]
        return {key: n for key, n in zip(found, numbers, strict=True) if math.isfinite(n)}

    def _measure(
        self, move: Move, measure: Callable[[Move, Tensor], Tensor], tensor: Tensor, what: str
    ) -> Tensor:
        """A quantity of a tensor; out of its turn, estimated from the Frobenius norm."""
        if not isinstance(move.rule.norm, Spectral) or self._work < LARGE:
            return measure(move, tensor)
        key, length = (id(move.state), what), torch.linalg.vector_norm(tensor)
        if key not in self._ratios or (self._matrices + self._steps) % PERIOD == 0:
            value = measure(move, tensor)
            self._ratios[key] = torch.where(length > 0, value / length, 0)
            return value
        return length * self._ratios[key]


def _of_product(move: ProductMove, rate: Tensor | float) -> dict[str, Tensor]:
    """The same quantities of a product s B A; that of its change is the one asked for."""
    factors = (move.a, move.b)
    smooth = move.pair(move.a.smooth, move.b.smooth)
    received = move.pair(*(f.grad if f.gradients else torch.zeros_like(f.smooth) for f in factors))
    inner = torch.stack([(f.smooth * f.direction).sum() for f in factors]).sum()
    size = move.size(smooth)
    bound = size * move.norm.factor_duals(smooth).sum()
    return {
        "weight_norm": move.norm.norm_of_product(smooth).max(),
        "dual_norm": move.norm.factor_duals(received).sum(),
        "update": inner.new_tensor(size) * rate,
        "certificate": torch.where(bound > 0, inner / bound, 1),
    }


def _size_of_lmo(move: Move) -> Tensor | None:
    """‖direction‖ by theory, to 0.7 %, if it is an LMO by one of our methods; else None."""
    if move.rule.statistic is not None or getattr(move.rule.norm, "method", "") in POLYNOMIALS:
        return None
    scales = [move.scale(operator.shape) for operator in move.layout.to_operators(move.direction)]
    moves = torch.linalg.vector_norm(move.direction) > 0
    return moves * (max(scales) * move.rule.norm.weight(move.layout.taps))


def _size(move: Move, tensor: Tensor) -> Tensor:
    """‖tensor‖: the weighted max over its operators."""
    norm, sizes = move.rule.norm, []
    for op in move.layout.to_operators(tensor):
        plain = singular(op).amax(-1) if isinstance(norm, Spectral) else norm._norm(op)
        sizes.append(plain.max() * norm.unit(*op.shape[-2:]))
    return torch.stack(sizes).max() * norm.weight(move.layout.taps)


def _dual(move: Move, tensor: Tensor) -> Tensor:
    """‖tensor‖†: the sum over its operators."""
    norm, duals = move.rule.norm, []
    for op in move.layout.to_operators(tensor):
        plain = singular(op).sum(-1) if isinstance(norm, Spectral) else norm._dual(op)
        duals.append(plain.sum() / norm.unit(*op.shape[-2:]))
    return torch.stack(duals).sum() / norm.weight(move.layout.taps)


def singular(x: Tensor) -> Tensor:
    """Singular values from the smaller Gram matrix in float64, to half of its digits."""
    x = x.double()
    gram = x.mT @ x if x.shape[-2] > x.shape[-1] else x @ x.mT
    finite = gram.isfinite().all((-2, -1))[..., None, None]
    values = torch.linalg.eigvalsh(torch.where(finite, gram, 0)).clamp_min(0).sqrt()
    return torch.where(finite[..., 0], values, torch.nan).float()
