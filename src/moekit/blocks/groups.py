"""What limiting a router to groups of experts allows when experts are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import PlanError
from .block import MoEBlock


def keep_groups(found: Sequence[MoEBlock], keep: Mapping[str, Sequence[int]]) -> tuple[int, int] | None:
    """(number of groups, groups chosen) after the removal, or None where routing is not grouped.

    Exact are equal counts in every group (at least two, and in order), or whole groups dropped. Anything else runs
    but is silently wrong in stock transformers, whose view of experts as groups would cut elsewhere: PlanError.
    """
    results = {_after(block, list(keep[block.name])) for block in found if block.groups}
    if len(results) > 1:
        counts = " and ".join(str(count) for count, _ in sorted(results))
        raise PlanError(
            f"blocks would keep {counts} groups of experts: the stock format has one number of groups for all blocks"
        )
    return next(iter(results), None)


def _after(block: MoEBlock, kept: list[int]) -> tuple[int, int]:
    assert block.groups is not None
    count, chosen = block.groups
    size = block.num_experts // count
    group = [expert // size for expert in kept]
    if group != sorted(group):
        raise PlanError(f"{block.name} routes by groups of {size}: list its experts group by group, in order")
    left = [group.count(g) for g in range(count)]
    if min(left) == max(left) and left[0] >= 2:
        after, per_group = (count, chosen), left[0]
    elif set(left) == {0, size}:
        remaining = left.count(size)
        after, per_group = (remaining, min(chosen, remaining)), size
    else:
        raise PlanError(
            f"{block.name} routes by {count} groups of {size} experts, and {left} of them would be left: keep equally "
            "many (two or more) of each group, or drop whole groups"
        )
    if after[1] * per_group < block.top_k:
        raise PlanError(
            f"{block.name}: a token chooses among {after[1]} groups of {per_group} experts but uses {block.top_k}: "
            "keep more experts in each group"
        )
    return after
