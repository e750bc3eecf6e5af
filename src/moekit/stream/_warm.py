"""What libraries load when they first compute, loaded before anything is reckoned."""

from __future__ import annotations

from functools import cache

import torch

from moekit.contract import Routing
from moekit.formats import DenseBank
from moekit.kernels import forward


@cache
def warm() -> None:
    """Run a tiny layer, so that compiled kernels and what compiles them (over 100 MB) are resident from now on.

    Else a cap would be found large enough with them absent, and exceeded, or refused, once they are there.
    """
    for dtype in (torch.bfloat16, torch.float32):
        bank = DenseBank(torch.zeros(2, 128, 64, dtype=dtype), torch.zeros(2, 64, 64, dtype=dtype))
        routing = Routing(torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1))
        forward(bank, torch.zeros(8, 64, dtype=dtype), routing)
