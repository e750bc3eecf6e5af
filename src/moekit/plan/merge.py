"""Several experts as one: layer plans that keep every router row and let the rows of a group share an expert."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moekit.plan.layer import LayerPlan, Permutation, StoredExpert


def merged(leader_E: np.ndarray, share_E: np.ndarray, orders: Mapping[int, np.ndarray] | None, why: str) -> LayerPlan:
    """One stored expert per leader, the mean of its group weighted by ``share_E``; all router rows stay.

    Args:
        leader_E: for every expert the leader it joins; a leader's own.
        share_E: usage. Members of none weigh nothing and are left out, unless that is the whole group: then all weigh
            alike.
        orders: hidden-unit orders [I] by expert that align a group's members; None merges them as they are.
    """
    leaders = sorted(set(leader_E.tolist()))
    experts = []
    for leader in leaders:
        members = np.flatnonzero(leader_E == leader)
        used = members[share_E[members] > 0]
        members = used if len(used) else members
        weight = share_E[members] if len(used) else np.ones(len(members))
        parts = tuple((int(e), float(w)) for e, w in zip(members, weight / weight.sum(), strict=True))
        order = tuple(_order(orders.get(e)) for e, _ in parts) if orders and len(parts) > 1 else ()
        experts.append(StoredExpert(parts, orders=order if any(order) else ()))
    return LayerPlan.aliased(experts, [leaders.index(leader) for leader in leader_E.tolist()], why=why)


def redirected(plan: LayerPlan, leader_E: np.ndarray, why: str) -> LayerPlan:
    """A plan that keeps some experts, with the rows of the others kept too and sent to each one's leader."""
    place = {expert.parts[0][0]: index for index, expert in enumerate(plan.experts)}
    return LayerPlan.aliased(plan.experts, [place[leader] for leader in leader_E.tolist()], why=why)


def _order(order_I: np.ndarray | None) -> Permutation | None:
    same = order_I is None or np.array_equal(order_I, np.arange(len(order_I)))
    return None if order_I is None or same else Permutation.of(order_I)
