"""Removing experts from a live model, in place, so that it saves and loads as a stock model of fewer experts.

Nothing is guessed from names: the same class is built twice without weights, with the old count and the new, and
whatever differs between the two (shapes of tensors, numbers kept by modules) is what depends on the count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ._counts import apply_numbers, compare
from .block import MoEBlock
from .find import blocks
from .groups import keep_groups


def select_experts(model: nn.Module, keep: Mapping[str, Sequence[int]]) -> None:
    """Keep only the named experts of each block, in the order given.

    ``keep`` has a list for every block that shares the count, by ``MoEBlock.name``; blocks of another count (those of a
    vision tower, say) may be left out and stay as they are. Slices experts, router rows (classes beyond the experts
    stay), biases and token tables, and sets every count: on modules, on the model and in its configuration. Views from
    :func:`blocks` are stale afterwards.

    Raises:
        PlanError: the stock format cannot say it: counts that differ between blocks, fewer experts than top-k, experts
            that do not exist or are named twice, uneven groups, a token table naming a removed expert, product keys
            that do not form a square.
    """
    found = _concerned(blocks(model, attention=True), keep)
    _check(found, keep)
    kept = {name: list(experts) for name, experts in keep.items()}
    old, new = found[0].num_experts, len(kept[found[0].name])
    groups = keep_groups(found, kept)
    tables = {block.name: _renamed(block, kept[block.name]) for block in found}
    # With the count unchanged (a new order only), any other count shows which tensors are per expert.
    shapes = compare(model, old, new if new != old else old + 1).shapes
    cuts = {name: _cut(found, name, sizes, kept) for name, sizes in shapes.items()}
    numbers = compare(model, old, new, groups) if new != old else None
    tied: dict[int, Tensor] = {}
    for name, (axis, rows) in cuts.items():
        _slice(model, name, axis, rows, tied)
    for block in found:
        if isinstance(block.experts, nn.ModuleDict):
            _renumber(block.experts, kept[block.name])
        if (table := tables[block.name]) is not None:
            block.router.module.tid2eid.copy_(table)
    if numbers is not None:
        apply_numbers(model, numbers, old, new, groups)


def _concerned(found: list[MoEBlock], keep: Mapping[str, Sequence[int]]) -> list[MoEBlock]:
    """The blocks that share a count with those named; a tower with a count of its own may be left alone."""
    counts = {block.num_experts for block in found if block.name in keep}
    return [block for block in found if block.num_experts in counts] or found


def _check(found: list[MoEBlock], keep: Mapping[str, Sequence[int]]) -> None:
    names = [block.name for block in found]
    if unknown := [name for name in keep if name not in names]:
        raise PlanError(f"the model has no block {unknown[0]}; its blocks are {names[0]} to {names[-1]}")
    if missing := [name for name in names if name not in keep]:
        raise PlanError(
            f"no list of experts for {missing[0]}: the stock format has one count for all blocks, so each needs a list"
        )
    counts = {block.num_experts for block in found}
    if len(counts) > 1:
        raise PlanError(f"the named blocks have {min(counts)} to {max(counts)} experts: change one count at a time")
    for block in found:
        kept = list(keep[block.name])
        if len(set(kept)) != len(kept):
            raise PlanError(f"{block.name}: an expert is named twice in {kept}")
        if wrong := [e for e in kept if not 0 <= e < block.num_experts]:
            raise PlanError(f"{block.name} has no expert {wrong[0]}: name some of 0 to {block.num_experts - 1}")
        if len(kept) < block.top_k:
            raise PlanError(
                f"{block.name}: {len(kept)} experts kept, but every token uses {block.top_k}: keep at least as many"
            )
    sizes = {len(keep[name]) for name in names}
    if len(sizes) > 1:
        raise PlanError(
            f"blocks would keep {min(sizes)} to {max(sizes)} experts: the stock format has one count for all blocks; "
            "keep as many everywhere, or save in moekit's own format"
        )
    owners: dict[int, MoEBlock] = {}
    for block in found:
        block.router.check_kept(block.name, list(keep[block.name]))
        first = owners.setdefault(id(next(block.experts.parameters())), block)
        if list(keep[first.name]) != list(keep[block.name]):
            raise PlanError(f"{first.name} and {block.name} share their weights: keep the same experts in both")


def _cut(
    found: list[MoEBlock], name: str, sizes: tuple[torch.Size, torch.Size], kept: Mapping[str, list[int]]
) -> tuple[int, list[int]]:
    """(axis, rows to keep) of a tensor, from its shapes with the old count and with another."""
    inside = [block for block in found if name.startswith(block.name + ".")]
    if not inside:
        raise PlanError(f"{name} depends on the number of experts but lies outside every block: it cannot be cut")
    block = max(inside, key=lambda b: len(b.name))
    experts, (old, new) = kept[block.name], sizes
    axis = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    own = block.router.own_rows(name.removeprefix(block.name + "."), experts)
    if own is not None:
        return axis, own
    probe = len(experts) if len(experts) != block.num_experts else block.num_experts + 1
    each, rest = divmod(old[axis] - new[axis], block.num_experts - probe)
    tail = range(block.num_experts * each, old[axis])
    assert rest == 0, f"{name}: {old} against {new} is no whole number of rows per expert"
    return axis, [row for e in experts for row in range(e * each, (e + 1) * each)] + list(tail)


def _slice(model: nn.Module, name: str, axis: int, rows: list[int], tied: dict[int, Tensor]) -> None:
    """Cut one parameter or buffer; a tensor shared by several names is cut once and stays shared."""
    path, _, leaf = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    tensor = getattr(owner, leaf)
    if id(tensor) not in tied:
        data = tensor.detach().index_select(axis, torch.tensor(rows, device=tensor.device))
        cut = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
        tied[id(tensor)] = cut
        tied[id(cut)] = cut
    setattr(owner, leaf, tied[id(tensor)])


def _renumber(experts: nn.ModuleDict, kept: list[int]) -> None:
    """Experts kept as named modules are renumbered from 0, since stock loading goes by the number in the name."""
    names, modules = list(experts), list(experts.values())
    experts.clear()
    experts.update({name: modules[e] for name, e in zip(names, kept, strict=False)})


def _renamed(block: MoEBlock, kept: list[int]) -> Tensor | None:
    """A table of experts by token id, in the new numbering."""
    table = getattr(block.router.module, "tid2eid", None)
    if table is None:
        return None
    number = torch.full((block.num_experts,), -1, dtype=table.dtype, device=table.device)
    number[torch.tensor(kept, device=table.device)] = torch.arange(len(kept), dtype=table.dtype, device=table.device)
    renamed = number[table.long()]
    if bool((renamed < 0).any()):
        lost = sorted(set(table.unique().tolist()) - set(kept))
        raise PlanError(
            f"{block.name} sends tokens to experts by a table that names expert {lost[0]}, which would be removed: "
            f"keep all {table.unique().numel()} experts the table names"
        )
    return renamed
