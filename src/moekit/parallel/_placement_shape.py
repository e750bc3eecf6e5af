"""How long one forward step of a model of some shape takes, from the law of single products: a shape simulator.

Everything here is modelled: sums of :class:`moekit.measure.machine.Law` over the products that a step consists of,
with even loads. What lies between products (norms, softmax, gathers) is not in the law and thus missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moekit.measure.machine import INTER, CostModel


@dataclass(frozen=True)
class Shape:
    """``hidden`` H, ``inner`` the intermediate size of an expert; ``shared`` experts run for every token."""

    layers: int
    hidden: int
    experts: int
    top_k: int
    inner: int
    shared: int = 0

    @property
    def parameters(self) -> int:
        """All weights of the layers: four H x H projections, the router, gated experts."""
        experts = 3 * self.hidden * self.inner * (self.experts + self.shared)
        return self.layers * (4 * self.hidden**2 + self.hidden * self.experts + experts)

    def products(self, tokens: float, devices: int = 1) -> Iterator[tuple[float, int, int, int]]:
        """(rows, in, out, how many) of one layer's products on one of ``devices`` that share the experts.

        Each device has ``tokens`` tokens of its own; with even loads each of its experts gets tokens x K x P / E rows.
        """
        own = self.experts // devices
        yield tokens, self.hidden, self.hidden, 4
        yield tokens, self.hidden, self.experts, 1
        yield tokens * self.top_k * devices / self.experts, self.hidden, self.inner, 3 * own
        if self.shared:
            yield tokens, self.hidden, self.inner, 3 * self.shared


def step_seconds(shape: Shape, tokens: float, cost: CostModel, devices: int = 1, itemsize: int = 4) -> float:
    """Modelled seconds of one forward step's products on each device."""
    each = (
        count * float(cost.product(flops=2.0 * rows * n * m, nbytes=float(n * m * itemsize)))
        for rows, n, m, count in shape.products(tokens, devices)
    )
    return shape.layers * sum(each)


def exchange_seconds(
    shape: Shape, tokens: float, cost: CostModel, nodes: int, per_node: int, itemsize: int = 2
) -> float:
    """Modelled seconds that one device waits for dispatch and combine in one step, two-level, nothing overlapped.

    With random placement a token's K experts reach a share 1 - (1 - 1/n)^K of the other n - 1 nodes, one copy each;
    inside a node each copy goes on to the devices that need it. Messages to the nodes, then to the devices in a node.
    """
    size = shape.hidden * itemsize
    reached = 1 - (1 - 1 / nodes) ** shape.top_k
    inside = nodes * per_node * (1 - (1 - 1 / (nodes * per_node)) ** shape.top_k) * (1 - 1 / per_node)
    seconds = 0.0
    if nodes > 1:
        seconds += (nodes - 1) * float(cost.message(tokens * reached * size, INTER))
    if per_node > 1:
        seconds += (per_node - 1) * float(cost.message(tokens * inside * size / (per_node - 1)))
    return shape.layers * 2 * seconds


def fastest(shapes: Sequence[Shape], tokens: float, cost: CostModel, parameters: float, slack: float = 0.1) -> Shape:
    """Of the shapes within ``slack`` of a number of parameters, the one of least modelled seconds per step."""
    near = [shape for shape in shapes if abs(shape.parameters / parameters - 1) <= slack]
    return min(near or shapes, key=lambda shape: step_seconds(shape, tokens, cost))
