"""A plan's rewrites of routing, before any checkpoint holds them; see :mod:`moekit.blocks.rewriting`."""

from __future__ import annotations

from moekit.kernels.rewrites import Rewrite, allocate_rewrite
from moekit.plan.layer import LayerPlan


def rewrite_of(plan: LayerPlan, hidden_size: int) -> Rewrite | None:
    """The rewrite a layer's plan asks for, with its numbers; None where it asks for none."""
    values = plan.rewrite
    if values is None:
        return None
    rewrite = allocate_rewrite(values.describe, len(plan.rows), hidden_size, "cpu")
    rewrite.load_state_dict({name: values.tensor(name) for name in rewrite.state_dict()})
    return rewrite.eval()
