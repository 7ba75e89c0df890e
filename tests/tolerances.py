"""Every tolerance of the suite, by dtype, with its reason."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    relative: float  # of a sum over one matrix, where the theory says "equal"
    reason: str


TOLERANCE = {
    torch.float64: Tolerance(
        1e-10, "eps 2e-16 times sums over up to 1e4 entries, and the SVD's constant"
    ),
    torch.float32: Tolerance(2e-5, "eps 1e-7 times the same"),
    torch.bfloat16: Tolerance(
        2e-2, "computed in float32; the result has 8 bits: eps 8e-3 an entry"
    ),
    torch.float16: Tolerance(
        4e-3, "computed in float32; the result has 11 bits: eps 1e-3 an entry"
    ),
}
