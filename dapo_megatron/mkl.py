"""Has MKL choose its elementwise functions before threads share them.

MKL 2024, which torch's wheels for x86 hold, makes that choice when a function is first called. Where threads do so at
once, one of them may run a version of 11 bits, whatever was asked for, over all of its part (pytorch/pytorch#188792).
Cosines of positions are made once, in a process that has just started: then a model is wrong to its end, by about 1e-3
in log-probs.
"""

from __future__ import annotations

import torch

FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log"),
    *("log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc"),
)
"""Those that torch leaves to MKL (ATen/cpu/vml.h)."""


def choose_functions() -> None:
    """Call each function once, on a single number, which is not divided among threads."""
    for dtype in (torch.float32, torch.float64):
        number = torch.ones(1, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(number)
