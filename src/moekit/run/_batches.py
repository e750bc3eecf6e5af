"""Batches by experts: which tokens or sequences to compute together, so that fewer experts are needed at a time.

Shapes by suffix: N sequences (or tokens), L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from moekit.errors import OptionError


def expert_batches(expert_N: Sequence[int], size: int) -> list[list[int]]:
    """Tokens in batches of at most ``size``: one queue per expert, the longest taken whole while it fits.

    For tokens that use one expert, the same in every layer. The last queue of a batch is split to fill it. Ties go to
    the lower expert; tokens keep their order within a queue.

    Raises:
        OptionError: a batch of less than one token.
    """
    if size < 1:
        raise OptionError(f"batches of {size} tokens: expected 1 or more")
    queues: dict[int, list[int]] = {}
    for token, expert in enumerate(expert_N):
        queues.setdefault(expert, []).append(token)
    batches: list[list[int]] = []
    room = 0
    while queues:
        if room == 0:
            batches.append([])
            room = size
        expert = max(queues, key=lambda e: (len(queues[e]), -e))
        taken, left = queues[expert][:room], queues[expert][room:]
        batches[-1] += taken
        room -= len(taken)
        if left:
            queues[expert] = left
        else:
            del queues[expert]
    return batches


def union_size(path_NLE: np.ndarray, members: Sequence[int]) -> int:
    """How many experts, over all layers, a batch of these sequences needs at least once."""
    return int(path_NLE[list(members)].any(0).sum())


def balanced_split(path_NLE: np.ndarray, rounds: int = 8) -> tuple[list[int], list[int]]:
    """Two halves of an even number of sequences whose expert sets are small: balanced 2-means on paths bool [N, L, E].

    Likeness is the share of equal entries. Centres start as the two sequences least alike and become the member most
    like its half; the half a sequence is drawn to more strongly takes it while it has room. Swaps of one pair at a time
    then lower the sum of the two unions until none does.

    Raises:
        OptionError: an odd number of sequences.
    """
    count = len(path_NLE)
    if count % 2:
        raise OptionError(f"{count} sequences cannot be split in equal halves: expected an even number")
    flat = path_NLE.reshape(count, -1)
    like_NN = np.array([(flat == row).mean(1) for row in flat]).reshape(count, count)
    centres = tuple(int(i) for i in np.unravel_index(np.argmin(like_NN), like_NN.shape)) if count else (0, 0)
    halves: list[list[int]] = [[], []]
    for _ in range(rounds):
        pull = like_NN[:, centres[0]] - like_NN[:, centres[1]]
        order = np.argsort(-pull, kind="stable").tolist()
        halves = [sorted(order[: count // 2]), sorted(order[count // 2 :])]
        new = tuple(half[int(like_NN[np.ix_(half, half)].sum(1).argmax())] for half in halves) if count else centres
        if new == centres:
            break
        centres = new
    return _swapped(path_NLE, halves)


def _swapped(path_NLE: np.ndarray, halves: list[list[int]]) -> tuple[list[int], list[int]]:
    one, two = halves
    best = union_size(path_NLE, one) + union_size(path_NLE, two)
    improved = True
    while improved:
        improved = False
        for a, b in [(a, b) for a in one for b in two]:
            trial = sorted({*one} - {a} | {b}), sorted({*two} - {b} | {a})
            cost = sum(union_size(path_NLE, half) for half in trial)
            if cost < best:
                (one, two), best, improved = trial, cost, True
                break
    return one, two


def best_split(path_NLE: np.ndarray) -> tuple[list[int], list[int]]:
    """The two equal halves of least union sizes, by trying them all."""
    everyone = set(range(len(path_NLE)))
    tried = [
        (list(half), sorted(everyone - set(half)))
        for half in combinations(sorted(everyone), len(everyone) // 2)
        if not half or half[0] == 0
    ]
    return min(tried, key=lambda halves: sum(union_size(path_NLE, half) for half in halves))
