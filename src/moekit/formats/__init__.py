"""How a bank is stored: dense, or packed integers."""

from .dense import DenseBank
from .packed import WIDTHS, PackedBank, packed_nbytes

__all__ = ["WIDTHS", "DenseBank", "PackedBank", "packed_nbytes"]
