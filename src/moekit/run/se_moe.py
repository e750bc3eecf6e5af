"""SE-MoE: a host cache with decayed frequencies, and a ring of layer slots that is read ahead.

Paper: SE-MoE: A Scalable and Efficient Mixture-of-Experts Distributed Training and Inference System, 2022 (n 163).
Method: hits[p] counts uses since p came, times beta every K steps; evict the least among those with hits >= threshold,
    or the least of all where there is none. Ring: the slot of layer i is refilled with layer i + K as soon as i is
    computed. Storage for Adam, D dense and S sparse parameters, a share alpha of S active, L layers, N devices:
    16 D + 4 alpha S / L <= M_gpu N, 16 alpha S <= M_cpu N, 12 S <= M_ssd N. Ranks per task follow its load.
Uses: run._policies_scored, run._policies_pools, run.schedule; run._expert_states, run._expert_training
Differs: pools are per layer, as for every other policy here; training reads experts on demand, none ahead, and makes up
    the steps of those that were not used; fused communication and the split embedding table belong to training on many
    devices and are left out.
Claim: +13 % inference throughput; at least 30 % less memory with little slow-down; +64 % on an unbalanced task mix.
Shown: lab.experiments.se_moe
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from moekit.errors import BudgetError, OptionError
from moekit.run._policies_pools import LayerPools
from moekit.run._policies_scored import DecayedLFU
from moekit.run.policy import CachePolicy
from moekit.run.schedule import ring


@dataclass(frozen=True, kw_only=True)
class SEMoE:
    """``decay`` every ``every`` steps; below ``threshold`` uses a newcomer is spared; ``slots`` of the ring."""

    decay: float = 0.9
    every: int = 16
    threshold: float = 0.0
    slots: int = 2

    def policy(self) -> CachePolicy:
        return LayerPools(DecayedLFU(decay=self.decay, every=self.every, threshold=self.threshold))

    def ring_time(self, load: Sequence[float], compute: Sequence[float]) -> float:
        """Modelled time of one pass; ``load`` and ``compute`` by layer, in one unit."""
        return ring(load, compute, self.slots)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Bytes that training with Adam takes on all devices, hosts and disks together."""

    device: float
    host: float
    disk: float

    @classmethod
    def of(cls, dense: int, sparse: int, active: float, layers: int) -> Storage:
        """Of ``dense`` and ``sparse`` parameters, a share ``active`` of the sparse ones in use at a time."""
        return cls(device=16 * dense + 4 * active * sparse / layers, host=16 * active * sparse, disk=12 * sparse)

    def check(self, device: float, host: float, disk: float, devices: int) -> None:
        """Raise :class:`BudgetError`, naming what is needed, where the bytes of each of ``devices`` do not suffice."""
        for name, needed, each in (
            ("device", self.device, device),
            ("host", self.host, host),
            ("disk", self.disk, disk),
        ):
            if needed > each * devices:
                raise BudgetError(
                    f"training needs {needed / devices:.3g} bytes of {name} memory on each of {devices} devices, "
                    f"found {each:.3g}: add devices or memory"
                )


def ranks_by_task(load: Sequence[float], ranks: int) -> list[int]:
    """How many ranks each task gets so that the largest load per rank is least; every task gets one.

    One rank at a time goes to the task that is slowest now, which is optimal because a task's time only falls with
    ranks.

    Raises:
        OptionError: fewer ranks than tasks.
    """
    if ranks < len(load):
        raise OptionError(f"{ranks} ranks for {len(load)} tasks: expected one rank per task or more")
    given = [1] * len(load)
    slowest = [(-one, task) for task, one in enumerate(load)]
    heapq.heapify(slowest)
    for _ in range(ranks - len(load)):
        _, task = heapq.heappop(slowest)
        given[task] += 1
        heapq.heappush(slowest, (-load[task] / given[task], task))
    return given
