"""How a bank is stored: dense, or packed integers."""

from .dense import DenseBank
from .packed import WIDTHS, PackedBank, packed_nbytes
from .registry import FORMATS, allocate, with_tensors

__all__ = ["FORMATS", "WIDTHS", "DenseBank", "PackedBank", "allocate", "packed_nbytes", "with_tensors"]
