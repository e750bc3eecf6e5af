"""Schedules on paper: who computes what while something is being moved, in what order, and how long that takes.

Everything here is modelled: times are numbers that go in, makespans come out. N experts of one layer, L layers; all
times in one unit, whichever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

# -- one link, one computer: what is moved first


def johnson(transfer: Sequence[float], compute: Sequence[float]) -> list[int]:
    """The order of jobs that ends first where each is moved, then computed, one at a time on either (Johnson, 1954).

    Jobs whose transfer is the shorter go first, by rising transfer; the others last, by falling compute. With equal
    transfers this is longest compute first.
    """
    jobs = range(len(transfer))
    first = sorted((j for j in jobs if transfer[j] < compute[j]), key=lambda j: (transfer[j], -compute[j], j))
    last = sorted((j for j in jobs if transfer[j] >= compute[j]), key=lambda j: (-compute[j], j))
    return first + last


def flow_shop(order: Sequence[int], transfer: Sequence[float], compute: Sequence[float]) -> float:
    """When the last job is computed, if they are moved and computed in this order."""
    moved = done = 0.0
    for job in order:
        moved += transfer[job]
        done = max(done, moved) + compute[job]
    return done


def ring(load: Sequence[float], compute: Sequence[float], slots: int) -> float:
    """When the last layer is computed, if all its experts are read ahead into a ring of ``slots`` layers.

    The first ``slots`` layers are resident at the start, as the ring left them. Once layer i is computed its slot is
    free for layer i + slots; the link serves one layer at a time. A layer takes max(load, compute) in the steady state
    whatever the number of slots, which only buys the start and jitter.
    """
    loaded = [0.0] * len(load)
    done: list[float] = []
    link = 0.0
    for layer in range(len(load)):
        if layer >= slots:
            link = max(link, done[layer - slots]) + load[layer]
            loaded[layer] = link
        done.append(max(done[-1] if done else 0.0, loaded[layer]) + compute[layer])
    return done[-1] if done else 0.0


# -- two computers and a link between them


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What an expert takes: on the slow side ``slow`` per token and ``cold`` once for the first expert; on the fast
    side ``fast`` whatever the tokens; ``move`` for bringing it to the fast side."""

    slow: float = 1.0
    cold: float = 0.79
    fast: float = 0.5
    move: float = 0.418

    def slow_time(self, tokens: Sequence[int]) -> float:
        return sum(self.slow * n for n in tokens) + (self.cold if tokens else 0.0)


@dataclass(frozen=True)
class Split:
    """Where the experts of a layer run: indices on the ``fast`` and the ``slow`` side, in the order they start."""

    fast: tuple[int, ...]
    slow: tuple[int, ...]
    makespan: float


def timed(fast: Sequence[int], slow: Sequence[int], tokens: Sequence[int], cached: Sequence[bool], c: Costs) -> Split:
    """An assignment with its makespan: what is cached runs first, the rest in the order of its transfers."""
    order = sorted(fast, key=lambda e: not cached[e])
    end = flow_shop(range(len(order)), [0.0 if cached[e] else c.move for e in order], [c.fast] * len(order))
    return Split(tuple(order), tuple(slow), max(end, c.slow_time([tokens[e] for e in slow])))


def greedy_split(tokens: Sequence[int], cached: Sequence[bool], costs: Costs) -> Split:
    """Experts in a row, cached before uncached and many tokens before few; the fast side takes from the front, the slow
    side from the back, whichever would be done first with its next one."""
    row = sorted(range(len(tokens)), key=lambda e: (not cached[e], -tokens[e], e))
    fast: list[int] = []
    slow: list[int] = []
    fast_end = slow_end = moved = 0.0
    while row:
        head, tail = row[0], row[-1]
        wait = 0.0 if cached[head] else max(0.0, moved + costs.move - fast_end)
        on_slow = costs.slow * tokens[tail] + (0.0 if slow else costs.cold)
        if fast_end + wait + costs.fast <= slow_end + on_slow:
            fast.append(row.pop(0))
            fast_end += wait + costs.fast
            moved += 0.0 if cached[head] else costs.move
        else:
            slow.append(row.pop())
            slow_end += on_slow
    return timed(fast, slow, tokens, cached, costs)


def static_split(tokens: Sequence[int], cached: Sequence[bool], costs: Costs, move: bool) -> Split:
    """Cached experts on the fast side; the others there as well (``move``), or all on the slow side."""
    everyone = range(len(tokens))
    fast = [e for e in everyone if cached[e] or move]
    return timed(fast, [e for e in everyone if e not in fast], tokens, cached, costs)


def best_split(tokens: Sequence[int], cached: Sequence[bool], costs: Costs) -> Split:
    """The optimum by trying all 2^N assignments; within one, cached first is optimal by Johnson's rule."""
    found = []
    for sides in product((True, False), repeat=len(tokens)):
        fast = [e for e, on_fast in enumerate(sides) if on_fast]
        found.append(timed(fast, [e for e, on_fast in enumerate(sides) if not on_fast], tokens, cached, costs))
    return min(found, key=lambda split: split.makespan)


def impact(expert: int, tokens: Sequence[int], cached: Sequence[bool], costs: Costs) -> float:
    """How much sooner the greedy schedule ends if ``expert`` were cached."""
    if cached[expert]:
        return 0.0
    there = [known or e == expert for e, known in enumerate(cached)]
    return greedy_split(tokens, cached, costs).makespan - greedy_split(tokens, there, costs).makespan
