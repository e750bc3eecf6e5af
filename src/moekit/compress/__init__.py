"""Compression methods, one file per paper; every one of them only makes a plan."""

from moekit.compress._options import method, methods, sequence

__all__ = ["method", "methods", "sequence"]
