"""How a bank runs under a routing, and which kernel to choose."""

from ._arrivals import Arrivals
from ._layer import is_decorated
from .bank_experts import BankExperts
from .choice import explain
from .experts import ArrivingExperts, register
from .prepare import PrepareReport, prepare, restore
from .run import forward, run, warm_up

__all__ = [
    "Arrivals",
    "ArrivingExperts",
    "BankExperts",
    "PrepareReport",
    "explain",
    "forward",
    "is_decorated",
    "prepare",
    "register",
    "restore",
    "run",
    "warm_up",
]
