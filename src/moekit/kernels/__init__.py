"""How a bank runs under a routing, and which kernel to choose."""

from .bank_experts import BankExperts
from .choice import explain
from .experts import register
from .prepare import PrepareReport, prepare, restore
from .run import forward, run

__all__ = ["BankExperts", "PrepareReport", "explain", "forward", "prepare", "register", "restore", "run"]
