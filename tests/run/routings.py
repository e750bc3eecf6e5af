"""Traces for tests: routings written down or drawn."""

import numpy as np

from moekit.profile import RoutingTrace


def trace_of(steps, experts=6, decode=True, sequence=None):
    """``steps``: for each step, for each layer, the experts of its one token."""
    width = max(len(chosen) for step in steps for chosen in step)
    expert = np.full((len(steps), len(steps[0]), width), -1)
    for t, step in enumerate(steps):
        for layer, chosen in enumerate(step):
            expert[t, layer, : len(chosen)] = list(chosen)
    return RoutingTrace(
        expert=expert,
        weight=np.where(expert >= 0, 1.0, 0.0).astype(np.float32),
        sequence=np.zeros(len(steps), int) if sequence is None else np.asarray(sequence),
        step=np.arange(len(steps)),
        decode=np.full(len(steps), decode),
        num_experts=(experts,) * len(steps[0]),
        domain=np.zeros(len(steps), int),
    )


def random_trace(seed, steps=60, layers=3, experts=8, k=2):
    draw = np.random.default_rng(seed)
    skew_LE = draw.dirichlet(np.full(experts, 0.5), size=layers) + 1e-3
    skew_LE /= skew_LE.sum(1, keepdims=True)
    return trace_of(
        [[draw.choice(experts, k, replace=False, p=skew_E) for skew_E in skew_LE] for _ in range(steps)], experts
    )
