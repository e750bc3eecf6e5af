"""Making Mixture-of-Experts models of dense ones, one file per paper; ``build`` writes what a builder makes."""

from moekit.build._builder import Builder, Built, Material
from moekit.build._options import builder, builders
from moekit.build._write import build

__all__ = ["Builder", "Built", "Material", "build", "builder", "builders"]
