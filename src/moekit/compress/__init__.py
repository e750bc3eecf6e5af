"""Compression methods, one file per paper; every one of them only makes a plan."""

from moekit.compress._options import method, methods, sequence
from moekit.compress._within import chain, within

__all__ = ["chain", "method", "methods", "sequence", "within"]
