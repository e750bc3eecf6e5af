"""SPES: each worker trains its own experts and the shared weights; experts are copied from owners, the rest averaged.

Paper: Pretraining A Large Language Model using Distributed GPUs: A Memory-Efficient Decentralized Paradigm, 2026
    (n 117, arXiv 2602.11543).
Method: worker w of W trains experts [w E / W, (w + 1) E / W) and everything shared (AdamW state for these alone). Every
    H steps: shared <- mean over workers, expert <- its owner's. Warm-up by merging, every ``merge_every`` steps t <=
    ``merge_decay``, at once for all experts of a layer: W_e <- W_e + a (mean_j W_j - W_e), j the ``peers`` experts
    nearest by cosine of their gate projections, a = ``merge`` (1 - t / merge_decay).
Uses: parallel.outer, parallel._outer_fragments, parallel._outer_owned, train.forms
Differs: no server. Workers exchange among themselves, and each computes the merging, which is the same everywhere. The
    decayed count of a worker's own experts in the balance term (optional in the paper's code) is left out.
Claim: a 2B MoE trained on 16 separate 48 GB GPUs is as good as one trained centrally, at 35 instead of 55 GB per worker
    and a third less traffic.
Shown: lab.experiments.spes
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.errors import OptionError
from moekit.parallel._codec import codec
from moekit.parallel._outer_fragments import Averaged, OuterStep
from moekit.parallel._outer_link import Link
from moekit.parallel._outer_owned import Ownership
from moekit.parallel.outer import OuterSync

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Spes:
    """``every`` is H. ``merge`` is a0, 0 for no merging; ``merge_every`` must be a multiple of ``every``."""

    every: int = 100
    merge: float = 0.01
    merge_every: int = 500
    merge_decay: int = 10_000
    peers: int = 4

    def __post_init__(self) -> None:
        if self.every < 1 or self.merge_every < 1 or self.merge_every % self.every:
            raise OptionError(
                f"merge_every={self.merge_every} must be a multiple of every={self.every}: experts are merged just "
                "after they were exchanged"
            )
        if not 0 <= self.merge <= 1 or self.merge_decay < 1 or self.peers < 1:
            raise OptionError(
                f"merge={self.merge:g} must be from 0 to 1, merge_decay={self.merge_decay} and peers={self.peers} at "
                "least 1"
            )

    def attach(
        self, model: PreTrainedModel, link: Link, *, folder: str | Path | None = None, save_every: int = 100
    ) -> OuterSync:
        """Take the first worker's weights, own a share of the experts, and synchronise when called after each step.

        ``finish`` of what is returned gives the model plain weights again, all of them the same everywhere.
        """
        link.share([*model.parameters(), *model.buffers()])
        owners = Ownership(model, link.rank, link.world)
        for block in owners.blocks:
            if self.merge and self.peers >= block.num_experts:
                raise OptionError(
                    f"peers={self.peers} of {block.num_experts} experts: a merging that spares none needs at most "
                    f"{block.num_experts - 1} peers"
                )
        own = {id(tensor) for tensor in owners.trained()}
        shared = [p for p in model.parameters() if id(p) not in own]
        fragments = [Averaged("shared", shared, OuterStep(), codec("float32")), owners.fragment(codec("float32"))]
        return _Sync(self, owners, fragments, link, folder, save_every)

    def strength(self, step: int) -> float:
        """a after a step; 0 where nothing is merged."""
        due = step % self.merge_every == 0 and step <= self.merge_decay
        return self.merge * (1 - step / self.merge_decay) if due else 0.0


class _Sync(OuterSync):
    def __init__(
        self, options: Spes, owners: Ownership, fragments: list, link: Link, folder: str | Path | None, save_every: int
    ) -> None:
        super().__init__(fragments, link, every=options.every, folder=folder, save_every=save_every, then=self.merge)
        self._options, self._owners = options, owners

    @torch.no_grad()
    def merge(self, step: int) -> None:
        """Nudge the experts of every layer to their peers, if the step is one for that."""
        strength = self._options.strength(step)
        for block in self._owners.blocks if strength else ():
            span = self._owners.span(block, self._owners.rank)
            parts = list(self._owners.parts(block))
            for _, own, copies in parts:
                copies[span.start : span.stop] = own
            merged = nudged([copies for _, _, copies in parts], self._options.peers, strength)
            for (_, own, copies), new in zip(parts, merged, strict=True):
                copies.copy_(new)
                own.copy_(new[span.start : span.stop])

    def finish(self, step: int) -> None:
        super().finish(step)
        self._owners.settle()


def nudged(weights: list[Tensor], peers: int, strength: float) -> list[Tensor]:
    """Matrices [E, R, K] of a layer, each expert moved towards the mean of the peers nearest by the first matrix."""
    flat = F.normalize(weights[0].float().flatten(1), dim=1)
    likeness_EE = (flat @ flat.T).fill_diagonal_(-torch.inf)
    near_EP = likeness_EE.topk(peers, dim=1).indices
    return [w + strength * (w[near_EP].mean(1) - w) for w in weights]
