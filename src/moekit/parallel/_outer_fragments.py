"""What is synchronised together between workers that train apart: fragments, and how copies of them become one.

A fragment packs what it sends when its exchange begins, and uses what came when that ends, training steps later.
N numbers in a fragment, W workers.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.errors import OptionError
from moekit.parallel._codec import Codec
from moekit.parallel._outer_link import Link, Pending


@dataclass(frozen=True, kw_only=True)
class OuterStep:
    """The outer optimiser: SGD on the mean difference, with Nesterov momentum as in torch.optim.SGD, and ``mix``.

    ``mix`` is the share of its own weights that a worker keeps when new ones arrive. The defaults are a plain mean of
    the workers' weights (local SGD, federated averaging).
    """

    learning_rate: float = 1.0
    momentum: float = 0.0
    mix: float = 0.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or not 0 <= self.momentum < 1 or not 0 <= self.mix < 1:
            raise OptionError(
                f"learning_rate={self.learning_rate:g} must be above 0, momentum={self.momentum:g} and "
                f"mix={self.mix:g} in [0, 1)"
            )


class Fragment(ABC):
    """``offset`` is the step, of every period, at which its exchange begins; ``nbytes`` what a worker uploads."""

    name: str
    offset: int = 0
    nbytes: int

    @abstractmethod
    def pack(self) -> Tensor:
        """What this worker has to say now, float32 [N]."""

    @abstractmethod
    def send(self, packed: Tensor, link: Link) -> Pending:
        """Begin the exchange of what was packed."""

    @abstractmethod
    def use(self, pending: Pending, *, last: bool) -> None:
        """End the exchange. ``last``: nothing is trained after it, and all workers are to hold the same."""

    def settle(self, pending: Pending) -> None:
        """End an exchange made only because training ended between two regular ones."""
        self.use(pending, last=True)

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the trained parameters; the tensors themselves."""


class Averaged(Fragment):
    """Every worker trains all of it; the mean difference since the last exchange moves one common copy.

    DiLoCo (arXiv 2311.08105), Streaming DiLoCo (arXiv 2501.18512). The common copy theta and the momentum are float32
    whatever the parameters are. With D_w = theta - theta_w as of the beginning of the exchange: theta <- theta -
    lr * nesterov(mean_w D_w), and then, on what the worker has trained to meanwhile, theta_w <- mix theta_w +
    (1 - mix) theta. Differences are decoded to float32 before they are added, the worker's own included, so that all
    workers hold the same theta, bit for bit.
    """

    def __init__(
        self, name: str, parameters: Sequence[nn.Parameter], outer: OuterStep, codec: Codec, offset: int = 0
    ) -> None:
        self.name, self.outer, self.codec, self.offset = name, outer, codec, offset
        self._parameters = list(parameters)
        self.common = _flat(self._parameters)
        self.momentum = torch.zeros_like(self.common) if outer.momentum else torch.zeros(0)
        self.nbytes = codec.nbytes(len(self.common))

    def pack(self) -> Tensor:
        return self.common - _flat(self._parameters)

    def send(self, packed: Tensor, link: Link) -> Pending:
        if self.codec.NAME == "float32":
            return link.sum(packed, self.name)
        return link.gather(self.codec.encode(packed), self.name)

    @torch.no_grad()
    def use(self, pending: Pending, *, last: bool) -> None:
        mean, outer = self._mean(pending), self.outer
        if outer.momentum:
            self.momentum.mul_(outer.momentum).add_(mean)
            mean = mean + outer.momentum * self.momentum
        self.common -= outer.learning_rate * mean
        self._write(0.0 if last else outer.mix)

    @torch.no_grad()
    def settle(self, pending: Pending) -> None:
        """The plain mean of the workers' weights: an outer step is meant for a whole period."""
        self.common -= self._mean(pending)
        self._write(0.0)

    def state(self) -> dict[str, Tensor]:
        return {"common": self.common, "momentum": self.momentum}

    def _mean(self, pending: Pending) -> Tensor:
        got = pending.take()
        if isinstance(got, Tensor):
            return got / pending.link.world
        count = len(self.common)
        return torch.stack([self.codec.decode(code, count) for code in got]).mean(0)

    def _write(self, mix: float) -> None:
        start = 0
        for parameter in self._parameters:
            new = self.common[start : start + parameter.numel()].view(parameter.shape).to(parameter)
            parameter.copy_(new if mix == 0 else torch.lerp(new, parameter, mix))
            start += parameter.numel()


class Owned(Fragment):
    """Every worker trains a part of its own, of equal size; everybody else gets a copy of it.

    SPES (arXiv 2602.11543). ``own`` are the tensors this worker trains; ``places[w]`` the tensors in which what worker
    w sends is kept (views are written through), in the same order and of the same shapes; a worker's own are skipped.
    """

    def __init__(
        self, name: str, own: Sequence[Tensor], places: Sequence[Sequence[Tensor]], rank: int, codec: Codec
    ) -> None:
        self.name, self.codec = name, codec
        self._own, self._places, self._rank = list(own), places, rank
        self._count = sum(t.numel() for t in own)
        self.nbytes = codec.nbytes(self._count)

    def pack(self) -> Tensor:
        return _flat(self._own)

    def send(self, packed: Tensor, link: Link) -> Pending:
        return link.gather(self.codec.encode(packed), self.name)

    @torch.no_grad()
    def use(self, pending: Pending, *, last: bool) -> None:
        for worker, code in enumerate(pending.take()):
            if worker == self._rank:
                continue
            values, start = self.codec.decode(code, self._count), 0
            for place in self._places[worker]:
                place.copy_(values[start : start + place.numel()].view(place.shape))
                start += place.numel()

    def state(self) -> dict[str, Tensor]:
        others = [part for worker, parts in enumerate(self._places) if worker != self._rank for part in parts]
        return {f"other{i}": part for i, part in enumerate(others)}


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """A float32 copy on the CPU, one after the other."""
    return torch.cat([t.detach().to("cpu", torch.float32).reshape(-1) for t in tensors])


def by_layers(parameters: Mapping[str, nn.Parameter], per_fragment: int) -> list[dict[str, nn.Parameter]]:
    """Fragments of ``per_fragment`` layers each, strided: of P fragments, layer b is in fragment b mod P.

    The layer of a parameter is the first number in its name; what is in no layer (embeddings, the last norm, the head)
    goes to the fragment with the fewest numbers. Raises :class:`OptionError` where no parameter is in a layer.
    """
    found = {name: re.search(r"(?:^|\.)(\d+)\.", name) for name in parameters}
    layers = sorted({int(match[1]) for match in found.values() if match})
    if per_fragment < 1 or not layers:
        raise OptionError(
            f"{per_fragment} layers per fragment of a model with {len(layers)} numbered layers: both must be at least 1"
        )
    count = -(-len(layers) // per_fragment)
    groups: list[dict[str, nn.Parameter]] = [{} for _ in range(count)]
    for name, match in found.items():
        if match:
            groups[layers.index(int(match[1])) % count][name] = parameters[name]
    smallest = min(groups, key=lambda group: sum(p.numel() for p in group.values()))
    smallest.update({name: parameters[name] for name, match in found.items() if not match})
    return groups
