"""What shall become of the experts of one layer: the part of a plan that a method decides.

Two lists say everything. ``experts`` are the experts the output stores, each a weighted sum of source experts at some
precision. ``rows`` are the rows the output's router has, each taken (or blended) from source rows, and ``slots`` says
which stored expert each row calls. A pruned layer has as many rows as experts and ``slots == (0, 1, ...)``; a merged
layer may keep every row and let several share an expert; slot -1 forbids a row.

What no weighted sum can say (calibrated rounding, factors) has its numbers in ``values``; ``experts`` then says what
each stored expert was made of. ``rewrite`` changes the routing at run time (``kernels.rewrites``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moekit.errors import PlanError
from moekit.plan.values import Values

Row = tuple[tuple[int, float], ...]
"""One router row of the output: (source row, coefficient) pairs."""


@dataclass(frozen=True)
class Permutation:
    """An order of an expert's I hidden units: unit j of the result is unit ``array()[j]`` of the source.

    Kept as bytes (little-endian int32), so that thousands of them stay small, comparable and hashable.
    """

    data: bytes

    @classmethod
    def of(cls, order: Iterable[int] | np.ndarray) -> Permutation:
        values = np.asarray(order if isinstance(order, np.ndarray) else list(order))
        return cls(values.astype("<i4").tobytes())

    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, dtype="<i4")

    def __len__(self) -> int:
        return len(self.data) // 4

    def after(self, first: Permutation) -> Permutation:
        """The order that equals applying ``first`` and then this one."""
        return Permutation.of(first.array()[self.array()])


@dataclass(frozen=True)
class StoredExpert:
    """One expert of the output: ``sum_i coefficient_i * source expert_i``, hidden units reordered first, then stored.

    ``parts`` are (source expert, coefficient) pairs. ``orders`` is empty, or has one :class:`Permutation` or None per
    part. ``bits`` 16 leaves the precision of the source; 8, 4, 3 and 2 are group-wise integers of ``group_size``.
    """

    parts: tuple[tuple[int, float], ...]
    bits: int = 16
    group_size: int = 64
    orders: tuple[Permutation | None, ...] = ()

    @property
    def plain(self) -> bool:
        """True if this is one source expert, values untouched (its precision may still change)."""
        return len(self.parts) == 1 and self.parts[0][1] == 1.0 and not any(self.orders)

    @property
    def untouched(self) -> bool:
        return self.plain and self.bits == 16

    def order(self, part: int) -> Permutation | None:
        return self.orders[part] if self.orders else None


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """See the module's text. ``num_experts`` is E of the source layer, ``why`` one line for the reader."""

    num_experts: int
    experts: tuple[StoredExpert, ...]
    slots: tuple[int, ...]
    rows: tuple[Row, ...]
    why: str = ""
    values: Values | None = None
    rewrite: Values | None = None

    @classmethod
    def keep(cls, ids: Sequence[int], num_experts: int, *, why: str = "") -> LayerPlan:
        """Keep these experts as they are, in ascending order, and drop the others with their router rows."""
        kept = sorted({int(i) for i in ids})
        return cls(
            num_experts=num_experts,
            experts=tuple(StoredExpert(((i, 1.0),)) for i in kept),
            slots=tuple(range(len(kept))),
            rows=tuple(((i, 1.0),) for i in kept),
            why=why,
        )

    @classmethod
    def identity(cls, num_experts: int, *, why: str = "") -> LayerPlan:
        return cls.keep(range(num_experts), num_experts, why=why)

    @classmethod
    def aliased(cls, experts: Sequence[StoredExpert], slots: Sequence[int], *, why: str = "") -> LayerPlan:
        """Keep the router at full width; row e calls stored expert ``slots[e]``."""
        rows = tuple(((e, 1.0),) for e in range(len(slots)))
        return cls(num_experts=len(slots), experts=tuple(experts), slots=tuple(slots), rows=rows, why=why)

    def valued(self, values: Values, why: str = "") -> LayerPlan:
        """The same experts, rows and slots, but stored expert m has the m-th computed values instead of its sum."""
        return replace(self, values=values, why="; ".join(part for part in (self.why, why) if part))

    def with_bits(self, bits: int | Sequence[int], group_size: int | Sequence[int] = 64) -> LayerPlan:
        """The same layer at another precision: one for all, or one per stored expert."""
        count = len(self.experts)
        widths = [bits] * count if isinstance(bits, int) else bits
        groups = [group_size] * count if isinstance(group_size, int) else group_size
        each = zip(self.experts, widths, groups, strict=True)
        return replace(self, experts=tuple(replace(e, bits=b, group_size=g) for e, b, g in each))

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """(bits, group size) of every stored expert, computed or not; 16 bits where it is not packed integers."""
        if self.values is None or self.values.format != "packed":
            return tuple((expert.bits, expert.group_size) for expert in self.experts)
        found = list(zip(self.values.describe["bits"], self.values.describe["group_size"], strict=True))
        return tuple(found if self.values.chosen is None else (found[e] for e in self.values.chosen))

    @property
    def plain_slots(self) -> bool:
        """True if row s calls stored expert s: what every stock router does."""
        return self.slots == tuple(range(len(self.experts)))

    @property
    def untouched(self) -> bool:
        return self == replace(LayerPlan.identity(self.num_experts), why=self.why)

    @property
    def sources(self) -> frozenset[int]:
        """Source experts that live on, whole or as part of a merge."""
        return frozenset(source for expert in self.experts for source, _ in expert.parts)

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(e for e in range(self.num_experts) if e not in self.sources)

    def matrix(self) -> np.ndarray:
        """[M, E] coefficients of the recombination (orders and precision apart)."""
        matrix = np.zeros((len(self.experts), self.num_experts))
        for index, expert in enumerate(self.experts):
            for source, coefficient in expert.parts:
                matrix[index, source] += coefficient
        return matrix

    def router_matrix(self) -> np.ndarray:
        """[R, E] coefficients that make the output's router rows from the source's."""
        matrix = np.zeros((len(self.rows), self.num_experts))
        for index, row in enumerate(self.rows):
            for source, coefficient in row:
                matrix[index, source] += coefficient
        return matrix

    def then(self, other: LayerPlan) -> LayerPlan:
        """This plan, then ``other`` on its result: ``other`` speaks of this plan's stored experts as its sources.

        A later precision replaces an earlier one. Merging experts that were already quantised or computed, and
        blending router rows that already share experts, is refused with a PlanError.
        """
        if other.num_experts != len(self.experts):
            raise PlanError(
                f"the second plan is for {other.num_experts} experts but the first leaves {len(self.experts)}: "
                "make the second from the layer as the first leaves it"
            )
        experts = tuple(self._stored_then(expert) for expert in other.experts)
        why = "; ".join(part for part in (self.why, other.why) if part)
        slots, rows = self._routes_then(other)
        values = self._values_then(other)
        if self.rewrite is not None and (other.rewrite is not None or not other.routes_alike):
            raise PlanError("after a method that changes the routing at run time no other may: put it last")
        return LayerPlan(
            num_experts=self.num_experts,
            experts=experts,
            slots=slots,
            rows=rows,
            why=why,
            values=values,
            rewrite=other.rewrite or self.rewrite,
        )

    @property
    def routes_alike(self) -> bool:
        """Whether every router row stays where it was."""
        return self.plain_slots and self.rows == LayerPlan.identity(self.num_experts).rows

    def _values_then(self, other: LayerPlan) -> Values | None:
        if self.values is None:
            return other.values
        if other.values is not None:
            if self.values.edits:
                raise PlanError("a method that replaces whole tensors cannot be followed by one that computes values")
            return other.values
        if not all(expert.plain for expert in other.experts):
            raise PlanError("experts whose values were computed cannot be merged any more: merge first")
        if not self.values.dense and any(expert.bits != 16 for expert in other.experts):
            raise PlanError(f"experts stored as {self.values.format} cannot be rounded to integers: choose one of both")
        chosen = [expert.parts[0][0] for expert in other.experts]
        return self.values if chosen == list(range(len(self.experts))) else self.values.select(chosen)

    def _stored_then(self, later: StoredExpert) -> StoredExpert:
        parts: dict[tuple[int, Permutation | None], float] = {}
        for index, (middle, outer) in enumerate(later.parts):
            earlier, turn = self.experts[middle], later.order(index)
            if earlier.bits != 16 and not later.plain:
                raise PlanError(f"stored expert {middle} is already at {earlier.bits} bits: merge first, quantise last")
            for inner, (source, coefficient) in enumerate(earlier.parts):
                first = earlier.order(inner)
                order = first if turn is None else turn if first is None else turn.after(first)
                parts[source, order] = parts.get((source, order), 0.0) + outer * coefficient
        precise = later if later.bits != 16 else self.experts[later.parts[0][0]]
        orders = tuple(order for _, order in parts)
        return StoredExpert(
            tuple((source, coefficient) for (source, _), coefficient in parts.items()),
            precise.bits,
            precise.group_size,
            orders if any(orders) else (),
        )

    def _routes_then(self, other: LayerPlan) -> tuple[tuple[int, ...], tuple[Row, ...]]:
        if self.plain_slots:
            return other.slots, tuple(self._blend(row) for row in other.rows)
        if any(len(row) != 1 or row[0][1] != 1.0 for row in other.rows):
            raise PlanError("router rows cannot be blended after a plan that lets several rows share an expert")
        target = {row[0][0]: slot for row, slot in zip(other.rows, other.slots, strict=True)} | {-1: -1}
        kept = [(target[slot], row) for slot, row in zip(self.slots, self.rows, strict=True) if slot in target]
        return tuple(slot for slot, _ in kept), tuple(row for _, row in kept)

    def _blend(self, row: Row) -> Row:
        blended: dict[int, float] = {}
        for middle, outer in row:
            for source, coefficient in self.rows[middle]:
                blended[source] = blended.get(source, 0.0) + outer * coefficient
        return tuple(blended.items())
