"""How a bank runs under a routing, and which kernel to choose."""

from .experts import register
from .packed_experts import PackedExperts
from .run import forward, run

__all__ = ["PackedExperts", "forward", "register", "run"]
