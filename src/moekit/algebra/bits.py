"""One width per item, least total loss under a budget of bits, with "at least so many items at this width".

The integer programme of MC-MoE's mixed precision (2025), min sum_e sum_b x[e, b] loss[e, b] with one b per e, solved
exactly by a dynamic programme over (bits used, items so far at each demanded width).
Shapes by suffix: E items (experts), B widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moekit.errors import BudgetError, OptionError

Step = tuple[np.ndarray, np.ndarray]
"""By state: the width taken last, and whether its demand was met before already."""


def allocate_bits(
    loss_EB: np.ndarray,
    widths: Sequence[int],
    budget: int,
    *,
    at_least: Mapping[int, int] | None = None,
    spend: bool = True,
) -> tuple[int, ...]:
    """The width of every item: least sum of ``loss_EB[e, widths.index(width)]`` with at most ``budget`` bits in all.

    ``at_least`` demands numbers of items by width ({3: 1, 2: 1} in MC-MoE). With ``spend`` the bits used are the most
    that are possible within the budget (all of it, wherever some choice meets it), because losses are estimates and
    unused bits help nobody; without it fewer bits are taken where they lose less. Ties take the narrower width for the
    later items. Raises :class:`BudgetError` where no choice fits, naming the smallest budget that would do, and
    :class:`OptionError` on losses that are not finite or do not fit, and on demands that cannot be.
    """
    loss_EB = np.asarray(loss_EB, dtype=float)
    demands = {width: number for width, number in (at_least or {}).items() if number > 0}
    _check(loss_EB, widths, demands)
    order = sorted(range(len(widths)), key=lambda b: widths[b])
    ascending = [widths[b] for b in order]
    most = min(budget, len(loss_EB) * ascending[-1])
    least, path = _tables(loss_EB[:, order], ascending, most, demands)
    # The last state of every axis but the first: each demand met.
    final_S = least.reshape(len(least), -1)[:, -1] if len(least) else np.array([])
    reached = np.flatnonzero(np.isfinite(final_S))
    if not len(reached):
        raise BudgetError(_too_small(len(loss_EB), widths, budget, demands))
    used = int(reached[-1]) if spend else int(np.argmin(final_S))
    return _trace(path, ascending, (used, *demands.values()), list(demands))


def _tables(
    loss_EB: np.ndarray, widths: list[int], most: int, demands: Mapping[int, int]
) -> tuple[np.ndarray, list[Step]]:
    """The least loss by (bits used, items at each demanded width, "or more" at the last), and how each state came."""
    shape = (max(most + 1, 0), *(number + 1 for number in demands.values()))
    last = np.full(shape, np.inf)
    last.flat[:1] = 0.0
    path = []
    for loss_B in loss_EB:
        best, choice, stayed = np.full(shape, np.inf), np.zeros(shape, np.int8), np.zeros(shape, bool)
        for b, width in enumerate(widths):
            if width > most:
                continue
            moved, stays = np.full(shape, np.inf), np.zeros(shape, bool)
            moved[width:] = last[: most + 1 - width] + loss_B[b]
            if width in demands:
                moved, stays = _counted(moved, 1 + list(demands).index(width))
            better = moved < best
            best[better], choice[better], stayed[better] = moved[better], b, stays[better]
        path.append((choice, stayed))
        last = best
    return last, path


def _counted(table: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """One more item at this axis's width, and where that is one more than demanded rather than one step up."""
    counts = np.moveaxis(table, axis, 0)
    moved, stays = np.full_like(counts, np.inf), np.zeros(counts.shape, bool)
    moved[1:] = counts[:-1]
    stays[-1] = counts[-1] <= moved[-1]
    moved[-1] = np.minimum(moved[-1], counts[-1])
    return np.moveaxis(moved, 0, axis), np.moveaxis(stays, 0, axis)


def _trace(path: list[Step], widths: list[int], state: tuple[int, ...], demanded: list[int]) -> tuple[int, ...]:
    chosen = []
    for choice, stayed in reversed(path):
        width = widths[int(choice[state])]
        chosen.append(width)
        counts = list(state[1:])
        if width in demanded and not stayed[state]:
            counts[demanded.index(width)] -= 1
        state = (state[0] - width, *counts)
    return tuple(reversed(chosen))


def _too_small(items: int, widths: Sequence[int], budget: int, demands: Mapping[int, int]) -> str:
    smallest = sum(width * number for width, number in demands.items())
    smallest += (items - sum(demands.values())) * min(widths)
    wish = "".join(f", at least {number} at {width} bits" for width, number in demands.items())
    return f"{budget} bits do not suffice for {items} experts{wish}: the smallest budget is {smallest} bits"


def _check(loss_EB: np.ndarray, widths: Sequence[int], demands: Mapping[int, int]) -> None:
    if loss_EB.ndim != 2 or loss_EB.shape[1] != len(widths) or not widths:
        raise OptionError(
            f"losses need a column for each of the widths {list(widths)}, got shape {list(loss_EB.shape)}"
        )
    if not np.isfinite(loss_EB).all():
        raise OptionError("losses hold NaN or infinite values: no allocation can be compared")
    if min(widths) < 0 or len(set(widths)) != len(widths):
        raise OptionError(f"widths {list(widths)} must be different numbers of bits")
    unknown = [width for width in demands if width not in widths]
    if unknown:
        raise OptionError(f"at least {demands[unknown[0]]} experts at {unknown[0]} bits: the widths are {list(widths)}")
    if sum(demands.values()) > len(loss_EB):
        raise OptionError(f"at least {sum(demands.values())} experts at given widths: there are only {len(loss_EB)}")
