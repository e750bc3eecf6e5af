"""How a bank runs under a routing, and which kernel to choose."""

from .choice import explain
from .experts import register
from .packed_experts import PackedExperts
from .prepare import PrepareReport, prepare, restore
from .run import forward, run

__all__ = ["PackedExperts", "PrepareReport", "explain", "forward", "prepare", "register", "restore", "run"]
