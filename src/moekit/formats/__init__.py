"""How a bank is stored."""

from .dense import DenseBank

__all__ = ["DenseBank"]
