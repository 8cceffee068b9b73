"""The first call of each elementwise function of MKL, made by one thread.

torch's wheels for x86 carry an oneMKL that settles a function's kernel during its first call. Where that call runs on
several threads, one of them may compute its part of the result with the kernel of least accuracy: on 2 cores `exp` of
128 x 50,257 numbers had relative errors of 1e-4 in half of its rows in one process of six (pytorch#188792, open in
November 2026). A reference kernel's first result, and whether a run continues to the same bits, would hang on it.
"""

from __future__ import annotations

import torch

FUNCTIONS = (
    "acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "lgamma", "log", "log10", "log1p",
    "log2", "sin", "sinh", "sqrt", "tan", "tanh",
)  # fmt: skip


def make() -> None:
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(one)
