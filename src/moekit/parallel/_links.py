"""Where ranks are, and what crossed which kind of link."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from moekit.parallel._errors import ParallelError

Level = Literal["self", "intra", "inter"]
"""Nothing is sent; within a node; between nodes."""


@dataclass(frozen=True)
class Grid:
    """``nodes`` machines with ``per_node`` ranks each: rank = node * per_node + local rank."""

    nodes: int
    per_node: int

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.per_node < 1:
            raise ParallelError(f"a grid needs at least one node and one rank, got {self.nodes} x {self.per_node}")

    @classmethod
    def of(cls, world: int, nodes: int = 1) -> Grid:
        """The grid of ``world`` ranks on ``nodes`` machines; raises ParallelError where they do not divide."""
        if nodes < 1 or world % nodes:
            raise ParallelError(f"{world} ranks do not divide over {nodes} nodes: choose a divisor of {world}")
        return cls(nodes, world // nodes)

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    def node(self, rank: int) -> int:
        return rank // self.per_node

    def local(self, rank: int) -> int:
        return rank % self.per_node

    def level(self, source: int, target: int) -> Level:
        """The link that a message between two ranks crosses."""
        if source == target:
            return "self"
        return "intra" if self.node(source) == self.node(target) else "inter"


@dataclass
class Tally:
    """Of one kind of message: how many, with how many rows (tokens, experts, ...) and bytes."""

    messages: int = 0
    rows: int = 0
    nbytes: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.messages + other.messages, self.rows + other.rows, self.nbytes + other.nbytes)


@dataclass
class Traffic:
    """What this rank sent, by purpose (``tokens``, ``weights``, ``gradients``, ``counts``, ...) and link level.

    Rows that stay on their rank are kept under the level "self"; they are no messages and :meth:`total` leaves them
    out unless asked for them. Receivers count nothing, so that sums over ranks count every message once.
    """

    tallies: dict[tuple[str, Level], Tally] = field(default_factory=dict)

    def add(self, what: str, level: Level, rows: int, nbytes: int) -> None:
        if rows:
            sent = Tally(int(level != "self"), rows, nbytes)
            self.tallies[what, level] = self.tallies.get((what, level), Tally()) + sent

    def total(self, what: str | Iterable[str] | None = None, level: Level | None = None) -> Tally:
        """The sum over purposes and levels, or of those named."""
        names = (what,) if isinstance(what, str) else what
        wanted = None if names is None else set(names)
        found = [
            tally
            for (name, at), tally in self.tallies.items()
            if (wanted is None or name in wanted) and (at == level if level else at != "self")
        ]
        return sum(found, Tally())

    def clear(self) -> None:
        self.tallies.clear()

    def as_dict(self) -> dict[str, Any]:
        """``{"tokens.inter": {"messages": .., "rows": .., "nbytes": ..}}``, as JSON takes it."""
        return {f"{what}.{level}": vars(tally).copy() for (what, level), tally in sorted(self.tallies.items())}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Traffic:
        """The inverse of :meth:`as_dict`."""
        made = cls()
        for name, tally in record.items():
            what, _, level = name.rpartition(".")
            made.tallies[what, level] = Tally(**tally)  # type: ignore[index]
        return made

    def __add__(self, other: Traffic) -> Traffic:
        """Of two ranks, or two spans of time, together."""
        both = Traffic(dict(self.tallies))
        for key, tally in other.tallies.items():
            both.tallies[key] = both.tallies.get(key, Tally()) + tally
        return both
