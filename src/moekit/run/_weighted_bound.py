"""The offline optimum of a cache whose misses cost unequally: a minimum-cost flow, solved as a linear programme."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from moekit.errors import OptionError
from moekit.profile.trace import Request
from moekit.run.policy import Key


def least_penalty(requests: Sequence[Request], cost: Callable[[int, Key], float], capacity: int) -> float:
    """The least that misses can cost, if everything read is kept while its request is served and experts are of one
    size. ``cost(i, key)`` is what a miss of ``key`` in ``requests[i]`` costs.

    An expert may be kept from one use to the next, which saves the next one's cost and takes one place in all requests
    between. At most capacity minus the request's own experts are kept through a request. Differences of neighbouring
    rows have two entries per column (a network), so the optimum is whole.

    Raises:
        OptionError: the cache is smaller than the largest request.
    """
    if max((len(request.experts) for request in requests), default=0) > capacity:
        raise OptionError(f"a cache of {capacity} experts is smaller than the largest request")
    last: dict[Key, int] = {}
    kept: list[tuple[int, int, float]] = []
    total = 0.0
    for at, request in enumerate(requests):
        for key in ((request.layer, expert) for expert in request.experts):
            price = cost(at, key)
            total += price
            if key in last:
                kept.append((last[key] + 1, at, price))
            last[key] = at
    saved = sum(price for begin, end, price in kept if begin == end)
    return total - saved - _most_saved([one for one in kept if one[0] < one[1]], requests, capacity)


def _most_saved(kept: Sequence[tuple[int, int, float]], requests: Sequence[Request], capacity: int) -> float:
    if not kept:
        return 0.0
    begin, end, price = (np.array(column) for column in zip(*kept, strict=True))
    count, length = len(kept), len(requests)
    room = np.array([capacity - len(request.experts) for request in requests], float)
    # Rows say: what is kept through request t, plus idle room, is the room of t; each less the row before.
    column, slack = np.arange(count), count + np.arange(length)
    inside = end < length
    rows = np.concatenate([begin, end[inside], np.arange(length), np.arange(1, length)])
    columns = np.concatenate([column, column[inside], slack, slack[:-1]])
    signs = np.concatenate([np.ones(count), -np.ones(inside.sum()), np.ones(length), -np.ones(length - 1)])
    found = linprog(
        np.concatenate([-price, np.zeros(length)]),
        A_eq=coo_array((signs, (rows, columns)), shape=(length, count + length)).tocsr(),
        b_eq=np.diff(room, prepend=0.0),
        bounds=np.stack([np.zeros(count + length), np.r_[np.ones(count), np.full(length, np.inf)]], 1),
        method="highs",
    )
    assert found.success, found.message
    return -float(found.fun)
