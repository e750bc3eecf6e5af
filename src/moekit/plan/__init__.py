"""Plans: what shall become of every expert, chosen by a method or a solver, applied by one engine."""

from moekit.plan.document import LayerPlan, Permutation, Plan, StoredExpert
from moekit.plan.planner import LayerPlanner, Method, PlannedSource, Planner, Site, Source, make_plan
from moekit.plan.recombine import recombined, stored

__all__ = [
    "LayerPlan",
    "LayerPlanner",
    "Method",
    "Permutation",
    "Plan",
    "PlannedSource",
    "Planner",
    "Site",
    "Source",
    "StoredExpert",
    "make_plan",
    "recombined",
    "stored",
]
