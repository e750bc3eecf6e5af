"""Plans: what shall become of every expert, chosen by a method or a solver, applied by one engine."""

from moekit.plan.apply import apply
from moekit.plan.document import LayerPlan, Permutation, Plan, StoredExpert
from moekit.plan.fit import FitResult, fit
from moekit.plan.live import LiveLoss, split_held_out
from moekit.plan.live_streamed import live_loss
from moekit.plan.planner import LayerPlanner, Method, PlannedSource, Planner, Site, Source, make_plan
from moekit.plan.receipt import Receipt
from moekit.plan.recombine import recombined, stored
from moekit.plan.verify import Report, verify

__all__ = [
    "FitResult",
    "LayerPlan",
    "LayerPlanner",
    "LiveLoss",
    "Method",
    "Permutation",
    "Plan",
    "PlannedSource",
    "Planner",
    "Receipt",
    "Report",
    "Site",
    "Source",
    "StoredExpert",
    "apply",
    "fit",
    "live_loss",
    "make_plan",
    "recombined",
    "split_held_out",
    "stored",
    "verify",
]
