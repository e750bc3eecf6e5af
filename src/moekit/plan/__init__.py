"""Plans: what shall become of every expert, chosen by a method or a solver, applied by one engine."""

from moekit.plan.document import LayerPlan, Permutation, Plan, StoredExpert

__all__ = ["LayerPlan", "Permutation", "Plan", "StoredExpert"]
